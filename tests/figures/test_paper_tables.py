"""The papers' tables from tiny run folders."""

import csv
import shutil
import subprocess

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from datasets.data_set import num_categories
from datasets.sets.cifar100_coarse import FINE_OF_COARSE
from datasets.sets.demo.demo import DEMO_CATEGORIES
from figures import simplenet_tables, table2, table3
from figures.shared.own_results import pool
from figures.shared.table_files import write_table
from tests.figures.paper_runs import (
    CIFAR,
    MVTEC,
    constant,
    higher,
    semantic,
    simplenet,
    structured,
    write_run,
)
from utils.errors import RunError
from utils.tables.formats import to_latex, to_markdown
from utils.tables.published import PUBLISHED_FILE, published_table
from utils.tables.table import Cell, Column, Row, Table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """NoCo on mvtec (two seeds, complete), cifar10 (one seed) and three demo textures."""
    root = tmp_path_factory.mktemp("runs")
    # Means over i = 0 to 14: 80 + 7 = 87 for seed 0, 89 for seed 1: 88 ± sqrt(2).
    mvtec = {(c, s): 0.80 + 0.01 * i + 0.02 * s for i, c in enumerate(MVTEC) for s in (0, 1)}
    return [
        write_run(root / "mvtec", structured(), mvtec, trainable=3_213_056, pixel_auroc=higher),
        write_run(root / "cifar", semantic(), constant(CIFAR, 0.955), trainable=4_196_352),
        write_run(
            root / "demo_x",
            structured("demo", backbone="tf_efficientnet_lite0"),
            constant(DEMO_CATEGORIES, 0.5),
            select="synthetic",
        ),
    ]


def cells_of(table, label):
    (row,) = [row for row in table.rows if label in row.label]
    return dict(
        zip([c.key for c in table.columns], table.texts()[table.rows.index(row)], strict=True)
    )


def marks_of(table, row, key):
    number = [r.key for r in table.rows].index(row)
    return table.marks()[number][[c.key for c in table.columns].index(key)]


def test_table2_has_the_papers_rows_in_order_with_every_printed_number():
    table = table2.table2([])
    printed = published_table("NoCo Table II")
    assert [row.key for row in table.rows] == list(dict.fromkeys(key[0] for key in printed))
    keys = [column.key for column in table.columns]
    for (method, dataset, _, metric), value in printed.items():
        row = next(row for row in table.rows if row.key == method)
        column = "trainable_millions" if metric.startswith("trainable") else dataset
        assert row.cells[keys.index(column)].mean == value
    assert cells_of(table, "MRot")["mpdd"] == "-"
    assert any("MRot: mpdd, visa" in note for note in table.notes)
    # By hand from the paper's MVTec column: 99.2 twice, then 98.1 twice.
    for method, mark in {"NoCo": "best", "PatchCore": "best", "CFA": "second", "IGD": ""}.items():
        assert marks_of(table, method, "mvtec") == mark
    assert not any(marks_of(table, row.key, "trainable_millions") for row in table.rows)


def test_table2_pools_the_papers_backbones_into_one_row_of_ours(runs):
    table = table2.table2(pool(runs))
    ours = cells_of(table, "wide_resnet50_2 / resnet152")
    assert ours["mvtec"] == "88.0 ± 1.4"
    assert ours["cifar10"] == "95.5"
    assert ours["trainable_millions"] == "3.7"
    assert ours["demo"] == ours["visa"] == "-"
    assert any(row.label.startswith("ours: noco; last;") for row in table.rows)
    assert any("n = 1 to 2" in row.label for row in table.rows)
    demo = cells_of(table, "tf_efficientnet_lite0")
    assert (demo["demo"], demo["mvtec"]) == ("50.0", "-")
    assert "No run of ours is on fashion_mnist, cifar100, cats_vs_dogs, mpdd, visa." in table.notes
    assert any("synthetic" in note and "mvtec" in note for note in table.notes)
    assert any("Not data sets of the paper: demo" in note for note in table.notes)


def test_ours_compete_unless_told_otherwise(tmp_path):
    run = write_run(tmp_path / "a", semantic(), constant(CIFAR, 0.9724))  # MS: 97.2, PANDA: 96.2
    for rank, mark in {"all": "best", "published": ""}.items():
        table = table2.table2(pool([run]), rank=rank)
        assert marks_of(table, table.rows[-1].key, "cifar10") == mark
        assert marks_of(table, "MS", "cifar10") == "best"
        assert marks_of(table, "PANDA", "cifar10") == "second"


def test_a_mean_over_some_categories_says_so_and_is_not_ranked(tmp_path):
    part = write_run(tmp_path / "a", structured(), constant(MVTEC[:3], 0.999, seeds=(0, 1)))
    table = table2.table2(pool([part]))
    assert cells_of(table, "ours")["mvtec"] == "99.9 (3 of 15)"
    assert marks_of(table, table.rows[-1].key, "mvtec") == ""
    assert marks_of(table, "NoCo", "mvtec") == "best"
    assert any("mvtec (3 of 15 categories)" in note for note in table.notes)
    tables = table3.category_tables("NoCo Table III", pool([part]), ["image_auroc"])
    assert column_of(tables["mvtec"], "noco [1]") == {
        **dict.fromkeys(("bottle", "cable", "capsule"), "99.9 ± 0.0"),
        "mean objects": "99.9 (3 of 10)",
        "mean": "99.9 (3 of 15)",
        **dict.fromkeys((*MVTEC[3:], "mean textures"), "-"),
    }
    assert any(
        note.startswith("-: missing of noco [1]: hazelnut") for note in tables["mvtec"].notes
    )


def test_a_seed_without_all_categories_is_left_out_and_named(tmp_path):
    values = constant(MVTEC, 0.9) | constant(MVTEC[:4], 0.5, seeds=(1,))
    table = table2.table2(pool([write_run(tmp_path / "a", structured(), values)]))
    assert cells_of(table, "ours")["mvtec"] == "90.0"
    assert any("seeds 1 lack categories and are left out" in note for note in table.notes)
    values = {pair: 0.9 for i, pair in enumerate(constant(MVTEC, 0, (0, 1))) if i not in (2, 5)}
    table = table2.table2(pool([write_run(tmp_path / "b", structured(), values)]))
    assert cells_of(table, "ours")["mvtec"] == "90.0 (no seed complete)"


def test_undefined_values_are_holes(tmp_path):
    values = constant(MVTEC, 0.9) | {("wood", 0): float("nan")}
    (one,) = pool([write_run(tmp_path / "a", structured(), values)])
    assert cells_of(table2.table2([one]), "ours")["mvtec"] == "90.0 (14 of 15)"


def test_runs_of_single_categories_and_seeds_are_put_together(tmp_path):
    folders = [
        write_run(tmp_path / f"{c}{s}", structured("demo", seeds=[s], categories=[c]), {(c, s): v})
        for (c, s), v in {
            ("brick", 0): 0.6, ("grass", 0): 0.7, ("gravel", 0): 0.8,
            ("brick", 1): 0.7, ("grass", 1): 0.8, ("gravel", 1): 0.9,
        }.items()
    ]  # fmt: skip
    table = table2.table2(pool([*folders, folders[0]]))
    assert cells_of(table, "ours: noco; last; wide_resnet50_2; n = 2")["demo"] == "75.0 ± 7.1"


def test_different_results_of_one_thing_are_refused_and_equal_ones_are_not(tmp_path):
    first = write_run(tmp_path / "first", structured("demo"), {("brick", 0): 0.6})
    same = write_run(tmp_path / "same", structured("demo"), {("brick", 0): 0.6})
    assert len(pool([first, same])) == 1
    other = write_run(tmp_path / "other", structured("demo"), {("brick", 0): 0.7})
    with pytest.raises(RunError, match=r"first and .*other hold different .* brick, seed 0"):
        pool([first, other])


def test_options_and_ways_of_selecting_set_rows_apart(tmp_path):
    values = constant(DEMO_CATEGORIES, 0.6)
    configs = {
        "one": structured("demo"),
        "eight": structured("demo", method={"norm": 8.0}),
        "held": structured("demo", calibration_share=0.1),
    }
    folders = [write_run(tmp_path / name, config, values) for name, config in configs.items()]
    folders.append(write_run(tmp_path / "s", structured("demo"), values, select="best_test"))
    folders.append(write_run(tmp_path / "c", semantic(method={"norm": 8.0}), constant(CIFAR, 0.9)))
    labels = [row.label for row in table2.table2(pool(folders)).rows if row.is_ours]
    assert labels == [
        "ours: noco, norm 1.0; last; wide_resnet50_2; n = 1",
        "ours: noco, norm 8.0; last; wide_resnet50_2 / resnet152; n = 1",
        "ours: noco, norm 1.0, calibration share 0.1; last; wide_resnet50_2; n = 1",
        "ours: noco, norm 1.0; best on test (optimistic); wide_resnet50_2; n = 1",
    ]


def test_what_measures_nothing_is_said(tmp_path):
    config = structured("demo", weights="random")
    run = write_run(tmp_path / "r", config, constant(DEMO_CATEGORIES, 0.6))
    assert any("RANDOM BACKBONE" in note for note in table2.table2(pool([run])).notes)
    empty = tmp_path / "empty"
    write_run(empty, structured("demo"), {})
    table2.main([str(run), str(empty), "--out", str(tmp_path / "t")])
    assert (
        f"no category is finished: {empty}" in (tmp_path / "t.csv").with_suffix(".md").read_text()
    )
    with pytest.raises(SystemExit):
        table2.main([str(tmp_path / "absent"), "--out", str(tmp_path / "t")])


def test_another_protocol_is_another_data_set(tmp_path):
    config = semantic(protocol="leave-one-out")
    table = table2.table2(pool([write_run(tmp_path / "a", config, constant(CIFAR, 0.9))]))
    ours = cells_of(table, "ours")
    assert (ours["cifar10"], ours["cifar10 (leave-one-out)"]) == ("-", "90.0")


def test_numbers_of_categories_are_those_of_the_data():
    assert num_categories("demo") == len(DEMO_CATEGORIES)
    assert num_categories("cifar100_coarse") == len(FINE_OF_COARSE)
    assert num_categories("mvtec") == len(MVTEC)
    assert num_categories("cifar10") == len(CIFAR)
    assert num_categories("folder") == num_categories("unheard_of") == 0


def small_table(columns=("a",), **options):
    """Values that tell rounding and ties: 90.04, 89.96 and 90.0 are equal in print."""
    values = [(90.04, 1), (89.96, 2), (89.94, 3), (95.0, None), (None, 5)]
    cells = [
        tuple(
            Cell(value, found=2, total=3) if value == 95.0 else Cell(value)
            for value in row[: len(columns)]
        )
        for row in values
    ]
    rows = tuple(Row(f"r{i}", f"r{i}", line) for i, line in enumerate(cells))
    heads = tuple(Column(name, name) for name in columns)
    return Table("m", "c", heads, rows, hole="-", **{"rank_along": "column"} | options)


def test_rank_is_by_printed_values_and_ties_share():
    table = small_table()
    assert [row[0] for row in table.texts()] == ["90.0", "90.0", "89.9", "95.0 (2 of 3)", "-"]
    assert [row[0] for row in table.marks()] == ["best", "best", "second", "", ""]
    lines = [" ".join(line.split()) for line in to_markdown(table).splitlines()]
    assert lines[4:7] == ["| r0 | **90.0** |", "| r1 | **90.0** |", "| r2 | <u>89.9</u> |"]
    assert not any(map(any, small_table(rank_along="nothing").marks()))
    along_rows = small_table(("a", "b"), rank_along="row").marks()
    assert along_rows[0] == ["best", "second"]
    assert along_rows[3] == along_rows[4] == ["", ""]  # a number without a competitor


def column_of(table, key):
    c = [column.key for column in table.columns].index(key)
    return {row.label: text[c] for row, text in zip(table.rows, table.texts(), strict=True)}


def test_table3_has_means_over_groups_and_a_table_for_other_data(runs, tmp_path):
    paths = table3.main([*map(str, runs), "--out", str(tmp_path / "t3.png")])
    assert {path.name for path in paths} == {
        f"t3{data}{suffix}"
        for data in ("", "-cifar10", "-demo")
        for suffix in (".png", ".pdf", ".md", ".tex", ".csv")
    }
    tables = table3.category_tables("NoCo Table III", pool(runs), ["image_auroc"])
    ours = column_of(tables["mvtec"], "noco [1]")
    assert ours["bottle"] == "81.0 ± 1.4"  # 80 and 82
    assert ours["mean objects"] == "85.5 ± 1.4"  # i = 0 to 9: 84.5 and 86.5
    assert ours["mean textures"] == "93.0 ± 1.4"  # i = 10 to 14: 92 and 94
    assert ours["mean"] == "88.0 ± 1.4"
    assert column_of(tables["mvtec"], "NoCo")["mean textures"] == "99.8"
    assert "[1] noco; last; wide_resnet50_2; n = 2" in tables["mvtec"].notes
    assert column_of(tables["demo"], "noco [1]") == dict.fromkeys(
        (*DEMO_CATEGORIES, "mean"), "50.0"
    )
    with (tmp_path / "t3.csv").open(newline="") as file:
        rows = {row["category"]: row for row in csv.DictReader(file)}
    assert float(rows["mean"]["noco [1]"]) == pytest.approx(88.0)
    assert float(rows["mean"]["noco [1]_std"]) == pytest.approx(2**0.5)
    assert rows["mean"]["noco [1]_num_seeds"] == "2"
    assert rows["wood"]["PaDiM"] == "80.8"


def test_simplenet_table1_pairs_image_and_pixel(runs):
    table = simplenet_tables.build(1, runs)["mvtec"]
    assert column_of(table, "noco [1] pixel_auroc")["bottle"] == "82.0 ± 1.4"
    assert column_of(table, "CS-Flow pixel_auroc")["carpet"] == "-"
    assert column_of(table, "SimpleNet image_auroc")["mean"] == "99.6"
    assert [group for group, *_ in table.groups()][-1] == "noco [1]"
    assert set(simplenet_tables.build(1, runs)) == {"mvtec", "demo"}


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """SimpleNet's variants on mvtec and demo, and runs that belong to no ablation."""
    root = tmp_path_factory.mktemp("variants")
    cases = {
        "23": (simplenet(), 0.96),
        "3": (simplenet(layers=(3,)), 0.95),
        "none": (simplenet(adaptor="none"), 0.94),
        "mlp": (simplenet(adaptor="mlp"), 0.93),
        "ce": (simplenet(loss="cross_entropy"), 0.92),
        "r18": (simplenet(backbone="resnet18.tv_in1k"), 0.91),
        "odd": (simplenet(layers=(3,), adaptor="none"), 0.5),
    }
    folders = [
        write_run(root / name, config, constant(MVTEC, value), pixel_auroc=higher)
        for name, (config, value) in cases.items()
    ]
    demo = simplenet("demo", backbone="tf_efficientnet_lite0")
    folders.append(
        write_run(root / "demo", demo, constant(DEMO_CATEGORIES, 0.8), pixel_auroc=higher)
    )
    cifar = semantic(method_name="simplenet", method=simplenet()["method"])
    folders.append(write_run(root / "cifar", cifar, constant(CIFAR, 0.86)))
    return folders


def test_simplenet_variants_go_to_their_lines(variants):
    stages, adaptors, backbones = (simplenet_tables.build(n, variants)["mvtec"] for n in (2, 3, 4))
    notes = [note for note in stages.notes if note.startswith("[")]
    assert notes == [
        "[1] mvtec: simplenet; last; wide_resnet50_2; n = 1",
        "[2] mvtec: simplenet; last; resnet18; n = 1",
        "[3] demo: simplenet; last; tf_efficientnet_lite0; n = 1",
    ]
    ours = column_of(stages, "[1] mvtec image_auroc")
    assert ours == {"1": "-", "2": "-", "3": "95.0", "1+2": "-", "2+3": "96.0", "1+2+3": "-"}
    assert column_of(stages, "[1] mvtec pixel_auroc")["3"] == "96.0"
    assert column_of(stages, "[3] demo image_auroc")["2+3"] == "80.0"
    assert column_of(stages, "published_image_auroc")["2+3"] == "99.6"
    assert "-: missing in [1]: 1, 2, 1+2, 1+2+3." in stages.notes
    assert column_of(adaptors, "[1] mvtec image_auroc") == {
        "linear adaptor": "96.0",
        "complex adaptor": "93.0",
        "no adaptor": "94.0",
        "cross-entropy": "92.0",
    }
    assert column_of(backbones, "[1] mvtec image_auroc") == {
        "resnet18": "91.0",
        "resnet50": "-",
        "resnet101": "-",
        "wide_resnet50_2": "96.0",
        "tf_efficientnet_lite0": "-",
    }
    assert column_of(backbones, "[2] demo image_auroc")["tf_efficientnet_lite0"] == "80.0"


def test_simplenet_table5_has_class_data_only(variants):
    table = simplenet_tables.build(5, variants)["cifar10"]
    assert [column.key for column in table.columns] == ["cifar10"]
    assert cells_of(table, "ours: simplenet")["cifar10"] == "86.0"
    assert marks_of(table, "SimpleNet", "cifar10") == "best"
    assert marks_of(table, table.rows[-1].key, "cifar10") == "second"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("name", ["table2", "ablation", "odd"])
def test_latex_compiles(name, runs, variants, tmp_path):
    label = r"50% & a_b #1 {x} \y $z^2~"
    odd = Row(label, label, (Cell(97.1, found=3, total=15),))
    table = {
        "table2": lambda: table2.table2(pool(runs)),
        "ablation": lambda: simplenet_tables.build(4, variants)["mvtec"],
        "odd": lambda: Table("m_%", "c", (Column("k", "n#", "g_&"),), (odd,), ("100 % [a] <b>",)),
    }[name]()
    head = r"\documentclass{article}\usepackage[paperwidth=90cm]{geometry}\usepackage{booktabs}"
    text = rf"{head}\begin{{document}}{to_latex(table)}\end{{document}}"
    (tmp_path / "t.tex").write_text(text, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_picture_holds_every_text_and_none_covers_another(runs, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(
        "figures.shared.table_files.save_figure", lambda f, p: figures.append(f) or [p]
    )
    write_table(table2.table2(pool(runs)), tmp_path / "t")
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    texts = [t for t in figures[0].axes[0].texts if t.get_text().strip()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    width, height = figures[0].get_size_inches() * figures[0].dpi
    for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert 0 <= box.x0 <= box.x1 <= width, text
        assert 0 <= box.y0 <= box.y1 <= height, text
        assert not any(shrunk(box).overlaps(shrunk(other)) for other in boxes[:i]), text
    assert {"99.2", "88.0 ± 1.4", "NoCo"} <= {text.get_text() for text in texts}


def shrunk(box):
    """The box without the room for accents and descenders, in which lines may meet."""
    return box.shrunk(1, 0.8)


def test_published_table_is_the_files_own_and_an_unknown_one_is_refused():
    with PUBLISHED_FILE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "SimpleNet Table 5"]
    table = published_table("SimpleNet Table 5")
    assert [key[0] for key in table] == [row["method"] for row in rows]
    assert list(table.values()) == [float(row["value"]) for row in rows]
    with pytest.raises(RunError, match="Table 9"):
        published_table("SimpleNet Table 9")
