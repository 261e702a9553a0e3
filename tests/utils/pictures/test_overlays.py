import time
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from skimage.io import imread

from utils.pictures import overlays
from utils.pictures.overlays import GAP, HEADER, MAX_LINES, TITLE, Shown, colour_limits

S = 192  # drawn one to one
HOT = (slice(40, 60), slice(100, 130))


def subject(num_normal=6, num_defect=6, size=S, grey=90, **changes):
    """Normals with a flat map, defects with one hot rectangle where their mask is."""
    num_images = num_normal + num_defect
    labels = [0] * num_normal + [1] * num_defect
    masks = torch.zeros(num_images, size, size, dtype=torch.bool)
    maps = 0.1 * torch.rand(num_images, size, size, generator=torch.Generator().manual_seed(0))
    masks[num_normal:, HOT[0], HOT[1]] = True
    maps[masks] = 1.0
    values = {
        "images": lambda _: np.full((size, size, 3), grey, dtype=np.uint8),
        "masks": masks,
        "anomaly_maps": maps,
        "scores": [float(place) for place in range(num_images)],
        "labels": labels,
        "defects": ["good"] * num_normal + ["hole", "scratch"] * (num_defect // 2),
        "names": [f"test/{place:03d}.png" for place in range(num_images)],
        "threshold": 0.5,
    }
    return {**values, **changes}


def save_overlays(folder, *, num_worst=8, per_type=2, title="", **shown):
    shown |= {name: np.asarray(shown[name]) for name in ("scores", "labels")}
    return overlays.save_overlays(
        folder, Shown(**shown), num_worst=num_worst, per_type=per_type, title=title
    )


def lowest_defects(folder, **shown):
    return imread(save_overlays(folder, num_worst=2, per_type=1, **shown)[1])


def panel(sheet, line, column):
    top = HEADER + TITLE + line * (S + TITLE + GAP)
    left = GAP + column * (S + GAP)
    return sheet[top : top + S, left : left + S, :3].astype(int)


def test_sheets_have_the_right_sizes(tmp_path):
    paths = save_overlays(tmp_path / "bottle-seed0", num_worst=4, per_type=2, **subject())
    assert [path.stem for path in paths] == ["highest_normals", "lowest_defects", "samples"]
    assert sorted(tmp_path.rglob("*.*")) == sorted(paths)
    for path, lines in zip(paths, (4, 4, 6), strict=True):
        height, width = HEADER + lines * (TITLE + S + GAP), GAP + 4 * (S + GAP)
        assert imread(path).shape[:2] == (height, width)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        *(((28, 28), (252, 252)), ((64, 64), (256, 256)), ((224, 224), (224, 224))),
        *(((700, 700), (256, 256)), ((100, 200), (100, 200))),
    ],
)
def test_panels_are_of_a_size_to_look_at(tmp_path, size, shown):
    values = subject(1, 0, anomaly_maps=torch.rand(1, *size), masks=None, threshold=None)
    values["images"] = lambda _: np.zeros((*size, 3), dtype=np.uint8)
    height, width = HEADER + TITLE + shown[0] + GAP, GAP + 4 * (shown[1] + GAP)
    assert imread(save_overlays(tmp_path, **values)[0]).shape[:2] == (height, width)


def test_the_planted_spot_is_hot_and_the_rest_is_cold(tmp_path):
    sheet = lowest_defects(tmp_path, **subject())
    image, truth, heat, overlay = (panel(sheet, 0, column) for column in range(4))
    assert (image == 90).all()
    top, bottom = (255 * np.array(mpl.colormaps["inferno"](end)[:3]) for end in (1.0, 0.0))
    assert np.abs(heat[HOT] - top).max() <= 1
    cold = np.ones((S, S), dtype=bool)
    cold[HOT] = False
    assert np.abs(heat[cold] - bottom).mean() < 10
    # The overlay mixes both at the spot and leaves cold places nearly as they were.
    inner = (slice(45, 55), slice(106, 124))
    assert np.abs(overlay[inner] - (0.25 * 90 + 0.75 * top)).max() <= 1.5
    assert np.abs(overlay[cold & (heat.sum(-1) < 30)] - 90).mean() < 5
    assert (truth[inner] == 90).all()


def test_a_reconstruction_stands_beside_the_map_over_the_image(tmp_path):
    made = lambda place: np.full((S, S, 3), 10 * place, dtype=np.uint8)  # noqa: E731
    parts = {"part_names": ["coarse"], "parts": lambda _: [np.ones((S, S), dtype=np.float32)]}
    sheet = lowest_defects(tmp_path, **subject(2, 2), reconstruction=made, **parts)
    assert sheet.shape[1] == GAP + 6 * (S + GAP)
    assert (panel(sheet, 0, 4) == 20).all()  # images 2 and 3 are the defects
    assert (panel(sheet, 1, 4) == 30).all()
    assert len(np.unique(panel(sheet, 0, 5))) > 1  # the part's map keeps the last column


@pytest.mark.parametrize("grey", [0, 255])
def test_contours_run_along_the_spot_on_dark_and_bright_images(tmp_path, grey):
    sheet = lowest_defects(tmp_path, **subject(grey=grey))
    rim = np.zeros((S, S), dtype=bool)
    rim[36:64, 96:134] = True
    rim[44:56, 104:126] = False
    for column, colour in ((1, (0, 229, 255)), (3, (255, 255, 255))):
        drawn = panel(sheet, 0, column)
        line = np.abs(drawn - colour).max(-1) < 40
        dark = drawn.max(-1) < 60
        for drawing in (line, dark):
            across, along = drawing[46:54], drawing[:, 110:120]
            for side in (along[36:44], along[56:64], across[:, 96:104], across[:, 126:134]):
                assert side.any()
        if column == 1:
            assert (drawn[~rim] == grey).all()


def test_contour_is_closed_where_the_mask_touches_the_border(tmp_path):
    values = subject(1, 2)
    values["masks"][:] = False
    values["masks"][1:, :, :50] = True
    truth = panel(lowest_defects(tmp_path, **values), 0, 1)
    cyan = np.abs(truth - (0, 229, 255)).max(-1) < 60
    for side in (cyan[90:100, :4], cyan[90:100, 47:53], cyan[:4, 20:30], cyan[S - 4 :, 20:30]):
        assert side.any()


def test_without_a_threshold_or_a_mask_no_contour_is_drawn(tmp_path):
    sheet = lowest_defects(tmp_path, **subject(threshold=None, masks=None))
    overlay, truth = panel(sheet, 0, 3), panel(sheet, 0, 1)
    assert overlay[30:35].max() < 110
    assert np.abs(overlay[38:40, 95:135] - 90).max() < 60  # no white, no black line around the spot
    assert (truth[:60] == 225).all()
    assert truth[S // 2 - 10 : S // 2 + 10].min() < 100  # "no mask"


def test_an_empty_mask_of_a_defect_is_pointed_out(tmp_path):
    values = subject(1, 2)
    values["masks"][1] = False
    sheet = lowest_defects(tmp_path, **values)
    assert (panel(sheet, 0, 1)[:24] == 255).any()
    assert (panel(sheet, 1, 1)[:24] == 90).all()


def test_text_and_colour_bar_are_drawn(tmp_path):
    plain, titled = (
        imread(save_overlays(tmp_path, title=title, **subject())[0])[..., :3]
        for title in ("", "bottle, seed 0")
    )
    assert (titled[:28] < 128).sum() > (plain[:28] < 128).sum() > 100
    for line in range(6):
        top = HEADER + line * (TITLE + S + GAP)
        assert (titled[top : top + TITLE, :200] < 128).any()  # name
        assert (titled[top : top + TITLE, -140:-GAP] < 128).any()  # score and rank
        assert (titled[top : top + TITLE, -GAP + 2 :] == 255).all()  # nothing is cut
    bar = titled[42, GAP + 2 * (S + GAP) : -GAP].astype(int)
    ends = 255 * np.array(mpl.colormaps["inferno"]([0.0, 1.0]))[:, :3]
    assert np.abs(bar[[0, -1]] - ends).max() <= 1
    assert (titled[52:64, GAP + 2 * (S + GAP) : -GAP] < 128).any()


def test_worst_first(tmp_path):
    drawn = []
    values = subject(images=lambda i: drawn.append(i) or np.zeros((S, S, 3), dtype=np.uint8))
    values["scores"] = [3.0, 5.0, 1.0, 4.0, 0.0, 2.0, 9.0, 7.0, 8.0, 6.0, 11.0, 10.0]
    save_overlays(tmp_path, num_worst=3, per_type=1, **values)
    assert drawn[:3] == [1, 3, 0]
    assert drawn[3:6] == [9, 7, 8]
    assert [values["defects"][place] for place in drawn[6:]] == ["good", "hole", "scratch"]


def test_sample_takes_every_type_and_does_not_depend_on_scores(tmp_path):
    drawn = []
    values = subject(4, 6, images=lambda i: drawn.append(i) or np.zeros((S, S, 3), dtype=np.uint8))
    for scores in (range(10), range(10, 0, -1)):
        save_overlays(tmp_path, num_worst=0, per_type=2, **{**values, "scores": list(scores)})
    assert drawn == [0, 3, 4, 8, 5, 9] * 2


def test_sample_of_many_types_stays_a_picture(tmp_path):
    types, drawn = MAX_LINES + 5, []
    defects = [f"{place % types:03d}" for place in range(2 * types)]
    values = subject(0, 2 * types, size=64, masks=None, defects=defects)
    values["images"] = lambda i: drawn.append(i) or np.zeros((2, 256, 3), dtype=np.uint8)
    values["anomaly_maps"] = torch.rand(2 * types, 2, 256)
    save_overlays(tmp_path, num_worst=0, **values)
    assert drawn == list(range(MAX_LINES))


def test_sheets_without_images_are_not_written(tmp_path):
    paths = save_overlays(tmp_path, **subject(3, 0))
    assert [path.name for path in paths] == ["highest_normals.png", "samples.png"]


def test_odd_names_raise_no_warning_and_stay_inside(tmp_path):
    names = ["裂纹/中文.png", "$x^$_{y}$.png", "x" * 400, "a\nb\tc.png", "\udcff.png", "e\u0301🎉"]
    values = subject(3, 3, defects=["good"] * 3 + ["孔", "y" * 400, "$"], names=names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save_overlays(tmp_path, title="裂" * 200, **values)
    for path in paths:
        sheet = imread(path)[..., :3]
        assert (sheet[:, -GAP + 2 :] == 255).all()
        assert (sheet[:, : GAP - 2] == 255).all()
        assert (sheet[HEADER : HEADER + TITLE, :S] < 128).any()


def test_colour_limits_are_robust():
    maps = torch.zeros(10, 100, 100)
    maps[:5] = torch.linspace(1, 3, 100)  # normals: median 2
    maps[5:] = 4.0
    maps[0, 0, 0] = 1e9
    labels = np.array([0] * 5 + [1] * 5)
    low, high = colour_limits(maps, labels)
    assert low == pytest.approx(2.0, abs=0.02)
    assert high == 4.0
    low, high = colour_limits(torch.full((2, 4, 4), 7.0), np.array([1, 1]))
    assert low == 7.0
    assert high > low


def test_constant_maps_can_be_drawn(tmp_path):
    values = subject(1, 2, anomaly_maps=torch.full((3, S, S), 3.0), threshold=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(save_overlays(tmp_path, **values)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, "lengths"),
        ({"masks": torch.zeros(12, 5, 5)}, "masks"),
        ({"images": lambda _: np.zeros((5, 5, 3), dtype=np.uint8)}, "test/005.png"),
        ({"images": lambda _: np.zeros((S, S, 3))}, "float64"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_overlays(tmp_path, **subject(**change))
    assert not list(tmp_path.rglob("*.*"))


def test_a_sheet_is_quick(tmp_path):
    values = subject(8, 8, size=224)
    start = time.process_time()
    paths = save_overlays(tmp_path, **values)
    assert (time.process_time() - start) / len(paths) < 2.0
