"""The figures of the closed form and of label-free selection."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from figures import closed_form_proof, selection_curve
from figures.shared.run_log import read_runs
from tests.scripts.runs import refusal
from utils.errors import RunError
from utils.runs.run import Run

TIMES = (10.0, 100.0, 1000.0)
AUROCS = {1: (0.6, 0.7, 0.5), 8: (0.65, 0.9, 0.8)}  # by prototypes


def make_run(folder, *, monitored=False, chosen=(8, 100.0), epochs=False, seeds=(0,), grid=AUROCS):
    """A run that selected on synthetic anomalies, over times or, without them, epochs."""
    name = "noco" if epochs else "noco_exact"
    config = {"dataset": "demo", "method_name": name, "method": {"prototypes": 1}}
    categories = ("brick", "grass")
    run = Run.open(folder, config, categories=categories, seeds=seeds, command=["x"], device="cpu")
    for category, seed in itertools.product(categories, seeds):
        for prototypes, aurocs in grid.items():
            for step, (time, auroc) in enumerate(zip(TIMES, aurocs, strict=True), start=1):
                values = {"step": step, "options": {"prototypes": prototypes}}
                values |= {} if epochs else {"time": time}
                if monitored:
                    pixel = None if category == "grass" else 0.0
                    values |= {"test_image_auroc": auroc / 2, "test_pixel_auroc": pixel}
                auroc += seed / 100
                run.log(category, seed, event="selection", synthetic_auroc=auroc, **values)
        if chosen:
            stop = {"epochs": 2} if epochs else {"time": [chosen[1]]}
            run.log(category, seed, event="chosen", options={"prototypes": chosen[0], **stop})
    return folder


def drawn(*folders):
    return selection_curve.draw(read_runs(folders))


def stars(axes):
    return [
        (*np.ravel(line.get_data()).tolist(), to_hex(line.get_color()))
        for line in axes.lines
        if line.get_marker() == "*"
    ]


def test_proof_draws_what_it_compares(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(closed_form_proof, "STEPS", (10, 300, 5000))
    paths = closed_form_proof.main(["--out", str(tmp_path / "made/proof.png")])
    assert paths == [tmp_path / "made/proof.png", tmp_path / "made/proof.pdf"]
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in paths)
    picture = np.array(Image.open(paths[0]).convert("L"))
    assert picture.min() < 100
    assert (picture == 255).mean() > 0.3
    axes = closed_form_proof.draw().axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata())]
    assert len(lines) == 2 * len(closed_form_proof.NORMS)
    for closed, trained in zip(lines[::2], lines[1::2], strict=True):
        np.testing.assert_allclose(trained.get_xdata(), [0.01, 0.3, 5.0])
        at_dots = np.interp(trained.get_xdata(), *closed.get_data())
        np.testing.assert_allclose(trained.get_ydata(), at_dots, rtol=2e-3)
        assert (np.diff(trained.get_ydata()) < 0).all()
    error = float(axes.get_title().rpartition(" ")[2])
    assert 1e-8 < error < 1e-3
    worst = max(closed_form_proof.compare(norm).error for norm in closed_form_proof.NORMS)
    assert error == pytest.approx(worst, rel=0.1)


def test_proof_shows_a_step_that_is_too_large(monkeypatch):
    monkeypatch.setattr(closed_form_proof, "STEPS", (1, 10, 20))
    monkeypatch.setattr(closed_form_proof, "STEP", 0.5)
    assert closed_form_proof.compare(1.0).error > 0.01


def test_selection_curve_has_a_colour_for_each_point_of_the_grid(tmp_path):
    figure = drawn(make_run(tmp_path / "run"))
    assert [axes.get_title() for axes in figure.axes] == ["brick\nnoco_exact", "grass\nnoco_exact"]
    first, second = selection_curve.GRID_COLOURS[:2]
    for axes in figure.axes:
        one, eight = (line for line in axes.lines if line.get_marker() == "o")
        np.testing.assert_allclose(one.get_xdata(), TIMES)
        np.testing.assert_allclose(one.get_ydata(), [60, 70, 50])
        np.testing.assert_allclose(eight.get_ydata(), [65, 90, 80])
        assert (one.get_color(), eight.get_color()) == (first, second)
        assert stars(axes) == [(100.0, 90.0, second.lower())]
        assert axes.get_xscale() == "log"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "synthetic anomalies, prototypes 1",
        "synthetic anomalies, prototypes 8",
        "chosen",
    ]


def test_the_test_set_is_dashed_and_named_as_shown_afterwards(tmp_path):
    figure = drawn(make_run(tmp_path / "run", monitored=True, grid={8: AUROCS[8]}))
    brick, grass = figure.axes
    for axes, others in ((brick, [[0] * 3]), (grass, [])):  # of pixels; undefined for grass
        dashed = [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"]
        np.testing.assert_allclose(dashed, [[32.5, 45, 40], *others])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text for text in texts if "test" in text] == [
        f"{kind} AUROC, test (shown afterwards, chose nothing), prototypes 8"
        for kind in ("image", "pixel")
    ]


def test_epochs_are_steps_on_a_plain_axis(tmp_path):
    axes = drawn(make_run(tmp_path / "run", epochs=True)).axes[0]
    assert axes.get_xlabel() == "epoch"
    assert axes.get_xscale() == "linear"
    assert stars(axes)[0][:2] == (2.0, 90.0)


def test_the_first_seed_is_shown(tmp_path):
    axes = drawn(make_run(tmp_path / "run", seeds=(3, 1))).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [61, 71, 51])
    assert stars(axes)[0][1] == pytest.approx(91)


def test_a_run_that_is_still_selecting_has_no_star(tmp_path):
    figure = drawn(make_run(tmp_path / "run", chosen=None))
    assert not stars(figure.axes[0])


def test_command_writes_png_and_pdf(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    paths = selection_curve.main([str(folder), "--out", str(tmp_path / "made/here")])
    assert paths == [tmp_path / "made/here.png", tmp_path / "made/here.pdf"]
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in paths)
    assert np.array(Image.open(paths[0]).convert("L")).min() < 100


def test_a_run_without_a_selection_is_refused(tmp_path, capsys):
    folder = make_run(tmp_path / "run", grid={}, chosen=None)
    line = {"category": "brick", "seed": 0, "event": "step", "step": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    message = refusal(capsys, selection_curve.main, folder, "--out", tmp_path / "x")
    assert "was it run with --select synthetic?" in message


def test_more_grid_points_than_colours_are_refused(tmp_path):
    grid = dict.fromkeys(range(1, 10), AUROCS[1])
    with pytest.raises(RunError, match="has 9 points; at most 8"):
        drawn(make_run(tmp_path / "run", grid=grid))
