"""Curves over one option: norm, sigma and patch size, from small run folders."""

import math

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from PIL import Image

from figures import norm_sweep, patch_size, sigma_sweep
from figures.shared import option_plots
from figures.shared.option_curves import Curve, Point, Sweep, read_curves
from figures.shared.option_tables import near_best, shared_lines, table_of
from tests.figures.paper_runs import write_run
from utils.errors import RunError
from utils.tables.formats import to_markdown

SWEEP = Sweep(
    module="figures.test",
    option="method.norm",
    symbol="norm",
    axis="norm",
    scale="log2",
    source="A figure.",
    family=lambda config: config["method_name"],
    claim=1.0,
)


def make_run(folder, norm, aurocs, *, select="last", method="noco", pixels=math.nan, **changes):
    """A run with image AUROC `aurocs` {(category, seed): value}."""
    config = {"dataset": "demo", "method_name": method, "layers": [1, 2], "patch_size": 3}
    config |= {"select": select, "method": {"norm": norm} | changes.pop("method_options", {})}
    return write_run(folder, config | changes, aurocs, select=select, pixel_auroc=pixels)


def two_seeds(low, high):
    return {("a", 0): low, ("a", 1): high, ("b", 0): low, ("b", 1): high}


def curve_of(dataset, means, *, label="noco", select="last"):
    points = [Point(v, {("a", 0): {"image_auroc": m / 100, "pixel_auroc": math.nan}})
              for v, m in means.items()]  # fmt: skip
    return Curve(dataset, label, select, points)


def lines_of(text):
    """Lines of a Markdown text, without the spaces that align a table."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_points_are_means_over_categories_then_over_seeds(tmp_path):
    values = {("a", 0): 0.8, ("a", 1): 0.9, ("b", 0): 0.6, ("b", 1): 0.9}
    (curve,) = read_curves([make_run(tmp_path / "x", 4, values)], SWEEP)
    (point,) = curve.points
    assert (point.value, point.seeds) == (4.0, [0, 1])
    assert point.per_seed("image_auroc") == pytest.approx([70.0, 90.0])
    assert point.mean("image_auroc") == pytest.approx(80.0)
    assert point.std("image_auroc") == pytest.approx(200**0.5)
    assert math.isnan(point.mean("pixel_auroc"))


def test_runs_of_other_norms_and_seeds_join_and_ascend(tmp_path):
    folders = [
        make_run(tmp_path / "x", 8, {("a", 0): 0.7, ("a", 1): 0.7}),
        make_run(tmp_path / "y", 0.5, {("a", 0): 0.8}),
        make_run(tmp_path / "z", 0.5, {("a", 1): 0.9}),
        make_run(tmp_path / "again", 0.5, {("a", 0): 0.8}),
    ]
    (curve,) = read_curves(folders, SWEEP)
    assert [(point.value, point.seeds) for point in curve.points] == [(0.5, [0, 1]), (8.0, [0, 1])]
    assert curve.points[0].per_seed("image_auroc") == pytest.approx([80.0, 90.0])


def test_what_another_option_or_selection_changes_is_a_curve_of_its_own(tmp_path):
    folders = [
        make_run(tmp_path / "x", 1, {("a", 0): 0.7}, method_options={"epochs": 5}),
        make_run(tmp_path / "y", 1, {("a", 0): 0.8}, method_options={"epochs": 50}),
        make_run(tmp_path / "z", 1, {("a", 0): 0.9}, method_options={"epochs": 5},
                 select="best_test"),
        make_run(tmp_path / "w", 1, {("a", 0): 0.6}, dataset="digits", method_options={"epochs": 2},
                 overlays=3),
    ]  # fmt: skip
    curves = read_curves(folders, SWEEP)
    assert [(c.dataset, c.name) for c in curves] == [
        ("demo", "noco, epochs 5, last"),
        ("demo", "noco, epochs 5, best on test (optimistic)"),
        ("demo", "noco, epochs 50, last"),
        ("digits", "noco, last"),
    ]


def test_two_results_of_one_pair_are_refused(tmp_path):
    folders = [make_run(tmp_path / f"r{i}", 1, {("a", 0): 0.7 + i / 10}) for i in range(2)]
    with pytest.raises(RunError, match="r1: a, seed 0 differs from another run"):
        read_curves(folders, SWEEP)


def test_points_over_other_categories_are_refused(tmp_path):
    folders = [
        make_run(tmp_path / "x", 1, two_seeds(0.7, 0.8)),
        make_run(tmp_path / "y", 8, {("a", 0): 0.9}),
    ]
    with pytest.raises(RunError, match=r"demo, noco, last: norm 8 has no b, seed 0.*finish"):
        read_curves(folders, SWEEP)


@pytest.mark.parametrize(
    ("norm", "message"), [(None, "norm is null"), ("auto", "norm is"), (0, "logarithmic axis")]
)
def test_a_run_without_the_option_is_refused(tmp_path, norm, message):
    with pytest.raises(RunError, match=message):
        read_curves([make_run(tmp_path / "x", norm, {("a", 0): 0.7})], SWEEP)


def test_a_run_with_nothing_finished_is_refused(tmp_path):
    with pytest.raises(RunError, match="no category is finished"):
        read_curves([make_run(tmp_path, 1, {})], SWEEP)


def test_near_the_best_is_a_point_below_it_at_most():
    curve = curve_of("demo", {0.5: 95.0, 1.0: 95.9, 4.0: 94.8, 32.0: 95.2})
    assert near_best(curve, "image_auroc") == [0.5, 1.0, 32.0]
    assert near_best(curve, "pixel_auroc") == []
    text = to_markdown(table_of([curve], SWEEP))
    near = "- norm within 1 point of the best image AUROC:\n- demo, noco, last: "
    assert f"{near}0.5 to 1, 32 (3 of 4 tested); best 95.9 at 1" in text
    assert "shared" not in text
    assert "pixel" not in text


def test_shared_range_is_over_the_values_all_data_sets_tested():
    demo = curve_of("demo", {0.5: 90.0, 1.0: 89.5, 4.0: 89.2, 8.0: 80.0})
    digits = curve_of("digits", {0.5: 70.0, 1.0: 95.0, 4.0: 94.5, 16.0: 94.6})
    (line,) = shared_lines([demo, digits], "image_auroc", SWEEP)
    assert line == "shared by demo, digits; noco, last: 1 to 4 (2 of 3 tested); norm 1 is in it"
    apart = curve_of("digits", {0.5: 70.0, 1.0: 60.0})
    (line,) = shared_lines([demo, apart], "image_auroc", SWEEP)
    assert line.endswith("0.5 (1 of 2 tested); norm 1 is not in it")
    (line,) = shared_lines([demo, curve_of("digits", {32.0: 60.0})], "image_auroc", SWEEP)
    assert line.endswith("nothing, since no norm was tested on all of them")
    (line,) = shared_lines([demo, curve_of("digits", {8.0: 60.0})], "image_auroc", SWEEP)
    assert "nothing (tested on all of them: 8); 1 was not tested" in line


def test_shared_ranges_never_mix_ways_of_selecting():
    curves = [
        curve_of("demo", {1.0: 90.0, 8.0: 80.0}),
        curve_of("digits", {1.0: 80.0, 8.0: 90.0}, select="best_test"),
    ]
    assert shared_lines(curves, "image_auroc", SWEEP) == []
    curves += [curve_of("digits", {1.0: 90.0, 8.0: 80.0}, label="closed form")]
    (line,) = shared_lines(curves, "image_auroc", SWEEP)
    assert line == ("shared by demo, digits; all curves, last: 1 (1 of 2 tested); norm 1 is in it")


def test_norm_sweep_draws_trained_and_closed_form_over_data_sets(tmp_path, capsys):
    folders = [
        make_run(tmp_path / "t1", 1, two_seeds(0.7, 0.9), pixels=0.8),
        make_run(tmp_path / "t8", 8, two_seeds(0.6, 0.6), pixels=0.8),
        make_run(tmp_path / "c1", 1, two_seeds(0.8, 0.8), pixels=0.8, method="noco_exact",
                 layers=[2]),
        make_run(tmp_path / "d1", 1, {("0", 0): 0.9}, dataset="digits", protocol="one-vs-rest"),
    ]  # fmt: skip
    paths = norm_sweep.main([*map(str, folders), "--out", str(tmp_path / "made/norm.png")])
    assert [path.name for path in paths] == ["norm.png", "norm.pdf", "norm.md", "norm.csv"]
    assert np.array(Image.open(paths[0]).convert("L")).min() < 100
    text = paths[2].read_text()
    assert text in capsys.readouterr().out
    lines = lines_of(text)
    assert "| demo | trained | last | 1 | 80.0 ± 14.1 | 80.0 ± 0.0 | 2 | 2 |" in lines
    assert "| demo | closed form | last | 1 | 80.0 ± 0.0 | 80.0 ± 0.0 | 2 | 2 |" in lines
    assert "| digits | trained | last | 1 | 90.0 | – | 1 | 1 |" in lines
    assert r"demo: layers: \[2\] closed form; \[1, 2\] trained" in text
    spread = "within 1 point of the best image AUROC (standard deviation over seeds: up to 14.1)"
    assert f"- norm {spread}:" in lines
    assert "- demo, closed form, last: 1 (all 1 tested); best 80.0 at 1" in lines
    assert "; trained, last: 1 (1 of 1 tested); norm 1 is in it" not in text  # "all 1" is said
    assert "trained, last: 1 (all 1 tested); norm 1 is in it" in text

    figure = option_plots.draw(read_curves(folders, SWEEP), SWEEP)
    images, digits, pixel, empty = figure.axes
    assert (images.get_ylabel(), pixel.get_ylabel()) == ("image AUROC, %", "pixel AUROC, %")
    assert digits.get_title() == "digits (0)"
    assert not empty.get_visible()  # digits have no masks
    trained = next(line for line in images.lines if len(line.get_xdata()) == 2)
    np.testing.assert_allclose(trained.get_xdata(), [1, 8])
    np.testing.assert_allclose(trained.get_ydata(), [80, 60])
    bands = [band for band in images.collections if isinstance(band, PolyCollection)]
    heights = sorted(float(np.ptp(band.get_paths()[0].vertices[:, 1])) for band in bands)
    assert heights[-1] == pytest.approx(80 + 200**0.5 - 60)
    assert images.get_xscale() == "log"
    assert [tick.get_text() for tick in images.get_xticklabels()] == ["1", "8"]


def test_ways_of_selecting_have_styles_of_their_own(tmp_path):
    folders = [
        make_run(tmp_path / select, 1, {("a", 0): 0.8}, select=select)
        for select in ("last", "best_test", "synthetic")
    ]
    figure = option_plots.draw(read_curves(folders, SWEEP), SWEEP)
    (axes,) = figure.axes
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", ":"]
    (legend,) = figure.legends
    texts = [text.get_text().strip() for text in legend.get_texts()]
    assert [text for text in texts if text] == [
        "noco", "last", "synthetic", "best on test (optimistic)",
    ]  # fmt: skip


def test_a_figure_of_nothing_defined_is_refused(tmp_path):
    folder = make_run(tmp_path / "x", 1, {("a", 0): math.nan})
    with pytest.raises(RunError, match="image AUROC is undefined"):
        option_plots.draw(read_curves([folder], SWEEP), SWEEP)


def test_norm_sweep_refuses_methods_without_an_objective(tmp_path, capsys):
    """nc_disc has a norm too, but of a sphere."""
    folder = make_run(tmp_path / "x", 1, {("a", 0): 0.8}, method="nc_disc")
    with pytest.raises(SystemExit):
        norm_sweep.main([str(folder), "--out", str(tmp_path / "n")])
    assert "nc_disc on demo has no objective" in capsys.readouterr().err


def test_sigma_sweep_keeps_methods_and_norms_apart(tmp_path, capsys):
    folders = [
        make_run(tmp_path / f"{method}{sigma}{norm}", norm, {("a", 0): auroc}, method=method,
                 method_options={"sigma": sigma})
        for method, norm, sigma, auroc in (
            ("simplenet", None, 0.005, 0.6),
            ("simplenet", None, 0.015, 0.7),
            ("nc_disc", 1, 0.005, 0.8),
            ("nc_disc", 1, 0.015, 0.81),
            ("nc_disc", 2, 0.015, 0.5),
        )
    ]  # fmt: skip
    paths = sigma_sweep.main([*map(str, folders), "--out", str(tmp_path / "sigma")])
    text = paths[2].read_text()
    assert "SimpleNet paper, Fig. 5" in text
    assert "| demo | nc_disc, norm 1 | last | 0.005 | 80.0 | 1 | 1 |" in lines_of(text)
    assert "- demo, nc_disc, norm 1, last: 0.005 to 0.015 (all 2 tested); best 81.0" in text
    assert "- demo, simplenet, last: 0.015 (1 of 2 tested)" in text
    assert "is in it" not in text
    with pytest.raises(SystemExit):
        patch_size.main([str(make_run(tmp_path / "d", 1, {("0", 0): 0.9}, patch_size=None))])
    assert "noco has no patch size (patch_size is null)" in capsys.readouterr().err


def test_patch_size_is_drawn_on_an_even_axis(tmp_path):
    folders = [
        make_run(tmp_path / str(p), 1, {("a", 0): 0.8}, patch_size=p, method="padim")
        for p in (1, 3, 5)
    ]
    paths = patch_size.main([*map(str, folders), "--out", str(tmp_path / "p")])
    assert "| demo | padim | last | 3 | 80.0 | 1 | 1 |" in lines_of(paths[2].read_text())
    assert "SimpleNet paper, Fig. 6" in paths[2].read_text()
