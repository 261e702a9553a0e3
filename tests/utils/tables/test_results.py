import csv
import itertools
import json
import math
import re
import statistics
import unicodedata

import pytest

from datasets.data_set import StructuredSet, find_data_sets, num_categories
from models.method import find_methods, published_name
from utils.errors import RunError
from utils.tables import published
from utils.tables.formats import to_csv, to_latex, to_markdown, to_text, write
from utils.tables.published import published_by_paper, published_values
from utils.tables.results import Benchmark, build_table, row_notes, undefined_reasons
from utils.tables.table import Table

MVTEC = find_data_sets(StructuredSet)["mvtec"]
BOTH = ["image_auroc", "pixel_auroc"]


def make_rows(values, select="last", metric="image_auroc", **extra):
    """Rows of {category: [value of seed 0, of seed 1, ...]}."""
    return [
        {"category": category, "seed": seed, "select": select, metric: value, **extra}
        for category, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]


def make_table(rows, categories, *, notes=(), nan_reasons=(), **options):
    about = {"seeds": (0,), "metrics": ("image_auroc",), "dataset": "folder", **options}
    count = num_categories(about["dataset"] or "")
    benchmark = Benchmark(title="Results", categories=categories, num_categories=count, **about)
    return build_table(rows, benchmark, notes=notes, nan_reasons=nan_reasons)


def make_mvtec_table(categories=MVTEC.categories, **options):
    rows = make_rows({category: [0.9] for category in categories}, pixel_auroc=0.8)
    return make_table(rows, categories, dataset="mvtec", groups=MVTEC.groups, **options)


def cells(table, label):
    (found,) = [
        texts for row, texts in zip(table.rows, table.texts(), strict=True) if row.label == label
    ]
    return found


def headings(table):
    return [(column.group, column.name) for column in table.columns]


def test_mean_and_deviation_by_hand():
    # Over seeds: bottle 0.90, 0.92, 0.97 has mean 0.93 and squares (9 + 1 + 16) / 2 = 13.
    # Per seed the mean of both is 0.85, 0.89, 0.93: deviation exactly 0.04, far from 3.6 and 5.0.
    rows = make_rows({"bottle": [0.90, 0.92, 0.97], "cable": [0.80, 0.86, 0.89]})
    table = make_table(rows, ["bottle", "cable"], seeds=(0, 1, 2))
    assert cells(table, "bottle") == ["93.0 ± 3.6"]
    assert table.rows[0].cells[0].std == pytest.approx(math.sqrt(13))
    assert cells(table, "cable") == ["85.0 ± 4.6"]
    assert cells(table, "mean") == ["89.0 ± 4.0"]
    assert "n = 3 seeds (0, 1, 2)" in table.caption
    assert "within each seed first" in table.caption


def test_one_seed_has_no_deviation():
    table = make_table(make_rows({"bottle": [0.987]}), ["bottle"])
    assert [row.label for row in table.rows] == ["bottle"]
    assert cells(table, "bottle") == ["98.7"]
    assert "n = 1" in table.caption
    assert "±" not in to_text(table)


def test_group_means_and_their_order():
    rows = make_rows({"a": [0.1], "b": [0.2], "c": [0.6]})
    groups = {"mean_textures": ["a", "b"], "mean_x": ["c", "d"], "mean_y": ["z"]}
    table = make_table(rows, ["a", "b", "c"], groups=groups)
    lines = [(row.label, *cells(table, row.label)) for row in table.rows[3:]]
    assert lines == [("mean textures", "15.0"), ("mean x (1 of 2)", "60.0"), ("mean", "30.0")]


def test_a_category_called_mean_stays_itself():
    table = make_table(make_rows({"mean": [0.1], "b": [0.2]}), ["mean", "b"])
    assert [texts[0] for texts in table.texts()] == ["10.0", "20.0", "15.0"]


def test_each_select_has_its_own_heading():
    rows = [row for select, value in (("best_test", 0.9), ("synthetic", 0.7), ("last", 0.8))
            for row in make_rows({"a": [value]}, select, pixel_auroc=value / 2)]  # fmt: skip
    table = make_table(rows, ["a"], metrics=BOTH)
    best = "best on test (optimistic)"
    assert headings(table) == [
        ("last", "image AUROC"), ("last", "pixel AUROC"),
        (best, "image AUROC"), (best, "pixel AUROC"),
        ("synthetic", "image AUROC"), ("synthetic", "pixel AUROC"),
    ]  # fmt: skip
    assert cells(table, "a") == ["80.0", "40.0", "90.0", "45.0", "70.0", "35.0"]
    only = make_table(make_rows({"a": [0.9]}, "best_test"), ["a"])
    for text in (to_markdown(only), to_latex(only), to_text(only)):
        assert best in text


def test_a_hole_is_refused_by_name():
    rows = make_rows({"bottle": [0.9, 0.9], "cable": [0.9]})
    with pytest.raises(RunError, match=r"1 results are missing: cable seed 1 \(last\)"):
        make_table(rows, ["bottle", "cable"], seeds=(0, 1))
    with pytest.raises(RunError, match=r"bottle seed 0 .*bottle seed 1"):
        make_table([], ["bottle"], seeds=(0, 1))
    rows += make_rows({"cable": [0.9, 0.9]}) + make_rows({"cable": [0.9]}, "best_test")
    with pytest.raises(RunError, match=r"3 results.*bottle seed 0 \(best_test\)"):
        make_table(rows, ["bottle", "cable"], seeds=(0, 1))


def test_rows_not_asked_for_are_left_out():
    rows = make_rows({"bottle": [0.9, 0.1], "cable": [0.1]})
    rows += make_rows({"cable": [0.5]}, "best_test")
    table = make_table(rows, ["bottle"])
    assert headings(table) == [("last", "image AUROC")]
    assert cells(table, "bottle") == ["90.0"]


def test_metrics_must_exist():
    rows = make_rows({"bottle": [0.9]})
    with pytest.raises(RunError, match="no column aupro"):
        make_table(rows, ["bottle"], metrics=["image_auroc", "aupro"])
    with pytest.raises(ValueError, match="unknown metrics auroc"):
        make_table(rows, ["bottle"], metrics=["auroc"])
    for missing in ("categories", "seeds", "metrics"):
        about = {"categories": ["bottle"], "seeds": (0,), "metrics": ["image_auroc"], missing: ()}
        with pytest.raises(ValueError, match="a category, a seed and a metric"):
            Benchmark(title="Results", **about)


def test_undefined_values_are_dashes_with_their_reason():
    rows = make_rows({"a": [math.nan, 0.5], "b": [0.5, 0.5]}, "last", "aupro")
    options = {"seeds": (0, 1), "metrics": ["aupro"], "nan_reasons": 2 * ["a has no masks"]}
    table = make_table(rows, ["a", "b"], **options)
    assert cells(table, "a") == ["–"]
    assert cells(table, "b") == ["50.0 ± 0.0"]
    assert cells(table, "mean") == ["–"]
    assert table.notes == ("–: undefined (a has no masks).",)
    for text in (to_markdown(table), to_text(table), to_latex(table)):
        assert "a has no masks" in text
    assert "nan" in to_csv(table)
    assert make_table(make_rows({"b": [0.5]}), ["b"], nan_reasons=["x"]).notes == ()


def test_published_values_stand_beside_ours():
    table = make_mvtec_table(metrics=BOTH)
    assert headings(table)[2:] == [
        ("NoCo (paper)", "image AUROC"),
        ("SimpleNet (paper)", "image AUROC"),
        ("SimpleNet (paper)", "pixel AUROC"),
    ]
    assert cells(table, "bottle") == ["90.0", "80.0", "100.0", "100.0", "98.0"]
    assert cells(table, "mean textures")[2:] == ["99.8", "99.8", "97.5"]
    assert cells(table, "mean objects")[2:] == ["98.9", "99.5", "98.4"]
    assert cells(table, "mean")[2:] == ["99.2", "99.6", "98.1"]
    assert "maximum over repeated evaluations on the test set" in table.caption
    assert table.notes == ()


def test_published_means_are_left_out_beside_the_mean_of_fewer_categories():
    table = make_mvtec_table([*MVTEC.groups["mean_textures"], "bottle"])
    assert cells(table, "bottle") == ["90.0", "100.0", "100.0"]
    assert cells(table, "mean textures") == ["90.0", "99.8", "99.8"]
    assert cells(table, "mean objects (1 of 10)") == ["90.0", "", ""]
    assert cells(table, "mean") == ["90.0", "", ""]
    assert len(table.notes) == 1
    assert "mean objects (1 of 10), mean" in table.notes[0]


def test_semantic_data_has_a_published_mean_only():
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    labels = {name: f"{place} {name}" for place, name in enumerate(names)}
    rows = make_rows({name: [0.9] for name in names})
    table = make_table(rows, names, dataset="cifar10", labels=labels)
    assert cells(table, "3 cat") == ["90.0", "", ""]
    assert cells(table, "mean")[1:] == ["93.9", "86.5"]
    assert table.rows[3].key == "cat"


@pytest.mark.parametrize("dataset", ["demo", None])
def test_without_published_values_there_is_no_column_for_them(dataset):
    table = make_table(make_rows({"bottle": [0.9]}), ["bottle"], dataset=dataset)
    assert headings(table) == [("last", "image AUROC")]
    assert "paper" not in table.caption


def test_published_lookup():
    assert published_values("mvtec", "bottle", "image_auroc") == {"NoCo": 100.0, "SimpleNet": 100.0}
    assert published_values("mvtec", "mean_textures", "pixel_auroc") == {"SimpleNet": 97.5}
    assert published_values("mvtec", "bottle", "image_auroc", ["MS"]) == {}
    assert published_values("demo", "brick", "image_auroc") == {}
    with pytest.raises(RunError, match=r"PatchCore.*99\.7.*99\.5"):
        published_values("mvtec", "cable", "image_auroc", ["PatchCore"])


def test_every_published_dataset_says_how_many_categories_its_mean_is_over():
    with published.PUBLISHED_FILE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    means = {row["dataset"] for row in rows if row["category"].startswith("mean")}
    assert all(map(num_categories, means))
    mvtec = {row["category"] for row in rows if row["dataset"] == "mvtec"}
    assert len({name for name in mvtec if not name.startswith("mean")}) == num_categories("mvtec")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "method,dataset\nNoCo,mvtec\n",
        "method,dataset,category,metric,value,source\na,b,c,d,high,e\n",
    ],
)
def test_missing_or_broken_published_file_is_named(tmp_path, monkeypatch, content):
    path = tmp_path / "published.csv"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(published, "PUBLISHED_FILE", path)
    with pytest.raises(RunError, match=re.escape(str(path))):
        published_values("mvtec", "bottle", "image_auroc")


def odd_table():
    values = {"a_b": [0.5, 0.6], "x|y": [0.5, 0.5], "[50%] *裂": [1.0, 1.0]}
    notes = ["--skip-unreadable: 1 of a_b/{1}~$&#^\\<x>_.png\nleft"]
    return make_table(make_rows(values), list(values), seeds=(0, 1), notes=notes)


def test_markdown_has_one_row_per_line_and_escapes():
    text = to_markdown(odd_table())
    table_lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table_lines) == 2 + 4
    # Unescaped bars part exactly two columns in each row.
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table_lines} == {3}
    assert r"| x\|y" in text
    assert r"| \[50%\] \*裂" in text
    assert "| a_b " in text
    assert r"\<x\>\_.png left" in text
    assert "image AUROC<br>last" in table_lines[0]
    assert re.fullmatch(r"\|:-+\|-+:\|", table_lines[1])


def test_latex_is_escaped_and_balanced():
    text = to_latex(odd_table())
    assert r"a\_b & 55.0 $\pm$ 7.1 \\" in text
    assert r"{[}50\%] {*}裂 & 100.0 $\pm$ 0.0 \\" in text
    assert r"x\textbar{}y &" in text
    assert (
        r"{\footnotesize -{}-skip-unreadable: 1 of a\_b/\{1\}\textasciitilde{}\$\&\#"
        r"\textasciicircum{}\textbackslash{}\textless{}x\textgreater{}\_.png left\par}"
    ) in text
    for part in (r"\begin{tabular}{@{}lr@{}}", r"\toprule", r"\bottomrule", r"\end{tabular}"):
        assert text.count(part) == 1
    assert text.count(r"\midrule") == 2
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert all(line.startswith("%") for line in text.splitlines() if "caption" in line)


def test_latex_groups_span_their_columns():
    rows = make_rows({"a": [0.5]}, pixel_auroc=0.5)
    rows += make_rows({"a": [0.5]}, "best_test", pixel_auroc=0.5)
    text = to_latex(make_table(rows, ["a"], metrics=BOTH))
    assert r" & \multicolumn{2}{c}{last} & \multicolumn{2}{c}{best on test (optimistic)} \\" in text
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-5}" in text


def test_csv_is_exact():
    rows = list(csv.reader(to_csv(odd_table()).splitlines()))
    assert rows[0] == ["category", "last_image_auroc", "last_image_auroc_std"]
    assert rows[1][0] == "a_b"
    assert float(rows[1][1]) == 55.0
    assert float(rows[1][2]) == pytest.approx(statistics.stdev([50, 60]), rel=1e-12)
    assert rows[3][0] == "[50%] *裂"
    assert rows[4][0] == "mean"
    assert to_csv(make_mvtec_table(["bottle"])).split("\n")[:2] == [
        "category,last_image_auroc,noco_paper_image_auroc,simplenet_paper_image_auroc",
        "bottle,90.0,100.0,100.0",
    ]


def test_text_is_aligned_also_with_wide_letters():
    def width(text):
        return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)

    lines = to_text(odd_table()).splitlines()
    numbers = [line for line in lines if re.search(r"\d\.\d ± \d\.\d$", line)]
    assert len(numbers) == 4
    assert len({width(line) for line in numbers}) == 1
    banner = next(place for place, line in enumerate(lines) if re.search(r"-+ last -+$", line))
    assert lines[banner + 1].split() == ["image"]
    assert lines[banner + 2].split() == ["category", "AUROC"]


def test_write(tmp_path):
    table = odd_table()
    paths = write(table, tmp_path / "table")
    assert [path.name for path in paths] == ["table.md", "table.tex", "table.csv", "table.json"]
    *texts, values = [path.read_text(encoding="utf-8") for path in paths]
    assert texts == [to_markdown(table), to_latex(table), to_csv(table)]
    assert Table.from_json(values) == table
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_compared_methods_published_values_stand_beside_it_for_each_paper():
    """NoCo's paper and SimpleNet's print different numbers for PaDiM: 90.8 and 95.8."""
    table = make_mvtec_table(metrics=BOTH, published_as=published_name("padim"))
    assert headings(table)[2:5] == [
        ("PaDiM (NoCo paper)", "image AUROC"),
        ("PaDiM (SimpleNet paper)", "image AUROC"),
        ("PaDiM (SimpleNet paper)", "pixel AUROC"),
    ]
    assert cells(table, "mean")[2:5] == ["90.8", "95.8", "97.5"]
    library = make_mvtec_table(published_as=published_name("anomalib:padim"))
    assert ("PaDiM (NoCo paper)", "image AUROC") in headings(library)
    for method in ("knn", "noco", "anomalib:dfm"):
        table = make_mvtec_table(published_as=published_name(method))
        assert {group for group, *_ in table.groups()} == {
            "last",
            "NoCo (paper)",
            "SimpleNet (paper)",
        }


def test_one_head_for_all_stands_beside_numbers_that_were_published_for_such():
    joint = make_mvtec_table(metrics=BOTH, published_as="UniAD", is_joint=True)
    assert headings(joint)[2:] == [
        ("UniAD (multi-class) (ADer)", "image AUROC"),
        ("UniAD (multi-class) (ADer)", "pixel AUROC"),
        ("UniAD (multi-class) (UniAD)", "image AUROC"),
        ("UniAD (multi-class) (UniAD)", "pixel AUROC"),
    ]
    assert cells(joint, "mean")[2:] == ["92.5", "95.8", "96.7", "96.8"]
    apart = make_mvtec_table(metrics=BOTH, published_as="UniAD")
    assert {group for group, *_ in apart.groups()} == {"last", "NoCo (paper)", "SimpleNet (paper)"}


def test_every_compared_name_is_in_the_file():
    known = {**find_methods("structured"), **find_methods("semantic")}.values()
    names = [method.published_as for method in known if method.published_as]
    names = [n for name in names for n in (name.values() if isinstance(name, dict) else [name])]
    assert len(set(names)) > 5
    for name in names:
        variants = itertools.product(
            ("image_auroc", "pixel_auroc"), (name, f"{name} (multi-class)")
        )
        assert any(published_by_paper("mvtec", "mean", *one) for one in variants), name
    assert published_by_paper("cifar10", "mean", "image_auroc", "PANDA") == {"NoCo": 96.2}
    assert published_by_paper("demo", "brick", "image_auroc", "PaDiM") == {}


def test_notes_count_an_image_once_over_seeds_and_selections():
    rows = []
    for select in ("last", "best_test"):
        rows += make_rows({"tile": [0.9, 0.9]}, select, skipped=2, empty_masks=0)
        rows += make_rows({"wood": [0.9, 0.9]}, select, skipped=1, empty_masks=5)
    unreadable, empty = row_notes(rows)
    assert unreadable.startswith("3 unreadable images were left out (--skip-unreadable)")
    assert empty.startswith("5 anomalous test images have an empty mask")
    shared, _ = row_notes(rows, shared_images=True)
    assert shared.startswith("2 unreadable images")
    assert row_notes(make_rows({"tile": [0.9]}, skipped=0, empty_masks=0)) == []


def test_undefined_reasons_come_from_the_rows():
    first, second = "pixel_auroc: no masks; aupro: no masks", "image_auroc: no normal images"
    reasons = undefined_reasons([{"undefined": text} for text in (first, second, "")])
    no_masks = dict.fromkeys(("pixel_auroc", "aupro"), "no masks")
    assert reasons == {**no_masks, "image_auroc": "no normal images"}


def test_a_table_comes_back_from_json_or_is_refused():
    rows = make_rows({"a": [math.nan, 0.5], "b": [0.5, 0.7]})
    table = make_table(rows, ["a", "b"], seeds=(0, 1), notes=["one", "two"])
    text = table.to_json()
    assert Table.from_json(text).to_json() == text
    assert Table.from_json(text).texts() == table.texts()
    for other in ("", "[]", "{}", "null", text[:-5], text.replace('"std"', '"deviation"')):
        with pytest.raises(ValueError, match=r"not a table|Expecting|delimiter"):
            Table.from_json(other)
    with pytest.raises(ValueError, match="not the columns' number of cells"):
        Table.from_json(json.dumps({**json.loads(text), "columns": []}))
