import functools
import itertools
import json
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from figures import adaptor_std, instability, loss_curve
from figures.shared.drawing import grid_rows, save_figure, style
from figures.shared.run_log import options_without_effect, read_runs
from tests.scripts.runs import refusal
from utils.errors import RunError
from utils.runs.run import Run

AUROCS = {0: [0.6, 0.9, 0.7], 1: [0.5, 0.4, 0.8]}
"""Of each seed, after each epoch."""


def make_run(
    folder,
    *,
    method="nc_disc",
    categories=("brick", "grass"),
    monitored=True,
    chosen=None,
    diagnostics=True,
    **options,
):
    """A finished run; losses are 1 / epoch + seed / 10.

    With `chosen` it is one of --select synthetic that chose that epoch.
    """
    options = {"loss": "truncated_l1", "threshold": 0.5, "sigma": 0.015, "norm": 1.0, **options}
    config = {"dataset": "demo", "method_name": method, "backbone": "lite0", "method": options}
    select = "last" if chosen is None else "synthetic"
    config |= {"select": select, "monitor_test": monitored}
    run = Run.open(
        folder, config, categories=categories, seeds=sorted(AUROCS), command=["x"], device="cpu"
    )
    for category, (seed, aurocs) in itertools.product(categories, AUROCS.items()):
        log = functools.partial(run.log, category, seed)
        if chosen is not None:
            for sigma in (0.1, 0.2):
                for step, auroc in enumerate(aurocs, start=1):
                    values = {"test_image_auroc": auroc - sigma} if monitored else {}
                    values |= {"options": {"sigma": sigma}, "synthetic_auroc": 0.5}
                    log(event="selection", step=step, **values)
            log(event="chosen", options={"sigma": 0.2, "epochs": chosen})
        for step, auroc in enumerate(aurocs[:chosen], start=1):
            values = {"image_auroc": auroc, "pixel_auroc": auroc / 2} if monitored else {}
            log(event="step", step=step, loss=1 / step + seed / 10, **values)
        if diagnostics:
            spread = {"feature_std": [1.0, 2.0, 4.0], "adapted_std": [0.0, 0.02, 0.01]}
            log(event="diagnostics", **spread)
        auroc = aurocs[-1] if chosen is None else 0.77
        row = {"category": category, "seed": seed, "select": select, "step": chosen or 3}
        run.finish({(category, seed): [{**row, "image_auroc": auroc, "pixel_auroc": auroc / 2}]})
    return folder


def visible(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def marks(axes):
    """(x, y, colour) of the single points of a panel, by marker."""
    found = {}
    for line in axes.lines:
        if line.get_linestyle() == "None":
            (x,), (y,) = line.get_data()
            colour = to_hex(line.get_markerfacecolor()).upper()
            found.setdefault(line.get_marker(), []).append((int(x), round(float(y), 6), colour))
    return found


@pytest.mark.parametrize("figure", [loss_curve, instability, adaptor_std])
def test_command_writes_png_and_pdf(tmp_path, capsys, figure):
    folder = make_run(tmp_path / "run")
    paths = figure.main([str(folder), "--out", str(tmp_path / "made/here")])
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in paths)
    picture = np.array(Image.open(paths[0]).convert("L"))
    assert picture.min() < 100  # something is drawn
    assert (picture == 255).mean() > 0.3
    assert paths[1].read_bytes().startswith(b"%PDF")


def test_a_figure_has_the_same_bytes_again_whatever_the_name_is(tmp_path):
    runs = read_runs([make_run(tmp_path / "run")])
    written = {}
    for name in ("a", "b.png", "c.pdf", "d.v1"):  # only .png and .pdf count as suffixes
        png, pdf = save_figure(loss_curve.draw(runs), tmp_path / "made" / name)
        written[png.name, pdf.name] = png.read_bytes(), pdf.read_bytes()
    stems = ("a", "b", "c", "d.v1")
    assert list(written) == [(f"{stem}.png", f"{stem}.pdf") for stem in stems]
    assert len(list((tmp_path / "made").iterdir())) == 2 * len(stems)
    assert len(set(written.values())) == 1


def test_loss_curve_of_one_run_has_a_colour_for_each_category(tmp_path):
    axes = loss_curve.draw(read_runs([make_run(tmp_path / "run")])).axes[0]
    curves = {}
    for line in axes.lines[:-1]:
        curves.setdefault(line.get_color(), []).append(line.get_ydata())
    assert list(curves) == [style(0)["color"], style(1)["color"]]
    for seed0, seed1, mean in curves.values():
        np.testing.assert_allclose(seed0, [1, 1 / 2, 1 / 3])
        np.testing.assert_allclose(seed1, [1.1, 0.6, 1 / 3 + 0.1])
        np.testing.assert_allclose(mean, (np.array(seed0) + seed1) / 2)
    labels = [line.get_label() for line in axes.lines if line.get_label()[0] != "_"]
    assert labels == ["brick (mean of 2)", "grass (mean of 2)", "always answering 0: loss 1"]
    assert axes.get_title() == "demo, nc_disc"


def test_loss_curve_of_several_runs_has_a_colour_for_each_run(tmp_path):
    folders = [
        make_run(tmp_path / "a", sigma=0.015),
        make_run(tmp_path / "b", sigma=0.05, loss="cross_entropy"),
        make_run(tmp_path / "c", method="noco", loss="distance"),
    ]
    axes = loss_curve.draw(read_runs(folders), log=True).axes[0]
    labels = [line.get_label() for line in axes.lines if line.get_label()[0] != "_"]
    assert labels == [
        "nc_disc, loss truncated_l1, sigma 0.015 (mean of 4)",
        "nc_disc, loss cross_entropy, sigma 0.05 (mean of 4)",
        "noco (mean of 4)",
        "always answering 0: loss 1",
        "always answering 0: loss 1.39",
    ]
    assert axes.get_yscale() == "log"


def test_trivial_loss():
    assert loss_curve.trivial_loss({"method": {"loss": "truncated_l1", "threshold": 0.3}}) == 0.6
    entropy = loss_curve.trivial_loss({"method": {"loss": "cross_entropy"}})
    assert entropy == pytest.approx(2 * math.log(2))
    assert loss_curve.trivial_loss({"method": {"loss": "distance"}}) is None


def drawn(folders, **options):
    same_but = options_without_effect() | {"select"}
    return instability.draw(read_runs(folders, same_but=same_but), **options)


def test_instability_marks_what_each_selection_takes(tmp_path):
    figure = drawn([make_run(tmp_path / "last"), make_run(tmp_path / "synthetic", chosen=2)])
    panels = visible(figure)
    assert [axes.get_title() for axes in panels] == ["brick\nnc_disc", "grass\nnc_disc"]
    seed0, seed1 = style(0)["color"], style(1)["color"]
    for axes in panels:
        lines = [line for line in axes.lines if line.get_linestyle() != "None"]
        np.testing.assert_allclose(lines[0].get_ydata(), [60, 90, 70])
        np.testing.assert_allclose(lines[1].get_ydata(), [50, 40, 80])
        assert marks(axes) == {
            "o": [(3, 70.0, seed0), (3, 80.0, seed1)],
            "*": [(2, 90.0, seed0), (3, 80.0, seed1)],
            "s": [(2, 77.0, seed0), (2, 77.0, seed1)],
        }
        assert axes.get_xlabel() == "epoch\nmean: last 75.0, synthetic 77.0, best 85.0"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["seed 0", "seed 1", "last", "synthetic", "best on test (optimistic)"]


def test_instability_of_a_selecting_run_alone_shows_its_selection(tmp_path):
    axes = visible(drawn([make_run(tmp_path / "run", chosen=2)]))[0]
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    np.testing.assert_allclose(lines[0].get_ydata(), [40, 70, 50])  # of sigma 0.2, the chosen one
    assert marks(axes)["s"][0][:2] == (2, 77.0)
    assert "some normals held out" in axes.get_xlabel()


def test_instability_without_synthetic_selection_says_nothing_of_it(tmp_path):
    figure = drawn([make_run(tmp_path / "run")], metric="pixel_auroc")
    axes = visible(figure)[0]
    assert set(marks(axes)) == {"o", "*"}
    assert marks(axes)["*"][0][:2] == (2, 45.0)
    assert axes.get_ylabel() == "pixel AUROC, %"
    assert "synthetic" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_instability_has_a_row_for_each_configuration(tmp_path):
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", categories=("x", "y", "z"), sigma=0.5),
    ]
    figure = drawn(folders)
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in visible(figure)] == [
        *(f"{category}\nnc_disc, sigma 0.015" for category in ("brick", "grass")),
        *(f"{category}\nnc_disc, sigma 0.5" for category in ("x", "y", "z")),
    ]


def test_instability_keeps_folders_of_images_apart(tmp_path, monkeypatch):
    """Two folders may have a category of one name: its fits are not those of one data set."""
    folders = [make_run(tmp_path / name) for name in ("a", "b")]
    for number, folder in enumerate(folders):
        config = json.loads((folder / "config.json").read_text())
        config |= {"dataset": "folder", "data_root": f"images/{number}", "overlays": number}
        (folder / "config.json").write_text(json.dumps(config))
    figures = []
    monkeypatch.setattr(instability, "save_figure", lambda figure, _: figures.append(figure) or [])
    instability.main([*map(str, folders)])
    titles = [axes.get_title() for axes in visible(figures[0])]
    assert len(titles) == len(set(titles)) == 4


@pytest.mark.parametrize("chosen", [None, 2])
def test_instability_names_the_way_to_a_run_that_has_it(tmp_path, capsys, chosen):
    folder = make_run(tmp_path / "run", monitored=False, chosen=chosen)
    message = refusal(capsys, instability.main, folder, "--out", tmp_path / "x")
    assert str(folder) in message
    assert "--monitor-test" in message
    assert not (tmp_path / "x.png").exists()


def test_adaptor_std_pools_the_seeds_and_shows_every_channel(tmp_path):
    runs = read_runs([make_run(tmp_path / "run")])
    spread = adaptor_std.spreads_of(runs[0])
    assert list(spread) == ["brick", "grass"]
    assert spread["brick"]["feature_std"].tolist() == [1.0, 2.0, 4.0] * 2
    figure = adaptor_std.draw(runs)
    for axes in visible(figure):
        assert axes.get_xscale() == "log"
        heights = [patch.get_path().vertices[:, 1].max() for patch in axes.patches]
        # The channel that never varies shares the lowest bin with the one of 0.01.
        assert heights == pytest.approx([100 / 3, 200 / 3])
        assert "median: before 2, after 0.01" in axes.get_xlabel()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["before the adaptor", "after the adaptor"]


def test_adaptor_std_refuses_a_run_without_an_adaptor(tmp_path):
    runs = read_runs([make_run(tmp_path / "run", diagnostics=False)])
    with pytest.raises(RunError, match="no standard deviations were logged"):
        adaptor_std.draw(runs)


def test_loss_curve_refuses_a_run_without_losses(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["event"] != "step"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    with pytest.raises(RunError, match="no training loss was logged"):
        loss_curve.draw(read_runs([folder]))


def test_a_log_that_is_being_written_is_read_to_its_last_whole_line(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"category": "brick", "se')
    (run,) = read_runs([folder])
    assert run.curves("loss")["brick", 0] == ([1, 2, 3], [1.0, 0.5, 1 / 3])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl: corrupt \(line \d+ is not JSON\)"):
        read_runs([folder])


def test_values_that_json_cannot_hold_come_back(tmp_path):
    folder = make_run(tmp_path / "run", categories=("x",), monitored=False)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, loss in ((4, "Infinity"), (5, None)):
            value = "inf" if loss else None
            line = {"category": "x", "seed": 0, "event": "step", "step": step, "loss": value}
            file.write(json.dumps(line) + "\n")
    (run,) = read_runs([folder])
    assert run.curves("loss")["x", 0] == ([1, 2, 3, 4], [1.0, 0.5, 1 / 3, math.inf])
    assert run.curves("image_auroc") == {}


def test_runs_of_one_configuration_are_told_apart_by_their_folder(tmp_path):
    labels = [run.label for run in read_runs([make_run(tmp_path / n) for n in ("a", "b")])]
    assert labels == ["nc_disc (a)", "nc_disc (b)"]


@pytest.mark.parametrize(
    ("sizes", "rows", "columns", "last"),
    [([2], 1, 2, (0, 1)), ([15], 3, 5, (2, 4)), ([7, 3], 3, 5, (2, 2)), ([2, 1], 2, 2, (1, 0))],
)
def test_each_group_of_panels_starts_a_row(sizes, rows, columns, last):
    assert grid_rows([["x"] * size for size in sizes])[:2] == (rows, columns)
    places = grid_rows([["x"] * size for size in sizes])[2]
    assert [len(group) for group in places] == sizes
    assert all(group[0][1] == 0 for group in places)
    assert places[-1][-1] == last
    assert len({place for group in places for place in group}) == sum(sizes)


def test_groups_of_one_panel_share_rows():
    rows, columns, places = grid_rows([["x"]] * 7)
    assert (rows, columns) == (2, 5)
    assert places[4:6] == [[(0, 4)], [(1, 0)]]


def test_styles_differ():
    assert len({tuple(style(i).values()) for i in range(24)}) == 24
