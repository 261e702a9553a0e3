"""What the report says of the kinds of defects that discover.py found in a run."""

import csv

import numpy as np
import pytest
from PIL import Image

from figures.report import page as report
from figures.report import sections
from figures.report.kinds import NARROWEST, WIDEST, read_findings, sheet_width
from tests.figures.test_report import exits_with, make_run, page_of, pictured, programs
from utils.discovery.files import (
    ImageRow,
    RegionRow,
    write_assignments,
    write_images,
    write_table,
)
from utils.discovery.measures import METRICS
from utils.discovery.naming import write_names

HTML = "<b>x<script>alert(1)</script>\"'&amp;"
RED, GREEN, BLUE, GREY = (220, 20, 20), (20, 160, 20), (20, 20, 220), (120, 120, 120)
SHARES = dict.fromkeys(METRICS, 0.5) | {"nmi": 0.79814, "ari": -0.0149, "f1": 1.0}
FACTS = {"method": "contrast", "masks": "normal", "was_estimated": 1, "names": 2, "seconds": 1.5}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def paint(path, colour, size=(1188, 300)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_category(folder, *, names=()):
    """Two kinds of three and of one image, a good image, five regions; return the counts."""
    names = dict(enumerate(names, start=1))
    labels = {0: "good", 1: names.get(1, "kind 1"), 2: names.get(2, "kind 2")}
    numbers = [0, 1, 1, 2, 1]
    images = [
        ImageRow(f"{i}.png", labels[n], None if n == 0 else 0.5, n, 1.0, "crack")
        for i, n in enumerate(numbers)
    ]
    owners = [(1, 1), (2, 1), (3, 2), (4, 1), (4, 2)]
    regions = [
        RegionRow(f"{i}.png", k, labels[n], 0.5, n, 1.0, 9, 0.0, 0.0, 3.0, 3.0, f"{i:05d}_{k}")
        for k, (i, n) in enumerate(owners)
    ]
    write_images(folder, images)
    write_assignments(folder, regions)
    write_names(folder, names, 2)
    paint(folder / "kinds/01.png", RED)
    paint(folder / "kinds/02.png", GREEN)
    paint(folder / "map.png", BLUE)
    paint(folder / "confusion.png", GREY)
    (folder / "state.json").write_text("{}")
    (folder / "state.safetensors").write_bytes(b"\0" * 16)
    return {"kinds": 2, "images": len(images), "regions": len(regions)}


def make_finding(run, name="contrast", categories=("a",), *, kind_names=(), **facts):
    """A folder as discover.py writes it."""
    folder = run / "discovery" / name
    rows = []
    for category in categories:
        counts = write_category(folder / category, names=kind_names)
        rows.append({**SHARES, **FACTS, **counts, "category": category, **facts})
    write_table(folder / "metrics.csv", list(rows[0]), rows)
    return folder


def edit_csv(path, change):
    """Replace the cells of a csv, its head among them."""
    with path.open(newline="") as file:
        cells = list(csv.reader(file))
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(change(cells))


def kinds_text(page):
    (text,) = page.texts("section", id="kinds")
    return text


def lines_of(page):
    """The cells of each line of the tables in the section, its heads left out."""
    lines, tags = [], iter(page.elements)
    next(a for _, a, _ in tags if a.get("id") == "kinds")
    for tag, attributes, texts in tags:
        if attributes.get("id") == "facts":
            break
        if tag == "tr":
            lines.append([])
        elif tag == "td" or (tag == "th" and attributes["scope"] == "row"):
            lines[-1].append("".join(texts))
    return [line for line in lines if line]


def sheets_of(page):
    """Summary -> the picture below it."""
    pictures, summary = {}, None
    for tag, attributes, texts in page.elements:
        if tag == "summary":
            summary = " ".join("".join(texts).split())
        elif tag == "img":
            pictures[summary] = attributes
    return pictures


def test_nothing_is_shown_of_a_run_without_findings(run):
    whole = page_of(run)[1]
    assert "Kinds of defects" not in whole
    assert "discover" not in whole
    (run / "discovery").mkdir()
    assert page_of(run)[1] == whole


def test_a_finding_is_shown_with_its_numbers(run):
    make_finding(run)
    page, _ = page_of(run)
    text = kinds_text(page)
    assert "Method contrast, masks normal." in text
    assert lines_of(page) == [["a", "2", "estimated", "2", "79.8", "-1.5", "100.0", "5", "5"]]
    assert "2 kinds in 5 regions of 5 images; nothing was found in 1 image (good)." in text
    assert "Upper bound" not in text
    assert "Missing" not in text
    summaries = page.texts("summary")
    assert "kind 1: 3 images, 3 regions" in summaries
    assert "kind 2: 1 image, 2 regions" in summaries
    assert page.texts("a", href="#kinds") == ["Kinds of defects"]


def test_each_picture_stands_below_its_own_words(run):
    make_finding(run)
    pictures = sheets_of(page_of(run)[0])
    for summary, colour in (
        ("kind 1: 3 images, 3 regions", RED),
        ("kind 2: 1 image, 2 regions", GREEN),
        ("Map of the regions", BLUE),
        ("Kinds against names", GREY),
    ):
        shown = pictured(pictures[summary]["src"])
        assert np.abs(shown - colour).max() < 12, summary
        assert shown.shape[1] == int(pictures[summary]["width"])
        assert pictures[summary]["alt"]
    assert pictures["kind 1: 3 images, 3 regions"]["width"] == str(WIDEST)


def test_page_with_kinds_reads_nothing_but_itself_and_repeats_no_id(run):
    make_finding(run)
    make_finding(run, "second")
    page, text = page_of(run)
    sources = [a["src"] for _, a, _ in page.of("img", src=None)]
    assert len(page.of("img", loading="lazy")) == len(sources)
    assert all(source.startswith("data:image/") for source in sources)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "http" not in text.replace("http-equiv", "")
    assert {"contrast", "second"} <= set(page.texts("h3"))


def test_without_names_nothing_is_compared(run):
    unknown = dict.fromkeys(METRICS, float("nan"))
    make_finding(run, names=0, was_estimated=0, **unknown)
    page, _ = page_of(run)
    text = kinds_text(page)
    assert lines_of(page) == [["a", "2", "given", "none known", "–", "–", "–", "5", "5"]]
    assert "2 kinds in 5 regions" in text
    assert "Kinds against names" not in page.texts("summary")  # it is of an earlier finding


def test_true_masks_are_called_an_upper_bound(run):
    make_finding(run, masks="true")
    assert "Upper bound: the masks are the data set's own" in kinds_text(page_of(run)[0])


@pytest.mark.parametrize("method", ["anomalyncd", "whole_image", "contrast"])
def test_methods_that_count_good_images_say_so(run, method):
    make_finding(run, method=method)
    said = "counts good images as a kind" in kinds_text(page_of(run)[0])
    assert said == (method != "contrast")


def test_the_mean_is_over_the_categories_with_names(run):
    folder = make_finding(run, categories=("a", "b", "c"))

    def change(cells):
        nmi = cells[0].index("nmi")
        cells[2][nmi] = "0.1000"
        for name in ("nmi", "ari", "f1"):
            cells[3][cells[0].index(name)] = "nan"
        return cells

    edit_csv(folder / "metrics.csv", change)
    page, _ = page_of(run)
    assert lines_of(page)[3] == ["mean", "", "", "", "44.9", "-1.5", "100.0", "", ""]
    marked = page.of("section", data_category=None)
    assert [a["data-category"] for _, a, _ in marked][-3:] == ["a", "b", "c"]


def test_names_of_categories_and_kinds_are_data(tmp_path):
    run = make_run(tmp_path / "run", (HTML, "b"))
    make_finding(run, name="<i>name", categories=(HTML,), kind_names=(HTML,), method=HTML)
    page, text = page_of(run)
    assert len(programs(page)) == 1
    assert "<script>alert" not in text
    assert "<b>x" not in text
    assert "<i>" not in text
    assert f"{HTML}: 3 images, 3 regions" in page.texts("summary")
    assert HTML in page.texts("h4")
    assert "<i>name" in page.texts("h3")
    assert f"Method {HTML}, masks normal." in kinds_text(page)


def test_names_that_the_user_gave_since_are_used(run):
    folder = make_finding(run, kind_names=("dent",))
    assert "dent: 3 images, 3 regions" in page_of(run)[0].texts("summary")
    write_names(folder / "a", {1: "scratch", 2: HTML}, 2)
    page, _ = page_of(run)
    assert "scratch (dent in the pictures): 3 images, 3 regions" in page.texts("summary")
    assert f"{HTML} (kind 2 in the pictures): 1 image, 2 regions" in page.texts("summary")
    (folder / "a/names.csv").unlink()
    page, _ = page_of(run)
    assert "dent: 3 images, 3 regions" in page.texts("summary")
    assert "Missing: names.csv." in kinds_text(page)


def test_a_finding_without_metrics_is_named_as_unfinished(run):
    write_category(run / "discovery/<u>begun/a")
    make_finding(run)
    page, text = page_of(run)
    assert "Not finished: <u>begun has no metrics.csv." in kinds_text(page)
    assert "<u>" not in text
    assert "kind 1: 3 images, 3 regions" in page.texts("summary")


def test_categories_without_a_line_are_named(run):
    folder = make_finding(run)
    assert "Without a line" not in kinds_text(page_of(run)[0])
    write_category(folder / "b")
    assert "Without a line in metrics.csv, so not shown: b." in kinds_text(page_of(run)[0])


def test_tables_of_two_findings_are_noticed(run):
    folder = make_finding(run)

    def longer(cells):
        return [*cells, cells[-1]]

    edit_csv(folder / "a/images.csv", longer)
    text = kinds_text(page_of(run)[0])
    assert "metrics.csv counts 5 images, 5 regions and 2 kinds" in text
    assert "have 6 and 5, and kinds up to number 2" in text


def test_more_kinds_than_counted_are_noticed_and_empty_ones_too(run):
    make_finding(run, kinds=1)
    assert "not of the same finding" in kinds_text(page_of(run)[0])
    make_finding(run, kinds=4)
    text = kinds_text(page_of(run)[0])
    assert "not of the same finding" not in text
    assert "2 of the kinds got neither image nor region." in text


@pytest.mark.parametrize("name", ["kinds/02.png", "map.png", "confusion.png"])
def test_a_missing_picture_is_said_to_be_missing(run, name):
    folder = make_finding(run)
    before = len(page_of(run)[0].of("img"))
    (folder / "a" / name).unlink()
    page, _ = page_of(run)
    assert f"{name.rpartition('/')[2]} is missing" in kinds_text(page)
    assert len(page.of("img")) == before - 1


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_missing_state_is_said_to_be_missing(run, name):
    folder = make_finding(run)
    (folder / "a" / name).unlink()
    text = kinds_text(page_of(run)[0])
    assert f"Missing: {name}. Without its state, new images cannot get these kinds." in text


def test_a_kind_of_images_alone_has_no_sheet(run):
    folder = make_finding(run)
    edit_csv(folder / "a/assignments.csv", lambda cells: [c for c in cells if c[2] != "kind 2"])
    page, _ = page_of(run)
    assert "kind 2: 1 image, 0 regions" in page.texts("summary")
    assert "no region, so no sheet" in kinds_text(page)


@pytest.mark.parametrize("name", ["kinds/01.png", "map.png", "confusion.png"])
def test_a_cut_picture_is_an_error_that_names_it(run, name, capsys):
    folder = make_finding(run)
    path = folder / "a" / name
    Image.effect_noise((300, 200), 60).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    exits_with(f"discovery/contrast/a/{name}: corrupt", run, capsys=capsys)
    path.write_bytes(b"")
    exits_with(f"discovery/contrast/a/{name}: corrupt", run, capsys=capsys)


@pytest.mark.parametrize("name", ["images.csv", "assignments.csv"])
def test_a_damaged_table_of_a_category_is_an_error_that_names_it(run, name, capsys):
    path = make_finding(run) / "a" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    exits_with(f"a/{name}: corrupt", run, capsys=capsys)
    edit_csv(path, lambda cells: [line[1:] for line in cells])
    exits_with(f"a/{name}: corrupt", run, capsys=capsys)
    path.unlink()
    exits_with(f"a/{name}: cannot be read", run, capsys=capsys)


def test_damaged_names_are_an_error_that_names_them(run, capsys):
    folder = make_finding(run)
    (folder / "a/names.csv").write_text("number,name\n1,x\n")
    exits_with("a/names.csv: the first line must be kind,name", run, capsys=capsys)


COLUMNS = ("nmi", "f1", "category", "method", "masks", "kinds", "was_estimated", "names", "regions")


@pytest.mark.parametrize("column", COLUMNS)
def test_metrics_without_a_column_are_an_error(run, column, capsys):
    folder = make_finding(run)

    def without(cells):
        place = cells[0].index(column)
        return [line[:place] + line[place + 1 :] for line in cells]

    edit_csv(folder / "metrics.csv", without)
    exits_with(f"contrast/metrics.csv: corrupt (no column {column})", run, capsys=capsys)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("nmi", "high"),
        ("nmi", "79.8"),
        ("ari", "inf"),
        ("kinds", "2.5"),
        ("images", "-1"),
        ("names", ""),
        ("category", ""),
        ("category", "../../elsewhere"),
        ("category", "/etc"),
    ],
)
def test_metrics_with_a_wrong_value_are_an_error(run, column, value, capsys):
    folder = make_finding(run)

    def change(cells):
        cells[1][cells[0].index(column)] = value
        return cells

    edit_csv(folder / "metrics.csv", change)
    exits_with("contrast/metrics.csv: corrupt (record 2: ", run, capsys=capsys)


def test_cut_and_doubled_metrics_are_errors(run, capsys):
    path = make_finding(run) / "metrics.csv"
    whole = path.read_bytes()
    for cut in (b"", whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(cut)
        exits_with("metrics.csv: corrupt (the last line is cut)", run, capsys=capsys)
    head, line, _ = whole.split(b"\n")
    path.write_bytes(head + b"\n")
    exits_with("metrics.csv: corrupt (no category in it)", run, capsys=capsys)
    path.write_bytes(b"\n".join([head, line, line, b""]))
    exits_with("record 3: a is there twice", run, capsys=capsys)
    path.write_bytes(head + b"\n" + line[: len(line) // 3] + b"\n")
    exits_with("metrics.csv: corrupt (record 2: ", run, capsys=capsys)


def test_columns_of_later_versions_are_no_error(run):
    folder = make_finding(run, flux_capacitor="1.21")
    (line,) = read_findings(run / "discovery")[0].lines
    assert (line.category, line.kinds, line.was_estimated) == ("a", 2, True)
    assert folder.is_dir()


def test_pictures_are_left_out_and_counted(run, monkeypatch):
    folder = make_finding(run, "first")
    for name in ("kinds/01.png", "kinds/02.png", "map.png", "confusion.png"):
        Image.effect_noise((300, 200), 90).save(folder / "a" / name)
    whole, _ = page_of(run)
    assert "left out" not in kinds_text(whole)
    monkeypatch.setattr(report, "MAX_BYTES", 150_000)
    page, _ = page_of(run)
    text = kinds_text(page)
    left_out = text.count("is left out for size")
    assert 0 < left_out < 4
    assert text.startswith("Kinds of defects")
    assert f"{left_out} pictures of kinds were left out" in text
    shown = [len(a["src"]) for _, a, _ in page.of("img")]
    assert 0 < sum(shown) <= 150_000 / 3 * 4 / 3 + 100 * len(shown)
    assert len(shown) == len(whole.of("img")) - left_out


def test_kinds_leave_the_other_pictures_their_bytes(run, monkeypatch):
    folder = make_finding(run)
    Image.effect_noise((900, 600), 90).save(folder / "a/map.png")
    seen = []

    class Watched(sections.Budget):
        def __init__(self, num_bytes):
            super().__init__(num_bytes)
            seen.append(self)
            self.num_bytes = num_bytes

    monkeypatch.setattr(sections, "Budget", Watched)
    page_of(run)
    kinds, *categories = seen
    assert kinds.spent > 10_000
    assert kinds.num_bytes == report.MAX_BYTES // 3
    assert len(categories) == 2
    assert {one.num_bytes for one in categories} == {(report.MAX_BYTES - kinds.spent) // 2}


def test_many_kinds_are_folded_and_drawn_smaller(run):
    make_finding(run)
    page, _ = page_of(run)
    assert len(page.of("details", open=None, **{"class": "sheet"})) == 4
    for number in range(7):
        make_finding(run, f"other {number}", categories=("a", "b", "c", "d"))
    page, _ = page_of(run)
    assert len(page.of("details", **{"class": "sheet"})) == 4 + 7 * 16
    # Maps and confusions of a finding of few categories stay open.
    assert len(page.of("details", open=None, **{"class": "sheet"})) == 2
    findings = read_findings(run / "discovery")
    assert sheet_width(findings, 10**9) == WIDEST
    assert sheet_width(findings, 10) == NARROWEST
    assert NARROWEST < sheet_width(findings, 1_500_000) < WIDEST
    assert sheet_width([], 10) == WIDEST
