"""Methods against one another, from run folders."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from figures import compare
from figures.shared.costs import SHOWN, Costs, costs_of
from tests.figures.paper_runs import write_run
from tests.scripts.runs import refusal
from utils.errors import RunError
from utils.runs.made_of import MadeOf, made_of_file, save_made_of

FACTS = {
    "pass_test_seconds": 1.5,
    "score_seconds": 0.5,
    "head_bytes": 2_500_000,
    "peak_bytes": 3_000_000_000,
    "fit_seconds": 3.0,
}


def make_run(folder, method, aurocs, *, dataset="demo", select="last", data_root="", **facts):
    """A run with image AUROC `aurocs` (categories, seeds), None where a pair is not finished."""
    values = {
        (f"c{category}", seed): auroc
        for category, of_seeds in enumerate(aurocs)
        for seed, auroc in enumerate(of_seeds)
        if auroc is not None
    }
    config = {"dataset": dataset, "method_name": method, "method": {}}
    if data_root:
        config["data_root"] = data_root
    columns = {"aupro": lambda auroc: auroc / 2, "num_test": 100, **FACTS, **facts}
    return write_run(folder, config, values, select=select, **columns)


def lines_of(*folders):
    by_data = compare.read_runs_by_data(folders)
    return [
        line
        for name, runs in by_data.items()
        for run in runs
        for line in compare.lines_of(run, name)
    ]


def test_a_line_is_the_mean_over_categories_of_each_seed(tmp_path):
    folder = make_run(tmp_path / "a", "noco", [[0.8, 0.9], [0.6, 0.7]], fit_seconds=4.0)
    (line,) = lines_of(folder)
    assert line.metrics["image_auroc"] == pytest.approx([70.0, 80.0])
    assert line.metrics["aupro"] == pytest.approx([35.0, 40.0])
    assert line.costs == Costs(4.0, 50.0, 3000.0, 2.5)
    assert (line.num_seeds, line.label, line.select) == (2, "noco", "last")


def test_a_rate_counts_the_backbone_in_either_of_its_columns(tmp_path):
    streamed = {"pass_test_seconds": 0.0, "score_seconds": 2.0}  # of features that are not stored
    folder = make_run(tmp_path / "a", "noco", [[0.8, 0.9]], **streamed)
    (line,) = lines_of(folder)
    assert line.costs.images_per_second == 50.0


def test_metrics_that_only_some_data_have_are_shown_where_a_line_has_them(tmp_path):
    kinds = {"image_auroc_logical": 0.5, "spro": 0.25, "spro_0.3": 0.75}
    runs = [
        make_run(tmp_path / "a", "noco", [[0.8]], dataset="mvtec_loco", **kinds),
        make_run(tmp_path / "b", "padim", [[0.7]]),
    ]
    table = compare.table_of(lines_of(*runs))
    heads = [column.name for column in table.columns]
    assert heads[5:7] == ["logical AUROC", "sPRO 0.05"]
    assert "sPRO 0.3" not in heads
    assert [row[5:7] for row in table.texts()] == [["–", "–"], ["50.0", "25.0"]]


def test_table_has_the_best_first_and_a_dash_where_nothing_is_defined(tmp_path):
    runs = [
        make_run(tmp_path / "a", "noco", [[0.8, 0.9]]),
        make_run(tmp_path / "b", "padim", [[0.95]], select="best_test"),
    ]
    table = compare.table_of(lines_of(*runs))
    heads = [column.name for column in table.columns]
    assert heads[:5] == ["method", "selection", "image AUROC", "pixel AUROC", "AUPRO"]
    assert heads[5:] == ["fit, s", "images/s", "memory, MB", "head, MB", "seeds"]
    best = "best on test (optimistic)"
    assert table.texts() == [
        ["padim", best, "95.0", "–", "47.5", "3", "50", "3000", "2.5", "1"],
        ["noco", "last", "85.0 ± 7.1", "–", "42.5 ± 3.5", "3", "50", "3000", "2.5", "2"],
    ]
    assert [row.label for row in table.rows] == ["demo", "demo"]


def test_figure_has_a_panel_for_each_data_set_and_a_mark_for_each_method(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "a", "noco", [[0.8]], fit_seconds=10.0),
        make_run(tmp_path / "b", "padim", [[0.9]], fit_seconds=0.0),
        make_run(tmp_path / "c", "noco", [[0.7]], dataset="digits"),
    ]
    figure = compare.draw(lines_of(*runs), metric="image_auroc")
    assert [axes.get_title() for axes in figure.axes] == ["demo", "digits"]
    marks = [found.lines[0] for found in figure.axes[0].containers]
    points = [(float(mark.get_xdata()[0]), float(mark.get_ydata()[0])) for mark in marks]
    np.testing.assert_allclose(points, [(10.0, 80.0), (1e-3, 90.0)])
    paths = compare.main([*map(str, runs), "--out", str(tmp_path / "made/compare")])
    assert [path.suffix for path in paths] == [".png", ".pdf", ".md", ".csv", ".html"]
    assert np.array(Image.open(paths[0]).convert("L")).min() < 100
    assert paths[2].read_text() in capsys.readouterr().out


def test_what_the_metric_does_not_define_is_not_drawn(tmp_path):
    (axes,) = compare.draw(
        lines_of(make_run(tmp_path / "a", "noco", [[0.8]])), metric="pixel_auroc"
    ).axes
    assert not axes.containers


def test_unfinished_runs_are_refused(tmp_path):
    folder = make_run(tmp_path / "a", "noco", [[0.8, 0.9], [0.6, None]])
    with pytest.raises(RunError, match="the seeds have different categories"):
        lines_of(folder)
    empty = make_run(tmp_path / "b", "noco", [[None]])
    with pytest.raises(RunError, match="no category is finished"):
        lines_of(empty)


def test_labels_tell_apart_what_changes_the_method_on_one_set_of_images(tmp_path):
    """Three runs on two folders: what only the data or the pictures change is not named."""
    folders = []
    for number, (root, norm) in enumerate((("a/x", 1), ("a/x", 8), ("b/y", 1))):
        folder = make_run(tmp_path / str(number), "noco", [[0.8]], dataset="folder")
        config = json.loads((folder / "config.json").read_text())
        config |= {"data_root": root, "overlays": number, "method": {"norm": norm}}
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    named = [(line.dataset, line.label) for line in lines_of(*folders)]
    assert named == [
        ("folder x", "noco, norm 1"),
        ("folder x", "noco, norm 8"),
        ("folder y", "noco"),
    ]


def test_the_page_has_table_ranks_and_pictures_and_needs_nothing_else(tmp_path):
    runs = [
        make_run(tmp_path / f"{method}-{data}", method, [[value, value + 0.02]], dataset=data)
        for data, values in {"demo": (0.9, 0.8, 0.7), "digits": (0.8, 0.7, 0.75)}.items()
        for method, value in zip(("noco_cf", "padim", "knn"), values, strict=True)
    ]
    words = [str(run) for run in runs]
    paths = compare.main([*words, "--out", str(tmp_path / "made/compare")])
    page = next(path for path in paths if path.suffix == ".html").read_text()
    for text in (
        "Ranks by image AUROC",
        "Friedman",
        "Accuracy against time",
        "noco_cf",
        "91.0 ± 1.4",
    ):
        assert text in page
    assert page.count("data:image/png") >= 4
    assert "http" not in page.replace("http-equiv", "")
    assert 'id="ranks_pixel_auroc"' not in page  # no run has it
    assert "<strong>91.0 ± 1.4</strong>" in page
    ranks = [path for path in paths if "_ranks_" in path.name]
    assert [path.name for path in ranks] == [
        "compare_ranks_image_auroc.md",
        "compare_ranks_aupro.md",
    ]
    text = ranks[0].read_text()
    assert text.startswith("Mean ranks over 2 data sets (demo, digits), 1 is best: noco_cf 1.00,")
    assert "**91.0 ± 1.4**" in text


def test_published_numbers_stand_beside_a_comparable_run(tmp_path):
    run = make_run(tmp_path / "a", "simplenet", [[0.9]])
    column = {"name": "image AUROC", "metric": "image_auroc", "digits": ".1f"}
    cells = {"std": None, "text": None, "found": None, "total": None}
    groups = {"last": 90.0, "NoCo (paper)": 98.1, "SimpleNet (paper)": 99.6}
    table = {
        **{"corner": "category", "caption": "", "notes": []},
        "columns": [
            {"key": group, "group": group, "is_own": group == "SimpleNet (paper)", **column}
            for group in groups
        ],
        "rows": [
            {
                **{"key": "mean", "label": "mean"},
                "cells": [{"mean": value, **cells} for value in groups.values()],
            }
        ],
    }
    (run / "table.json").write_text(json.dumps(table))
    other = make_run(tmp_path / "b", "padim", [[0.7]])
    lines = lines_of(run, other)
    assert lines[0].published == 99.6
    assert np.isnan(lines[1].published)
    texts = dict(zip((r.cells[0].text for r in compare.table_of(lines).rows),
                     compare.table_of(lines).texts(), strict=True))  # fmt: skip
    assert "99.6" in texts["simplenet"]
    assert "published image AUROC" not in [c.name for c in compare.table_of(lines[1:]).columns]
    (run / "table.json").write_text("{}")
    with pytest.raises(RunError, match=r"table\.json"):
        lines_of(run)


def test_costs_are_those_of_all_rows_and_unknown_where_no_row_says():
    rows = [
        {"num_test": 100, "pass_test_seconds": 3.0, "score_seconds": 1.0, "peak_bytes": 5_000_000},
        {"num_test": 100, "pass_test_seconds": 0.0, "score_seconds": 1.0, "peak_bytes": 9_000_000},
        {"num_test": 100, "peak_bytes": float("nan"), "fit_seconds": 2.0},
    ]
    found = costs_of(rows)
    # Not the mean of 25 and 100 images a second: nobody waits so long for 200 images.
    assert (found.images_per_second, found.memory_megabytes, found.fit_seconds) == (40.0, 9.0, 2.0)
    assert np.isnan(found.head_megabytes)
    nothing = costs_of([{}])
    assert all(np.isnan(getattr(nothing, name)) for name in SHOWN)


def test_a_method_that_selects_in_another_way_on_other_data_is_ranked_once(tmp_path):
    runs = [
        make_run(tmp_path / "a", "noco_exact", [[0.8]], select="synthetic"),
        make_run(tmp_path / "b", "noco_exact", [[0.9]], dataset="digits"),
        make_run(tmp_path / "c", "knn", [[0.7]]),
        make_run(tmp_path / "d", "knn", [[0.6]], dataset="digits"),
    ]
    values = compare.values_of(lines_of(*runs), "image_auroc")
    assert {name: list(of_methods) for name, of_methods in values.items()} == {
        "demo": ["noco_exact", "knn"],
        "digits": ["noco_exact", "knn"],
    }
    line = lines_of(runs[0])[0]
    both = [line, dataclasses.replace(line, select="last")]
    assert compare.names_of(both) == ["noco_exact, synthetic", "noco_exact"]


def with_images(folder, digest, category="c0"):
    """Record what a run was made of."""
    images = {"test/good": {f"{category}/test/good/0.png": digest}}
    save_made_of(made_of_file(folder, category, 0), MadeOf(images))
    return folder


def test_folders_of_one_name_are_told_apart_by_their_images(tmp_path):
    runs = []
    for number, (root, method, digest) in enumerate(
        (("a/parts", "knn", "1"), ("b/parts", "knn", "2"), ("moved/parts", "noco", "1"))
    ):
        run = make_run(tmp_path / f"{number}", method, [[0.8]], dataset="folder", data_root=root)
        runs.append(with_images(run, digest))
    lines = lines_of(*runs)
    assert [(line.dataset, line.label) for line in lines] == [
        ("folder parts (a/parts)", "knn"),
        ("folder parts (a/parts)", "noco"),
        ("folder parts (b/parts)", "knn"),
    ]
    # In the same folder, but looked at in part: presets of released code do that.
    part = make_run(tmp_path / "part", "padim", [[0.8]], dataset="folder", data_root="a/parts")
    images = {"test/good": {"c0/test/good/0.png": "1", "c0/test/good/1.png": "2"}}
    save_made_of(made_of_file(part, "c0", 0), MadeOf(images))
    assert [line.dataset for line in lines_of(runs[0], part)] == [
        "folder parts (1 test images)",
        "folder parts (2 test images)",
    ]


def test_means_over_other_categories_are_other_lines(tmp_path):
    runs = [
        make_run(tmp_path / "a", "knn", [[0.8], [0.9]]),
        make_run(tmp_path / "b", "noco", [[0.7]]),
        make_run(tmp_path / "c", "padim", [[0.6], [0.5]]),
    ]
    found = {(line.dataset, line.label) for line in lines_of(*runs)}
    assert found == {("demo: c0, c1", "knn"), ("demo: c0, c1", "padim"), ("demo: c0", "noco")}


def test_a_run_that_is_named_twice_and_an_infinity_are_refused(tmp_path, capsys):
    folder = make_run(tmp_path / "a", "knn", [[0.8]])
    words = [str(folder), str(folder), "--out", str(tmp_path / "made")]
    assert "the run is named twice" in refusal(capsys, compare.main, *words)
    endless = make_run(tmp_path / "b", "knn", [[float("inf")]])
    with pytest.raises(RunError, match="image_auroc is inf"):
        lines_of(endless)
