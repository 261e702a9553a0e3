"""The report of a run: what it says, that it is safe to open, and that its filter works."""

import base64
import csv
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from figures.report import page as report
from figures.report import pictures as report_pictures
from figures.report import sections as report_sections
from figures.report.scores import Scored, image_auroc, roc, wrongness
from tests.scripts.runs import train_digits
from tests.scripts.test_train_mvtec import draw_turned_category, train
from utils.runs.rows import read_rows
from utils.runs.run import Run
from utils.runs.scores import TestScores
from utils.tables.table import Cell, Column, Row, Table

VOID = {"meta", "br", "img", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script>\"'&amp;"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")


class Page(HTMLParser):
    """A page's elements as (tag, attributes, [text]); fails where a tag is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.parents = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def of(self, tag, **attributes):
        """The elements with these attributes; None stands for any value."""
        return [
            element
            for element in self.elements
            if element[0] == tag
            and all(
                name.replace("_", "-") in element[1]
                and (value is None or element[1][name.replace("_", "-")] == value)
                for name, value in attributes.items()
            )
        ]

    def texts(self, tag, **attributes):
        return [" ".join("".join(texts).split()) for *_, texts in self.of(tag, **attributes)]


def programs(page):
    """The scripts that run; data blocks do not."""
    return [texts for _, attributes, texts in page.of("script") if "type" not in attributes]


def page_of(folder, *options):
    path = report.main([str(folder), *options])
    text = path.read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return train_digits(tmp_path_factory.mktemp("digits"), "--seeds", "0", "1")


@pytest.fixture(scope="module")
def structured(tmp_path_factory):
    root = tmp_path_factory.mktemp("images with spaces")
    for seed, category in enumerate(("cloth", "wood")):
        draw_turned_category(root, category, seed, num_train=5, num_test=3)
    options = ("--overlays", "2", "--select", "synthetic")
    return train(root, tmp_path_factory.mktemp("run"), *options)


@pytest.fixture(scope="module")
def digits_page(digits):
    return page_of(digits)


@pytest.fixture(scope="module")
def structured_page(structured):
    return page_of(structured)


def make_run(
    folder,
    categories=("a", "b"),
    *,
    finished=None,
    columns=(),
    paths=None,
    seeds=(0,),
    draw=0,
    **config,
):
    """A run without training, whose scores are drawn at random."""
    config = {"dataset": "demo", "method_name": "noco", "method": {"epochs": 2}} | config
    run = Run.open(folder, config, categories=categories, seeds=seeds, command=["x"], device="cpu")
    rng = np.random.default_rng(draw)
    for category, seed in itertools.product(categories, seeds):
        for step in (1, 2):
            run.log(category, seed, event="step", step=step, loss=3.0 / step)
        if finished is not None and category not in finished:
            continue
        labels, scores = np.arange(30) % 2, rng.normal(size=30).astype(np.float32)
        names = paths or [f"{category}/{i}.png" for i in range(30)]
        kinds = ["crack" if label else "good" for label in labels]
        run.save_scores(
            category, seed, TestScores(paths=names, labels=labels, scores=scores, defects=kinds)
        )
        run.save_head(category, seed, {"w": torch.zeros(1)}, {})
        row = {"category": category, "seed": seed, "select": "last"}
        row |= {"image_auroc": roc_auc_score(labels, scores), "pixel_auroc": math.nan}
        run.finish({(category, seed): [row | {"num_test": 30, "undefined": ""} | dict(columns)]})
    return folder


def scored(labels, scores):
    names = [str(i) for i in range(len(labels))]
    return Scored("a", 0, names, labels, scores, names)


def dumped(url, tmp_path):
    """The document after its script ran."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'chromium'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "</html>" in done.stdout, done.stderr
    return Page(done.stdout)


def test_numbers_are_those_of_the_table(digits, digits_page):
    page, _ = digits_page
    with (digits / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["category"] for line in lines] == ["0", "1", "mean"]
    cells = [attributes["title"] for _, attributes, _ in page.of("td", title=None)]
    shown = page.texts("td", title=None)
    names = [name for name in lines[0] if name != "category" and not name.endswith("_std")]
    expected = [(line[name], line[f"{name}_std"]) for line in lines for name in names]
    assert cells == [f"{mean} ± {std}" for mean, std in expected]
    assert shown == [f"{float(mean):.1f} ± {float(std):.1f}" for mean, std in expected]
    assert "n = 2 seeds (0, 1)" in "".join(page.texts("section", id="results"))
    # The curves are drawn from the scores, the table from results.csv.
    for row in read_rows(digits / "results.csv"):
        key = f"seed {row['seed']}: AUROC {100 * row['image_auroc']:.1f} %"
        assert (
            key in page.texts("section", data_category=row["category"], **{"class": "category"})[0]
        )


def test_head_says_how_the_run_was_made(digits, digits_page):
    page, _ = digits_page
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    record = json.loads((digits / "environment.json").read_text())
    assert facts["command"] == record["command"]
    assert facts["reported"] == "last"
    assert facts["seeds"] == "0, 1"
    assert facts["versions"].startswith(f"python {record['versions']['python']}, torch ")
    if record["commit"]:
        assert facts["commit"].startswith(record["commit"][:12])
        assert facts["commit"].endswith("uncommitted changes") == bool(record["dirty"])
    assert "method.epochs" in page.texts("th", scope="row")


@pytest.mark.parametrize("name", ["digits", "structured"])
def test_page_reads_nothing_but_itself(name, request):
    page, text = request.getfixturevalue(f"{name}_page")
    for tag, attributes, _ in page.elements:
        assert tag not in {"link", "iframe", "object", "base"}
        for attribute in ("src", "href", "data", "action", "srcset"):
            value = attributes.get(attribute)
            assert value is None or value.startswith(("data:image/", "#")), (tag, value)
    assert not re.search(r"url\(|@import|https?:", text)
    assert len(programs(page)) == 1
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(text) < 2_000_000


def test_digits_have_no_files_and_say_so(digits_page):
    page, _ = digits_page
    assert page.texts("table", id="images")[0].count("image not found") == 40
    assert {"0: gallery", "1: gallery"} < set(page.texts("summary"))


def pictured(element_source):
    """The pixels of a data URL."""
    data = base64.b64decode(element_source.partition(",")[2])
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)


def test_strips_show_the_named_images_most_wrong_first(structured, structured_page):
    page, _ = structured_page
    strips = page.of("figure", data_label=None)
    assert len(strips) == 8  # two normals and two defects of each category
    images = [a["src"] for _, a, _ in page.of("img") if a["alt"].startswith("overlay of ")]
    wrong = [float(text.split()[0]) for text in page.texts("b")]
    assert wrong == sorted(wrong, reverse=True)
    run = Run.read(structured)
    for (_, attributes, texts), source in zip(strips, images, strict=True):
        scores = run.load_scores(attributes["data-category"], 0)
        shown = pictured(source)  # four panels with gaps between
        panel = Image.fromarray(shown[:, : shown.shape[0]].astype(np.uint8)).resize((64, 64))
        distances = [
            np.abs(np.array(Image.open(path).convert("RGB"), float) - np.array(panel)).mean()
            for path in scores["path"]
        ]
        place = int(np.argmin(distances))
        caption = "".join(texts)
        assert scores["path"][place] in caption
        assert f"score {scores['score'][place]:.4g} " in caption
        assert scores["defect"][place] == attributes["data-kind"]
        assert (attributes["data-label"] == "anomalous") == scores["label"][place]


def test_images_are_listed_by_how_wrong_they_are(structured):
    page, _ = page_of(structured, "--images", "5")
    rows = page.of("tr", data_label=None)
    assert len(rows) == 10
    listed = [(row[1]["data-category"], [t for t in row[2] if t.strip()][-1]) for row in rows]
    run, order = Run.read(structured), {}
    for category in ("cloth", "wood"):
        scores = run.load_scores(category, 0)
        wrong = wrongness(scores["label"], scores["score"])
        for label, sign in ((0, -1), (1, 1)):
            own = np.flatnonzero(scores["label"] == label)
            for rank, place in enumerate(own[np.argsort(sign * scores["score"][own])]):
                order[category, scores["path"][place]] = (-wrong[place], rank)
    assert [order[pair] for pair in listed] == sorted(order[pair] for pair in listed)
    for category in ("cloth", "wood"):
        worst = sorted(value for (name, _), value in order.items() if name == category)
        assert [order[pair] for pair in listed if pair[0] == category] == worst[:5]
    thumbnails = [a["src"] for _, a, _ in page.of("img") if a["src"].startswith("data:image/jpeg")]
    assert len(thumbnails) == 10
    assert pictured(thumbnails[0]).shape == (64, 64, 3)


def test_structured_run_shows_its_selection(structured_page):
    page, _ = structured_page
    charts = page.texts("figcaption")
    for title in ("ROC", "Scores, seed 0", "Selection", "training loss"):
        assert charts.count(title) == 2
    assert len(page.of("path", **{"class": "star"})) == 4  # in the charts and in their legends


def test_without_thumbnails_no_image_is_opened(structured, monkeypatch):
    monkeypatch.setattr(report_sections, "thumbnail", None)
    _, text = page_of(structured, "--no-thumbnails")
    assert "data:image/jpeg" not in text


@needs_chromium
def test_filter_hides_what_is_not_asked_for(structured_page, tmp_path):
    (tmp_path / "r.html").write_text(structured_page[1], encoding="utf-8")
    page = dumped(f"{(tmp_path / 'r.html').as_uri()}#category=wood&kind=turned", tmp_path)
    assert not any("hidden" in a for _, a, _ in page.of("form"))
    marked = [a for tag, a, _ in page.elements if "data-category" in a and tag != "option"]
    assert {a["data-category"] for a in marked} == {"cloth", "wood"}
    for attributes in marked:
        shown = attributes["data-category"] == "wood"
        shown &= attributes.get("data-kind", "turned") == "turned"
        assert ("hidden" not in attributes) == shown
    assert any("data-kind" in a and "hidden" not in a for a in marked)


@needs_chromium
def test_table_sorts_by_a_head_and_no_other_script_runs(structured_page, tmp_path):
    _, text = structured_page
    click = "<script>document.querySelectorAll('#images th button')[5].click()</script></body>"
    scripted = tmp_path / "scripted.html"
    scripted.write_text(text.replace("</body>", click), encoding="utf-8")
    blocked = dumped(scripted.as_uri(), tmp_path)
    assert [a["data-sort"] for _, a, _ in blocked.of("th", aria_sort=None)] == ["number"]
    assert blocked.texts("th", aria_sort=None) == ["wrong, %"]
    unguarded = re.sub(r"<meta http-equiv=.*?>", "", text)
    scripted.write_text(unguarded.replace("</body>", click), encoding="utf-8")
    page = dumped(scripted.as_uri(), tmp_path)
    assert page.texts("th", aria_sort="descending") == ["score"]
    scores = [float(a["data-value"]) for _, a, _ in page.of("td", data_value=None)][2::3]
    assert len(scores) > 10
    assert scores == sorted(scores, reverse=True)


def test_names_are_data(tmp_path):
    folder = make_run(tmp_path / "run", (HOSTILE, "b"), note=HOSTILE, paths=[HOSTILE] * 30)
    page, text = page_of(folder)
    assert len(programs(page)) == 1
    assert "<script>alert" not in text
    assert HOSTILE in {a["data-category"] for _, a, _ in page.of("tr", data_category=None)}
    assert HOSTILE in page.texts("h3")
    assert json.dumps(HOSTILE) in page.texts("code")


def test_a_folder_edited_by_hand_stays_data(tmp_path):
    folder = make_run(tmp_path / "run")
    column = Column("x", HOSTILE, HOSTILE, HOSTILE)
    rows = (Row("a", "a", (Cell(50.0),)), Row(HOSTILE, HOSTILE, (Cell(text=HOSTILE),)))
    table = Table("category", HOSTILE, (column,), rows, (HOSTILE,))
    (folder / "table.json").write_text(table.to_json())
    (folder / "environment.json").write_text(json.dumps({"command": HOSTILE, "versions": 3}))
    page, text = page_of(folder)
    assert len(programs(page)) == 1
    assert "<script>alert" not in text
    assert "Older than results.csv: without b." in page.texts("li")
    assert page.texts("td", title="50.0") == ["50.0"]
    (results,) = page.texts("section", id="results")
    assert results.count(HOSTILE) == 6  # caption, head and its group, row, cell, note


@pytest.mark.parametrize(
    ("cell", "column", "notes"),
    [
        ({}, {}, ()),
        ({"mean": "high"}, {}, ()),
        ({"mean": 1.0, "std": "wide"}, {}, ()),
        ({"mean": 1.0}, {"digits": "no format"}, ()),
        ({"mean": 1.0}, {"digits": "d"}, ()),
        ({"mean": 1.0}, {"digits": "99999.1f"}, ()),  # as wide as a page
        ({"mean": 1.0}, {}, 3),
    ],
)
def test_a_table_edited_by_hand_is_refused_if_it_is_none(tmp_path, capsys, cell, column, notes):
    folder = make_run(tmp_path / "run")
    head = {"key": "k", "name": "n", "group": "", "metric": "image_auroc", "digits": ".1f"} | column
    rows = [{"key": "a", "label": "a", "cells": [cell] if cell else []}]
    table = {"corner": "category", "caption": "c", "columns": [head], "rows": rows, "notes": notes}
    (folder / "table.json").write_text(json.dumps(table))
    exits_with("table.json: corrupt", folder, capsys=capsys)


@needs_chromium
def test_hostile_names_can_be_filtered(tmp_path):
    folder = make_run(tmp_path / "run", (HOSTILE, "b"))
    report.main([str(folder)])
    url = (folder / "report.html").as_uri()
    page = dumped(f"{url}#category=%3Cscript%3Ealert(1)%3C%2Fscript%3E%22'%26amp%3B", tmp_path)
    rows = page.of("tr", data_category=None)
    assert {a["data-category"] for _, a, _ in rows} == {HOSTILE, "b"}
    assert all(("hidden" in a) == (a["data-category"] == "b") for _, a, _ in rows)


def test_run_that_is_not_finished_gives_what_is_there(tmp_path):
    folder = make_run(tmp_path / "run", finished=("a",), categories=("a", "b"))
    page, _ = page_of(folder)
    (warning,) = page.texts("p", **{"class": "warning"})
    assert warning.startswith("This run is not finished. Missing: b, seed 0.")
    value = 100 * read_rows(folder / "results.csv")[0]["image_auroc"]
    assert f"{value:.1f}" in page.texts("td", title=None)
    assert page.texts("h3") == ["a", "b"]
    assert page.texts("figcaption").count("training loss") == 2
    assert page.texts("figcaption").count("ROC") == 1


def test_run_that_only_began(tmp_path):
    config = {"dataset": "demo", "method_name": "noco", "method": {}}
    pairs = {"categories": ["a"], "seeds": [3]}
    Run.open(tmp_path / "run", config | pairs, **pairs, command=["x"], device="cpu")
    page, _ = page_of(tmp_path / "run")
    (warning,) = page.texts("p", **{"class": "warning"})
    assert "has no results yet. Missing: a, seed 3." in warning


def exits_with(message, *arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_cannot_be_reported_is_said_in_one_message(tmp_path, capsys):
    exits_with("not a run folder", tmp_path, capsys=capsys)
    exits_with("not a run folder", tmp_path / "absent", capsys=capsys)
    folder = make_run(tmp_path / "run")
    exits_with("cannot be written", folder, "--out", tmp_path, capsys=capsys)
    exits_with("--images -1", folder, "--images", "-1", capsys=capsys)
    scores = Run.read(folder).scores_path("b", 0)
    whole = scores.read_bytes()
    scores.write_bytes(whole[:100])
    exits_with("b-seed0.npz: corrupt", folder, capsys=capsys)
    np.savez(scores.open("wb"), path=["x"], label=[0], score=[math.nan], defect=["good"])
    exits_with("not a finite number", folder, capsys=capsys)
    scores.write_bytes(whole)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "selection", "category": "a", "seed": 0}\n')
    exits_with("is not one of a run", folder, capsys=capsys)
    (folder / "config.json").write_text("{}")
    exits_with("no dataset, method, method_name", folder, capsys=capsys)


def test_scores_changed_afterwards_are_noticed(tmp_path):
    folder = make_run(tmp_path / "run")
    assert not page_of(folder)[0].texts("p", **{"class": "warning"})
    path = Run.read(folder).scores_path("b", 0)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"score": -arrays["score"]})
    warnings = page_of(folder)[0].texts("p", **{"class": "warning"})
    assert [text for text in warnings if "image AUROC of results.csv for b, seed 0" in text]


def test_columns_of_later_versions_are_shown(tmp_path):
    columns = {"false_alarm_rate_seen": 0.0625, "flux_capacitor": 1.21}
    page, _ = page_of(make_run(tmp_path / "run", columns=columns))
    (results,), (facts,) = (page.texts("section", id=name) for name in ("results", "facts"))
    assert "false alarm rate seen" in results
    assert "0.0625" in results
    assert "flux capacitor" in facts
    assert "1.21" in facts


def test_pictures_are_left_out_rather_than_the_size_exceeded(
    structured, structured_page, monkeypatch, tmp_path, capsys
):
    _, whole = structured_page
    monkeypatch.setattr(report, "MAX_BYTES", 60_000)
    page, text = page_of(structured, "--out", str(tmp_path / "small.html"))
    assert capsys.readouterr().out == f"{tmp_path / 'small.html'}\n"
    assert len(text) < len(whole)
    pictures = sum(len(a["src"]) for _, a, _ in page.of("img"))
    assert 40_000 < pictures <= 60_000 * 4 / 3 + 100 * len(page.of("img"))
    assert "pictures were left out" in page.texts("section", id="pictures")[0]


def test_sheets_of_another_shape_are_shown_whole(tmp_path):
    folder = make_run(tmp_path / "run", overlays=8)
    sheet = folder / "overlays/a-seed0/highest_normals.png"
    sheet.parent.mkdir(parents=True)
    Image.new("RGB", (1001, 300)).save(sheet)
    page, _ = page_of(folder)
    assert "a: highest normals" in page.texts("summary")
    assert not page.of("figure", data_label=None)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("deep.png", Image.fromarray(np.arange(10000, dtype=np.uint16).reshape(100, 100) * 6)),
        ("float.tif", Image.fromarray(np.linspace(0, 1, 900, dtype=np.float32).reshape(30, 30))),
        ("palette.png", Image.new("P", (300, 20))),
        ("clear.png", Image.new("RGBA", (20, 300))),
        ("print.jpg", Image.new("CMYK", (50, 50))),
    ],
)
def test_thumbnails_of_odd_images(tmp_path, name, image):
    image.save(tmp_path / name)
    picture, remark = report_pictures.thumbnail(tmp_path / name, report_pictures.Budget(10**6))
    assert remark == ""
    assert max(picture.width, picture.height) <= 128
    if name in ("deep.png", "float.tif"):  # as dark at its start as it is bright at its end
        shown = pictured(picture.url)
        assert shown[0, 0].mean() < 20
        assert shown[-1, -1].mean() > 235


def test_thumbnails_of_what_is_no_image(tmp_path):
    budget = report_pictures.Budget(10**6)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    assert "cannot be read" in report_pictures.thumbnail(tmp_path / "cut.png", budget)[1]
    assert report_pictures.thumbnail(tmp_path, budget)[1] == "image not found"
    Image.new("1", (20_000, 6_000)).save(tmp_path / "bomb.png")
    assert "image" in report_pictures.thumbnail(tmp_path / "bomb.png", budget)[1]


@pytest.mark.parametrize("ties", [False, True])
def test_roc_is_exact(ties):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    scores = rng.normal(labels, 1.0)
    if ties:
        scores = scores.round(1)
    false, true = roc(labels, scores)
    corners = list(zip(false / false[-1], true / true[-1], strict=True))
    every = set(zip(*roc_curve(labels, scores, drop_intermediate=False)[:2], strict=True))
    assert set(corners) <= every
    assert (corners[0], corners[-1]) == ((0, 0), (1, 1))
    assert len(set(corners)) == len(corners) < len(every)
    slopes = [math.atan2(*step) for step in zip(np.diff(true), np.diff(false), strict=True)]
    assert all(one != other for one, other in itertools.pairwise(slopes))
    expected = pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert image_auroc(scored(labels, scores)) == expected


def test_wrongness_counts_the_other_class():
    rng = np.random.default_rng(2)
    labels, scores = rng.integers(0, 2, 60), rng.normal(size=60).round(1)
    for label, score, wrong in zip(labels, scores, wrongness(labels, scores), strict=True):
        others = scores[labels != label]
        worse = others > score if label else others < score
        assert wrong == pytest.approx(worse.mean() + (others == score).mean() / 2)
    for label in (0, 1):
        mean = wrongness(labels, scores)[labels == label].mean()
        assert mean == pytest.approx(1 - roc_auc_score(labels, scores))
    assert np.isnan(wrongness(np.zeros(3, int), np.arange(3.0))).all()
    assert math.isnan(image_auroc(scored(np.ones(3, int), np.arange(3.0))))
    assert math.isnan(image_auroc(scored(np.zeros(3, int), np.arange(3.0))))


def test_a_test_set_without_anomalies(tmp_path):
    folder = make_run(tmp_path / "run", ("a",))
    path = Run.read(folder).scores_path("a", 0)
    np.savez(path, **dict(np.load(path)) | {"label": np.zeros(30, int)})
    page, _ = page_of(folder)
    assert "No ROC curve" in page.texts("section", id="curves")[0]
    assert "–" in page.texts("table", id="images")[0]
