"""Anomaly maps over categories, from small run folders."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from figures import heatmaps
from utils.errors import RunError
from utils.runs.run import Run
from utils.runs.scores import TestScores

SIZE = 16
GOOD, HOLE, SCRATCH = "good", "hole", "scratch"
DEFECTS = [GOOD, GOOD, HOLE, HOLE, HOLE, HOLE, SCRATCH]
SCORES = [0.1, 0.2, 0.9, 0.5, 0.7, 0.6, 0.3]


def paint(folder, number):
    """An image whose left half tells its number."""
    path = folder / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :20] = 30 * number
    pixels[:, 20:, 1] = 200
    Image.fromarray(pixels).save(path)
    return path


def make_run(
    tmp_path, name="run", *, maps=True, masks=True, rebuilt=None, categories=("wood",), **changes
):
    """A run on seven 40 x 20 images a category; each map is hottest where its mask is."""
    config = {"dataset": "mvtec", "method_name": "noco", "select": "last", "method": {"norm": 1}}
    config |= {"image_size": SIZE, "crop_size": None, "resize": "opencv_square"} | changes
    run = Run.open(
        tmp_path / name, config, categories=categories, seeds=[0], command=["x"], device="cpu"
    )
    for category in categories:
        paths = [paint(tmp_path / "images" / category, i) for i in range(len(DEFECTS))]
        mask = np.zeros((len(DEFECTS), SIZE, SIZE), dtype=bool)
        mask[2:, 4:8, 8:12] = True
        heat = np.linspace(0, 0.05, mask.size, dtype=np.float32).reshape(mask.shape)
        heat[mask] = 1.0
        run.log(category, 0, event="step", step=1)
        scores = TestScores(
            paths=paths, labels=[0, 0, 1, 1, 1, 1, 1], scores=SCORES, defects=DEFECTS,
            maps=heat if maps else None, masks=mask if masks else None, reconstructions=rebuilt,
        )  # fmt: skip
        run.save_scores(category, 0, scores)
        row = {"category": category, "seed": 0, "select": "last", "image_auroc": 1.0}
        run.finish({(category, 0): [row | {"pixel_auroc": math.nan}]})
    return Run.read(tmp_path / name)


def test_the_median_anomaly_is_chosen_with_its_image_mask_and_map(tmp_path):
    (column,) = heatmaps.read_columns([make_run(tmp_path)], None, by_defect=False)
    # Anomalous scores 0.9 0.7 0.6 0.5 0.3: the third of five is image 5.
    assert (column.path, column.rank, column.count) == (
        str(tmp_path / "images/wood/5.png"), 3, 5,
    )  # fmt: skip
    assert (column.category, column.defect) == ("wood", HOLE)
    assert column.image.shape == (SIZE, SIZE, 3)
    assert column.image[8, 2].tolist() == [150, 150, 150]
    assert column.image[8, 13].tolist() == [0, 200, 0]  # the whole image, squeezed
    assert column.mask.sum() == 16
    (level,) = column.levels
    assert (level[column.mask] == 1).all()
    assert (level[~column.mask] < 0.1).all()
    assert level.min() >= 0


def test_each_kind_of_defect_may_have_a_column(tmp_path):
    columns = heatmaps.read_columns([make_run(tmp_path)], 0, by_defect=True)
    # Holes 0.9 0.7 0.6 0.5: of four the lower of the two in the middle.
    found = [(c.defect, c.path[-5:], c.rank, c.count) for c in columns]
    assert found == [(HOLE, "5.png", 3, 4), (SCRATCH, "6.png", 1, 1)]


def test_all_runs_show_the_image_of_the_first(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, "other", method={"norm": 8})]
    (column,) = heatmaps.read_columns(runs, 0, by_defect=False)
    assert len(column.levels) == 2
    figure = heatmaps.draw([column], ["noco, norm 1", "noco, norm 8"])
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == 4  # image, truth, a map for each run
    assert [axes.texts[0].get_text() for axes in pictures] == [
        "image", "truth", "noco\nnorm 1", "noco\nnorm 8",
    ]  # fmt: skip
    assert pictures[0].get_title() == "wood\nhole"
    overlay = pictures[2].images[0].get_array()
    assert not np.allclose(overlay[5, 9], column.image[5, 9] / 255, atol=0.1)  # hot
    np.testing.assert_allclose(overlay[0, 0], column.image[0, 0] / 255, atol=0.1)  # cold
    outline = pictures[1].collections[-1].get_paths()[0].vertices
    np.testing.assert_allclose(
        [outline.min(axis=0), outline.max(axis=0)], [[7.5, 3.5], [11.5, 7.5]]
    )
    assert "median by score of noco, norm 1" in figure.get_supxlabel().replace("\n", " ")


def test_a_reconstruction_stands_below_the_map_of_its_run(tmp_path):
    made = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((SIZE, SIZE, 3), np.uint8)
    runs = [make_run(tmp_path, rebuilt=made), make_run(tmp_path, "other", method={"norm": 8})]
    (column,) = heatmaps.read_columns(runs, 0, by_defect=False)
    assert (column.reconstructions[0] == 5).all()  # the median is image 5
    assert column.reconstructions[1] is None
    figure = heatmaps.draw([column], ["riad", "noco"])
    pictures = [axes for axes in figure.axes if axes.images]
    assert [axes.texts[0].get_text() for axes in pictures] == [
        "image", "truth", "riad", "riad: reconstruction", "noco",
    ]  # fmt: skip
    assert (pictures[3].images[0].get_array() == 5).all()


def test_many_columns_go_on_below(tmp_path):
    (column,) = heatmaps.read_columns([make_run(tmp_path)], 0, by_defect=False)
    figure = heatmaps.draw([column] * (heatmaps.MAX_COLUMNS + 2), ["noco"])
    assert len(figure.axes) == 2 * 3 * heatmaps.MAX_COLUMNS
    assert sum(bool(axes.images) for axes in figure.axes) == 3 * (heatmaps.MAX_COLUMNS + 2)


def test_figure_and_list_of_images_are_written(tmp_path, capsys):
    folder = make_run(tmp_path, categories=("wood", "tile"), masks=False).folder
    paths = heatmaps.main([str(folder), "--out", str(tmp_path / "made/heat")])
    assert [path.name for path in paths] == ["heat.png", "heat.pdf", "heat.md", "heat.csv"]
    assert np.array(Image.open(paths[0]).convert("L")).min() < 100
    text = paths[2].read_text()
    with paths[3].open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["category", "defect", "image", "rank by score"],
        ["wood", "hole", str(tmp_path / "images/wood/5.png"), "3 of 5"],
        ["tile", "hole", str(tmp_path / "images/tile/5.png"), "3 of 5"],
    ]
    assert "median score by noco" in text
    assert text in capsys.readouterr().out


def test_without_masks_it_says_so(tmp_path):
    (column,) = heatmaps.read_columns([make_run(tmp_path, masks=False)], 0, by_defect=False)
    assert column.mask is None
    truth = [axes for axes in heatmaps.draw([column], ["noco"]).axes if axes.images][1]
    assert "no mask" in [text.get_text() for text in truth.texts]


@pytest.mark.parametrize("resize", ["opencv_square", "lanczos_shorter"])
def test_cropped_images_are_cut_as_the_run_did(tmp_path, resize):
    path = paint(tmp_path, 3)  # 40 x 20, halves
    config = {"image_size": 20, "crop_size": 16, "resize": resize}
    shown = heatmaps.read_shown(path, config, 16)
    assert shown.shape == (16, 16, 3)
    left = shown[8, : 8 - 1]  # both crops are centred on the border of the halves
    assert (left == 90).all()
    assert shown[8, 8 + 1 :, 1].min() == 200
    width_of_picture = {"opencv_square": 20, "lanczos_shorter": 40}[resize]
    stripes = np.zeros((20, 40, 3), dtype=np.uint8)
    stripes[:, :10] = 255  # the outer quarter: cut away unless the image is squeezed
    Image.fromarray(stripes).save(path)
    assert bool((heatmaps.read_shown(path, config, 16) > 200).any()) == (width_of_picture == 20)


def test_sixteen_bits_keep_their_high_byte(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 0x8040, dtype=np.uint16)).save(path)
    config = {"image_size": 8, "crop_size": None, "resize": "opencv_square"}
    assert (heatmaps.read_shown(path, config, 8) == 0x80).all()


def test_what_cannot_be_drawn_is_said(tmp_path):
    def error(runs, seed=0):
        with pytest.raises(RunError) as caught:
            heatmaps.read_columns(runs, seed, by_defect=False)
        return str(caught.value)

    run = make_run(tmp_path)
    assert "holds no maps; make the run with --save-maps" in error(
        [make_run(tmp_path, "bare", maps=False)]
    )
    assert "is a semantic run" in error([make_run(tmp_path, "classes", protocol="one-vs-rest")])
    assert "one figure shows one data set" in error(
        [run, make_run(tmp_path, "visa", dataset="visa")]
    )
    assert "no scores of 'wood', seed 7" in error([run], seed=7)
    other = make_run(tmp_path / "elsewhere")
    assert f"{other.folder}: wood, seed 0 has no image" in error([run, other])
    (tmp_path / "images/wood/5.png").write_bytes(b"no image")
    assert f"cannot read the image {tmp_path}" in error([run])
    (tmp_path / "images/wood/5.png").unlink()
    assert "5.png; put it back" in error([run])
    with pytest.raises(RunError, match="no category has an anomalous test image"):
        heatmaps.draw([], ["noco"])


def test_labels_of_the_rows_tell_runs_apart(tmp_path):
    folders = [make_run(tmp_path, f"r{n}", method={"norm": n}).folder for n in (1, 8)]
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps(config | {"overlays": 5}))
    paths = heatmaps.main([*map(str, folders), "--out", str(tmp_path / "h")])
    assert "by noco, norm 1 among" in paths[2].read_text()
