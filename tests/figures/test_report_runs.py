"""Several runs in one report, side by side, and the near-duplicates that a run logged."""

import math
import re
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from figures.report import page as report
from tests.figures.test_report import (
    HOSTILE,
    dumped,
    exits_with,
    make_run,
    needs_chromium,
    page_of,
    pictured,
    programs,
)
from utils.runs.rows import read_rows, write_rows
from utils.runs.run import Run
from utils.runs.scores import TestScores

TIMES = {
    **{"fit_seconds": 2.5, "pass_test_seconds": 1.0, "score_seconds": 0.5, "head_bytes": 3_000_000},
    "peak_bytes": 1_234_000_000,
    **{"twins": "", "remarks": ""},
}
PAIRS = [["test/0.png", "train/9.png", 0.97], ["test/1.png", "train/3.png", 0.99]]


@pytest.fixture
def two(tmp_path):
    """Two runs of two seeds on the same images."""
    return [
        make_run(tmp_path / "one", seeds=(0, 1), draw=0, columns=TIMES),
        make_run(tmp_path / "two", seeds=(0, 1), draw=1, columns=TIMES, method_name="knn"),
    ]


def together(folders, tmp_path, *options):
    out = tmp_path / "both.html"
    words = [str(folder) for folder in folders]
    assert report.main([*words, "--out", str(out), *options]) == out
    return page_of(folders[0], *words[1:], "--out", str(out), *options)


def rewrite(folder, category, change, seed=0):
    """Change the arrays of a pair's scores."""
    path = Run.read(folder).scores_path(category, seed)
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, **change(arrays)})


def refusal(capsys, *folders):
    with pytest.raises(SystemExit) as stopped:
        report.main([*map(str, folders), "--out", str(folders[0] / "both.html")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (folders[0] / "both.html").exists()
    return error


def cells_of(page, table_of):
    """The texts of the rows of the first table in a section."""
    rows, inside = [], False
    for tag, attributes, texts in page.elements:
        inside |= attributes.get("id") == table_of
        if inside and tag == "tr":
            rows.append([])
        elif inside and tag in ("th", "td"):
            rows[-1].append(" ".join("".join(texts).split()))
        elif inside and rows and tag in ("h3", "p"):
            return rows
    return rows


def test_the_table_has_a_line_for_each_run(two, tmp_path):
    page, _ = together(two, tmp_path)
    head, *lines = cells_of(page, "together")
    assert head == [
        *("run", "selection", "seeds", "image AUROC"),
        *("fit, s", "images/s", "memory, MB", "head, MB"),
    ]
    for folder, label, line in zip(two, ("noco", "knn"), lines, strict=True):
        values = {}
        for row in read_rows(folder / "results.csv"):
            values.setdefault(row["seed"], []).append(100 * row["image_auroc"])
        means = [statistics.fmean(value) for value in values.values()]
        said = f"{statistics.fmean(means):.1f} ± {statistics.stdev(means):.1f}"
        assert line == [label, "last", "0, 1", said, "2.5", "20", "1234", "3"]


def test_runs_of_one_method_are_told_apart_by_their_options(tmp_path):
    folders = [
        make_run(tmp_path / str(epochs), columns=TIMES, method={"epochs": epochs})
        for epochs in (2, 5)
    ]
    page, _ = together(folders, tmp_path)
    assert [row[0] for row in cells_of(page, "together")[1:]] == [
        "noco, epochs 2",
        "noco, epochs 5",
    ]
    assert {"noco, epochs 2", "noco, epochs 5"} <= set(page.texts("h2"))


def test_curves_of_all_runs_are_overlaid(two, tmp_path):
    page, _ = together(two, tmp_path)
    (section,) = page.texts("section", id="together")
    for category in "ab":
        assert f"ROC, {category}" in section
        for folder, label in zip(two, ("noco", "knn"), strict=True):
            arrays = Run.read(folder).load_scores(category, 0)
            auroc = roc_auc_score(arrays["label"], arrays["score"])
            assert f"{label}: AUROC {100 * auroc:.1f} %" in section


def test_images_are_listed_by_how_far_apart_their_ranks_are(two, tmp_path):
    page, _ = together(two, tmp_path, "--images", "4")
    head, *rows = cells_of(page, "disputed")
    assert head[4:7] == ["apart, %", "noco", "knn"]
    expected = []
    for category in "ab":
        arrays = [Run.read(folder).load_scores(category, 0) for folder in two]
        ranks = np.stack([rankdata(-one["score"]) for one in arrays])
        apart = np.ptp(ranks, axis=0)
        for place in np.argsort(-apart, kind="stable")[:4]:
            texts = [f"{rank:g} of 30" for rank in ranks[:, place]]
            expected.append((apart[place] / 30, category, texts, arrays[0]["path"][place]))
    expected.sort(key=lambda one: -one[0])
    assert [(row[1], row[5:7], row[7]) for row in rows] == [one[1:] for one in expected]
    assert [row[4] for row in rows] == [f"{100 * one[0]:.1f}" for one in expected]


def test_runs_that_agree_have_no_disputed_image(tmp_path):
    folders = [
        make_run(tmp_path / str(k), columns=TIMES, method={"epochs": 2 + k}) for k in range(2)
    ]
    page, _ = together(folders, tmp_path)
    assert "Nowhere: every image has the same rank" in page.texts("section", id="together")[0]
    assert not page.of("table", id="disputed")


def test_each_run_has_its_own_sections(two, tmp_path):
    alone = [page_of(folder)[0] for folder in two]
    page, _ = together(two, tmp_path)
    for number, one in enumerate(alone, start=1):
        for name in ("results", "curves", "leaks", "pictures", "mistakes", "facts"):
            assert page.texts("section", id=f"run{number}-{name}") == one.texts("section", id=name)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a, _ in page.of("a")} <= set(ids)
    assert len(programs(page)) == 1


def test_a_data_set_that_was_moved_is_the_same(two, tmp_path):
    before = cells_of(together(two, tmp_path)[0], "disputed")

    def moved(arrays):
        order = np.random.default_rng(0).permutation(len(arrays["path"]))
        elsewhere = np.array([f"other/place/set/x/{name}" for name in arrays["path"]])
        return {**{name: array[order] for name, array in arrays.items()}, "path": elsewhere[order]}

    def below(arrays):
        return {"path": np.array([f"set/x/{name}" for name in arrays["path"]])}

    rewrite(two[0], "a", below)
    rewrite(two[1], "a", moved)
    after = cells_of(together(two, tmp_path)[0], "disputed")
    assert [row[4:7] for row in after] == [row[4:7] for row in before]


def test_runs_on_other_images_are_refused(tmp_path, capsys):
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", dataset="mvtec")
    error = refusal(capsys, one, other)
    assert f"must be on one data set ({one}: demo; {other}: mvtec)" in error
    other = make_run(tmp_path / "categories", ("c", "d"), finished=("d",))
    assert f"category in common ({one}: a, b; {other}: d)" in refusal(capsys, one, other)
    other = make_run(tmp_path / "images", paths=[f"x/{i}.png" for i in range(30)])
    error = refusal(capsys, one, other)
    assert f"a: {other} and {one} were tested on other images: 60 are in one only" in error
    other = make_run(tmp_path / "labels", draw=1)
    rewrite(other, "b", lambda arrays: {"label": 1 - arrays["label"]})
    error = refusal(capsys, one, other)
    assert f"b: {other} and {one} do not agree what is anomalous: 30 test images" in error
    Run.read(other).scores_path("b", 0).unlink()
    assert "missing, so this run cannot stand beside others" in refusal(capsys, one, other)


def test_several_runs_need_a_file_and_other_folders(two, capsys):
    exits_with("name the file of their page with --out", *two, capsys=capsys)
    exits_with("named twice", two[0], two[0], "--out", "x.html", capsys=capsys)


def test_categories_that_only_some_have_are_named(tmp_path):
    one = make_run(tmp_path / "one", ("a", "b", "c"), columns=TIMES)
    other = make_run(tmp_path / "other", ("a", "b"), draw=1, columns=TIMES, method_name="knn")
    page, _ = together([one, other], tmp_path)
    assert "Left out of noco: c." in page.texts("p", **{"class": "small"})
    assert "Over a, b, which all" in page.texts("section", id="together")[0]


def test_names_of_runs_and_images_are_data(tmp_path):
    paths = [f"{HOSTILE}/{i}.png" for i in range(30)]
    folders = [
        make_run(tmp_path / str(k), (HOSTILE,), paths=paths, draw=k, method_name=f"{HOSTILE}{k}")
        for k in range(2)
    ]
    run = Run.open(
        folders[0], Run.read(folders[0]).config, categories=(HOSTILE,), seeds=(0,),
        command=["x"], device="cpu",
    )  # fmt: skip
    run.log(HOSTILE, 0, event="twins", what=HOSTILE, pairs=[[HOSTILE, HOSTILE, 0.99]])
    page, text = together(folders, tmp_path)
    assert len(programs(page)) == 1
    assert "<script>alert" not in text
    assert f"{HOSTILE}1" in page.texts("h2")
    assert page.texts("td", **{"class": "path"}).count(HOSTILE) == 2


def test_pictures_of_all_runs_share_one_budget(tmp_path, monkeypatch):
    paths = []
    for place in range(30):
        paths.append(tmp_path / f"{place}.png")
        Image.effect_noise((128, 128), 90).save(paths[-1])
    folders = [
        make_run(tmp_path / str(k), ("a",), paths=paths, draw=k, method={"epochs": 2 + k})
        for k in range(2)
    ]
    whole, _ = together(folders, tmp_path)
    assert len(whole.of("img")) == 60
    monkeypatch.setattr(report, "MAX_BYTES", 100_000)
    page, _ = together(folders, tmp_path)
    pictures = [a["src"] for _, a, _ in page.of("img")]
    assert 0 < len(pictures) < 60
    assert 70_000 < sum(map(len, pictures)) <= 100_000 * 4 / 3 + 100 * len(pictures)
    assert "left out for size" in page.texts("table", id="disputed")[0]


@needs_chromium
def test_a_link_opens_the_run_and_moves_its_threshold_only(two, tmp_path):
    together(two, tmp_path)
    scores = Run.read(two[1]).load_scores("b", 0)
    threshold = float(np.median(scores["score"]))
    url = f"{(tmp_path / 'both.html').as_uri()}#run=run2-&of=b&threshold={threshold}"
    page = dumped(url, tmp_path)
    opened = ["open" in a for _, a, _ in page.of("details", **{"class": "run"})]
    assert opened == [False, True]
    alarms = int((scores["score"][scores["label"] == 0] > threshold).sum())
    shown = page.texts("b", data_count="false alarms")
    assert shown[3] == f"{alarms} of 15 ({100 * alarms / 15:.1f} %)"
    moved = page.texts("b", data_count="threshold")
    assert float(moved[3]) == pytest.approx(threshold, rel=1e-4)
    unmoved = dumped((tmp_path / "both.html").as_uri(), tmp_path)
    assert (
        page.texts("b", data_count="threshold")[:3]
        == unmoved.texts("b", data_count="threshold")[:3]
    )
    assert not [a for _, a, _ in unmoved.of("details", **{"class": "run"}) if "open" in a]
    anchored = dumped(f"{(tmp_path / 'both.html').as_uri()}#run1-mistakes", tmp_path)
    opened = ["open" in a for _, a, _ in anchored.of("details", **{"class": "run"})]
    assert opened == [True, False]


@needs_chromium
def test_printing_opens_all_and_closes_it_again(two, tmp_path):
    _, text = together(two, tmp_path)
    events = """<script>
      const closed = () => document.querySelectorAll("details:not([open])").length;
      const said = [closed()];
      for (const name of ["beforeprint", "afterprint"]) {
        window.dispatchEvent(new Event(name));
        said.push(closed());
      }
      document.body.dataset.said = said.join(" ");
    </script></body>"""
    unguarded = re.sub(r"<meta http-equiv=.*?>", "", text).replace("</body>", events)
    (tmp_path / "printed.html").write_text(unguarded, encoding="utf-8")
    page = dumped((tmp_path / "printed.html").as_uri(), tmp_path)
    before, during, after = map(int, page.of("body")[0][1]["data-said"].split())
    assert during == 0 < before == after


def leaky(tmp_path, *, num_pairs=2, **columns):
    """A run whose category a has near-duplicates under both seeds."""
    folder = tmp_path / "run"
    config = {"dataset": "demo", "method_name": "noco", "method": {}}
    run = Run.open(folder, config, categories="ab", seeds=(0, 1), command=["x"], device="cpu")
    pairs = [*PAIRS, *([f"test/{k}.png", "train/0.png", 0.961] for k in range(2, num_pairs))]
    labels, scores = np.arange(10) % 2, np.linspace(0.0, 1.0, 10)
    for category in "ab":
        for seed in (0, 1):
            if category == "a":
                what = f"{num_pairs} of 10 test images have a twin in training"
                run.log(category, seed, event="twins", what=what, pairs=pairs)
            names = [f"{category}/{i}.png" for i in range(10)]
            kinds = ["crack" if label else "good" for label in labels]
            saved = TestScores(paths=names, labels=labels, scores=scores, defects=kinds)
            run.save_scores(category, seed, saved)
            run.save_head(category, seed, {"w": torch.zeros(1)}, {})
            row = {"category": category, "seed": seed, "select": "last", "image_auroc": 0.6}
            twins = {"twins": "2 of 10" if category == "a" else "", "remarks": ""}
            run.finish({(category, seed): [row | {"pixel_auroc": math.nan} | twins | columns]})
    return folder


def leaks_text(page):
    (text,) = page.texts("section", id="leaks")
    return text


def test_near_duplicates_are_listed_the_surest_first_and_once(tmp_path):
    page, _ = page_of(leaky(tmp_path, num_pairs=14))
    text = leaks_text(page)
    assert text.count("14 of 10 test images have a twin in training") == 1
    assert "14 pairs, the 10 surest of them here" in text
    pairs = [row for row in cells_of(page, "leaks") if len(row) == 3]
    assert pairs[0] == ["image", "its twin", "correlation"]
    assert pairs[1:3] == [
        ["test/1.png", "train/3.png", "0.9900"],
        ["test/0.png", "train/9.png", "0.9700"],
    ]
    assert len(pairs) == 11
    assert "numbers are too good" in text
    assert "twins.png is missing" in text
    assert "No near-duplicates were found of b:" in text
    assert page.texts("a", href="#leaks") == ["Leaks"]


def test_the_picture_of_twins_stands_among_the_leaks_only(tmp_path):
    folder = leaky(tmp_path)
    path = Run.read(folder).overlays_folder("a", 0) / "twins.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (400, 100), (20, 160, 20)).save(path)
    page, _ = page_of(folder)
    (image,) = [a for _, a, _ in page.of("img") if a["alt"] == "near-duplicates of a"]
    assert np.abs(pictured(image["src"]) - (20, 160, 20)).max() < 12
    assert len(page.of("img")) == 1
    assert "This run has drawn no overlays." in page.texts("section", id="pictures")[0]
    path.write_bytes(b"cut")
    with pytest.raises(SystemExit):
        page_of(folder)


def test_a_run_without_leaks_says_so_and_one_that_did_not_look_too(tmp_path):
    found = leaks_text(page_of(make_run(tmp_path / "none", columns=TIMES))[0])
    assert "No near-duplicates were found of a, b:" in found
    remark = "Leaks were not looked for: --cache none keeps no thumbnails."
    unseen = make_run(tmp_path / "unseen", columns=TIMES | {"remarks": remark})
    text = leaks_text(page_of(unseen)[0])
    assert text.count("were not looked for: --cache none") == 2
    assert "were found" not in text
    text = leaks_text(page_of(make_run(tmp_path / "earlier"))[0])
    assert text.count("were not looked for: an earlier version made this run") == 2
    begun = make_run(tmp_path / "begun", finished=("a",), columns=TIMES)
    text = leaks_text(page_of(begun)[0])
    assert "were found of a:" in text
    assert "Not known yet, since not finished: b." in text


def test_only_the_remark_of_the_training_script_counts(tmp_path):
    folder = make_run(tmp_path / "run", columns=TIMES)
    rows = read_rows(folder / "results.csv")
    write_rows(folder / "results.csv", list(rows[0]), [row | {"remarks": "Slow."} for row in rows])
    assert "No near-duplicates were found of a, b:" in leaks_text(page_of(folder)[0])


@pytest.mark.parametrize(
    "record",
    [
        {"what": 3, "pairs": PAIRS},
        {"pairs": PAIRS},
        {"what": "x"},
        {"what": "x", "pairs": [["one", "two"]]},
        {"what": "x", "pairs": [["one", "two", "0.9"]]},
        {"what": "x", "pairs": [["one", None, 0.9]]},
    ],
)
def test_records_that_are_no_pairs_are_an_error(tmp_path, record, capsys):
    folder = tmp_path / "run"
    config = {"dataset": "demo", "method_name": "noco", "method": {}}
    run = Run.open(folder, config, categories="a", seeds=(0,), command=["x"], device="cpu")
    run.log("a", 0, event="twins", **record)
    exits_with("metrics.jsonl: corrupt (the near-duplicates of a", folder, capsys=capsys)
