"""Norm and angle of test images, from a small run folder."""

import csv
import math

import numpy as np
import pytest
from matplotlib.patches import Arc
from PIL import Image

from figures import figure3
from utils.errors import RunError
from utils.runs.run import Run
from utils.runs.scores import TestScores

LABELS = np.array([0, 0, 1, 1])
NORMS = np.array([1.0, 1.2, 2.0, 4.0], dtype=np.float32)
ANGLES = np.radians(np.array([0.0, 10.0, 90.0, 5.0], dtype=np.float32))


def make_run(folder, *, norm=1.0, categories=("frog",), select="last", labels=LABELS, **geometry):
    config = {"dataset": "cifar10", "method_name": "noco", "method": {"norm": norm}}
    config |= {"select": select, "protocol": "one-vs-rest"}
    run = Run.open(folder, config, categories=categories, seeds=[0, 3], command=["x"], device="cpu")
    for category in categories:
        for seed in (3, 0):
            run.save_scores(
                category,
                seed,
                TestScores(
                    paths=[str(i) for i in range(len(labels))],
                    labels=labels,
                    scores=np.arange(len(labels)),
                    defects=["x"] * len(labels),
                    **geometry,
                ),
            )
            row = {"category": category, "seed": seed, "image_auroc": 0.9, "pixel_auroc": math.nan}
            selects = ["last", "best_test"] if select == "best_test" else [select]
            lines = [
                row | {"select": s, "image_auroc": 0.8 + i / 10} for i, s in enumerate(selects)
            ]
            run.finish({(category, seed): lines})
    return Run.read(folder)


@pytest.fixture
def recorded(tmp_path):
    return make_run(tmp_path / "one", norms=NORMS, angles=ANGLES)


def test_table_has_medians_and_what_angle_and_norm_tell_alone(recorded):
    row = figure3.read_panel(recorded, "frog").row()
    assert row.label == "cifar10"
    values = [cell.mean if cell.text is None else cell.text for cell in row.cells]
    assert values[:4] == ["frog", 0, 1.0, "last"]
    expected = [80.0, 1.1, 3.0, 5.0, 47.5, 75.0, 100.0]
    # Angles: 90 is above both normal ones, 5 above one of them; norms: all above.
    np.testing.assert_allclose(values[4:], expected, rtol=1e-5)


def test_best_on_test_is_the_one_reported_and_says_so(tmp_path):
    run = make_run(tmp_path, select="best_test", norms=NORMS, angles=ANGLES)
    panel = figure3.read_panel(run, "frog", 3)
    assert (panel.select, panel.seed, panel.auroc) == ("best_test", 3, pytest.approx(90.0))
    (axes,) = figure3.draw([[panel]]).axes
    assert "seed 3\nnorm of G 1, image AUROC 90.0 %\nbest on test" in axes.get_title()


def test_points_are_where_norm_and_angle_put_them(recorded):
    (axes,) = figure3.draw([[figure3.read_panel(recorded, "frog")]]).axes
    (points,) = axes.collections
    found = np.array(points.get_offsets())
    radians = ANGLES.astype(np.float64)
    expected = np.stack([NORMS * np.cos(radians), NORMS * np.sin(radians)], axis=1)
    order = [int(np.argmin(np.abs(expected - point).sum(axis=1))) for point in found]
    np.testing.assert_allclose(found, expected[order], atol=1e-6)
    assert sorted(order) == [0, 1, 2, 3]
    colours = [tuple(colour) for colour in points.get_facecolors()]
    assert [colours[order.index(0)] == colours[order.index(i)] for i in range(4)] == [
        True, True, False, False,
    ]  # fmt: skip
    dashed = [arc for arc in axes.patches if isinstance(arc, Arc) and arc.get_linestyle() == "--"]
    assert [arc.width for arc in dashed] == [2.0]  # of radius 1, the norm of G
    assert axes.get_xlim()[1] > 4


def test_many_images_are_thinned_evenly_and_it_is_said(tmp_path):
    labels = np.repeat([0, 1], [1000, 30])
    values = np.ones(1030, dtype=np.float32)
    run = make_run(tmp_path, labels=labels, norms=values, angles=values)
    panel = figure3.read_panel(run, "frog")
    kept = np.sort(figure3._thinned(labels))
    assert np.bincount(labels[kept]).tolist() == [figure3.MAX_POINTS, 30]
    steps = np.diff(kept[: figure3.MAX_POINTS])
    assert (kept[0], kept[figure3.MAX_POINTS - 1]) == (0, 999)
    assert set(steps) <= {2, 3}
    figure = figure3.draw([[panel]])
    assert len(figure.axes[0].collections[0].get_offsets()) == figure3.MAX_POINTS + 30
    assert "evenly spaced" in figure.legends[0].get_title().get_text()


def test_a_column_for_each_run_and_a_row_for_each_category(tmp_path, capsys):
    both = ("frog", "cat")
    given = {"categories": both, "norms": NORMS, "angles": ANGLES}
    folders = [make_run(tmp_path / str(n), norm=n, **given).folder for n in (1.0, 32.0)]
    out = tmp_path / "made/f3"
    paths = figure3.main([*map(str, folders), "--category", "cat", "frog", "--out", str(out)])
    assert [path.suffix for path in paths] == [".png", ".pdf", ".md", ".csv"]
    assert np.array(Image.open(paths[0]).convert("L")).min() < 100
    assert paths[2].read_text() in capsys.readouterr().out
    rows = list(csv.DictReader(paths[3].read_text().splitlines()))
    found = [(row["category"], row["norm_of_g"]) for row in rows]
    assert found == [("cat", "1.0"), ("cat", "32.0"), ("frog", "1.0"), ("frog", "32.0")]
    # Without --category: the first of the first run.
    paths = figure3.main([str(folders[0]), "--out", str(out)])
    (row,) = csv.DictReader(paths[3].read_text().splitlines())
    assert (row["category"], row["seed"]) == ("frog", "0")


def test_what_cannot_be_drawn_is_said(tmp_path, recorded, capsys):
    without = make_run(tmp_path / "closed form")
    with pytest.raises(RunError, match=r"frog-seed0.npz holds no norm and angle: only .*noco"):
        figure3.read_panel(without, "frog")
    with pytest.raises(RunError, match=r"'cat', seed 0 is not finished \(categories: frog\)"):
        figure3.read_panel(recorded, "cat")
    with pytest.raises(SystemExit):
        figure3.main([str(recorded.folder), "--seed", "9", "--out", str(tmp_path / "x")])
    assert "seed 9 is not finished" in capsys.readouterr().err
