import numpy as np
import pytest
from PIL import Image

from utils.pictures.galleries import save_gallery, save_histogram


def coloured(path, top=0.0, bottom=1.0):
    """Masks (H, W) of bluish (normal) and orange (anomalous) pixels of part of the picture."""
    picture = np.array(Image.open(path).convert("RGB")).astype(int)
    picture = picture[int(top * len(picture)) : int(bottom * len(picture))]
    excess = picture[:, :, 2] - picture[:, :, 0]  # blue over red, (H, W)
    return excess > 30, excess < -30


def one_colour(number):
    """An 8 x 8 image, neither bluish nor orange, whose colour tells its index."""
    return np.full((8, 8, 3), (70, 10 * number + 5, 77), dtype=np.uint8)


def shown(path, num_images):
    """Position (row, left to right) of each index that is visible in the picture."""
    picture = np.array(Image.open(path).convert("RGB")).astype(int)
    positions = {}
    for number in range(num_images):
        ys, xs = np.nonzero((picture == one_colour(number)[0, 0]).all(axis=2))
        if len(ys) > 1000:
            positions[number] = (ys.mean(), xs.mean())
    return positions


@pytest.fixture
def scored():
    scores = np.array([5.0, 1.0, 9.0, 3.0, 7.0, 0.5, 8.0, 2.0, 6.0, 4.0])
    return {
        "images": one_colour,
        "scores": scores,
        "labels": (scores > 4.5).astype(int),
        "class_names_of_images": [f"class{number}" for number in range(10)],
        "title": "digits, normal class 3",
    }


def test_rows_hold_the_extremes_in_order(tmp_path, scored):
    path = tmp_path / "gallery.png"
    assert save_gallery(path, **scored, count=3, auroc=1.0) == path
    positions = shown(path, 10)
    assert set(positions) == {2, 6, 4, 5, 1, 7}
    assert max(positions[i][0] for i in (2, 6, 4)) < min(positions[i][0] for i in (5, 1, 7))
    assert positions[2][1] < positions[6][1] < positions[4][1]
    assert positions[5][1] < positions[1][1] < positions[7][1]


def test_only_the_images_shown_are_read(tmp_path, scored):
    asked = []

    def read(index):
        asked.append(index)
        return one_colour(index)

    save_gallery(tmp_path / "gallery.png", **(scored | {"images": read}), count=2)
    assert sorted(asked) == [1, 2, 5, 6]


def test_frames_tell_normal_from_anomalous(tmp_path, scored):
    def frames(labels):
        """Bluish and orange pixels of the upper and of the lower row."""
        path = tmp_path / "gallery.png"
        save_gallery(path, **(scored | {"labels": np.array(labels)}), count=2)
        rows = coloured(path, 0.05, 0.3), coloured(path, 0.4, 0.55)
        return [[int(pixels.sum()) > 500 for pixels in row] for row in rows]

    assert frames(scored["labels"]) == [[False, True], [True, False]]
    assert frames([0] * 10) == [[True, False], [True, False]]
    assert frames([1] * 10) == [[False, True], [False, True]]


def test_same_scores_draw_the_same_picture(tmp_path, scored):
    first = save_gallery(tmp_path / "a.png", **scored).read_bytes()
    assert save_gallery(tmp_path / "b.png", **scored).read_bytes() == first


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([1.0, 1.0, 1.0], [0, 1, 1]),
        ([0.0, 0.0], [0, 1]),
        ([1e6, 1e6 + 1e-9], [0, 1]),
        ([1e-6, 2e-6, 3e-6], [0, 0, 0]),
        ([1e5, -1e5], [1, 1]),
        ([3.0], [1]),
    ],
)
def test_unusual_scores_are_drawn(tmp_path, scores, labels):
    scores, labels = np.array(scores), np.array(labels)
    histogram = save_histogram(
        tmp_path / "h.png", scores=scores, labels=labels, title="edge", auroc=float("nan")
    )
    for label, pixels in enumerate(coloured(histogram)):
        assert (pixels.sum() > 100) == (label in labels)
    gallery = save_gallery(
        tmp_path / "g.png",
        images=one_colour,
        scores=scores,
        labels=labels,
        class_names_of_images=["x"] * len(scores),
        title="edge",
    )
    assert set(shown(gallery, len(scores))) == set(range(len(scores)))


def test_an_outlier_does_not_squeeze_the_histogram_to_one_bar(tmp_path):
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 1, 200), rng.normal(3, 1, 200)])
    labels = np.repeat([0, 1], 200)

    def width_of_normals(extreme):
        path = save_histogram(
            tmp_path / "h.png",
            scores=np.append(scores, extreme),
            labels=np.append(labels, 1),
            title="outlier",
        )
        normal = coloured(path)[0]
        # The legend, on the right, is blue too.
        columns = np.nonzero(normal[:, : normal.shape[1] // 2])[1]
        return np.ptp(columns)

    assert width_of_normals(1e4) > 0.3 * width_of_normals(3.0)


def test_bad_arguments_are_refused(tmp_path, scored):
    path = tmp_path / "gallery.png"
    for changed, message in (
        ({"scores": np.full(10, np.nan)}, "10 scores are not finite"),
        ({"labels": np.zeros(9)}, r"got shapes \(10,\) and \(9,\)"),
        ({"class_names_of_images": ["a"]}, "10 scores but 1 class names"),
        ({"count": 0}, "count must be 1 or more"),
        ({"scores": np.zeros(0), "labels": np.zeros(0), "class_names_of_images": []}, "no score"),
    ):
        with pytest.raises(ValueError, match=message):
            save_gallery(path, **(scored | changed))
    assert not path.exists()
