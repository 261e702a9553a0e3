"""Thresholds in the report of a run: the counts, in Python and as the page recounts them."""

import base64
import hashlib
import itertools
import json
import math
import re
from urllib.parse import urlencode

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from figures.report import page as report
from figures.report import thresholds as of_report
from figures.report.scores import read_scores
from figures.report.thresholds import count, page_data, thresholds_of
from tests.figures.test_report import (
    HOSTILE,
    dumped,
    exits_with,
    make_run,
    needs_chromium,
    page_of,
    programs,
    scored,
)
from utils.evaluation.calibration import calibration_file, load_calibration, save_calibration
from utils.metrics.counting import curve_of
from utils.metrics.metrics import f1_max
from utils.runs.run import Run

COUNTED = ("threshold", "false alarms", "misses", "precision", "recall", "F1")


def calibrate(folder, category="a", seed=0, *, num_images=19):
    """Calibration scores between the test scores; return what they say."""
    run = Run.read(folder)
    scores = np.linspace(-1.0, 1.5, num_images)
    head = run.head_path(category, seed)
    path = calibration_file(folder, category, seed)
    names = [f"{i}.png" for i in range(num_images)]
    save_calibration(path, head=head, source="training", names=names, scores=scores)
    return load_calibration(path, head=head)


def random_scores(rng, *, ties=False):
    labels = rng.permutation(np.arange(60) % 3 == 0).astype(int)
    scores = rng.normal(labels, 1.0)
    return scored(labels, scores.round(1) if ties else scores)


def of_run(folder, category="a", seed=0):
    run = Run.read(folder)
    return thresholds_of(run, read_scores(run, category, seed))


def shown(counts):
    """The numbers of a threshold as the page writes them."""

    def percent(share):
        return "–" if math.isnan(share) else f"{100 * share:.1f} %"

    return [
        f"{counts.false_alarms} of {counts.normals} ({percent(counts.false_alarm_rate)})",
        f"{counts.misses} of {counts.anomalies} ({percent(counts.miss_rate)})",
        *map(percent, (counts.precision, counts.recall, counts.f1)),
    ]


def recounted(page):
    """What each slider of a page says, after its threshold."""
    numbers = [page.texts("b", data_count=name) for name in COUNTED[1:]]
    return [list(one) for one in zip(*numbers, strict=True)]


@pytest.mark.parametrize("ties", [False, True])
def test_counts_are_those_of_another_library(ties):
    one = random_scores(np.random.default_rng(3), ties=ties)
    for threshold in np.unique(one.scores)[:-1]:
        counts = count(one, threshold)
        called = one.scores > threshold
        precision, recall, f1, _ = precision_recall_fscore_support(
            one.labels, called, average="binary"
        )
        assert (counts.precision, counts.recall, counts.f1) == pytest.approx(
            (precision, recall, f1)
        )
        assert counts.false_alarms == sum(called[one.labels == 0])
        assert counts.misses == sum(~called[one.labels == 1])
    nothing = count(one, one.scores.max())
    assert math.isnan(nothing.precision)
    assert (nothing.false_alarms, nothing.recall, nothing.f1) == (0, 0.0, 0.0)


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_chosen_on_the_test_set_do_what_they_are_called(tmp_path, ties):
    run = Run.read(make_run(tmp_path / "run"))
    for seed in range(5):
        one = random_scores(np.random.default_rng(seed), ties=ties)
        best, silent = thresholds_of(run, one).presets
        assert "test set, optimistic" in best.label
        assert best.counts.f1 == pytest.approx(f1_max(curve_of(one.scores, one.labels == 1)))
        assert silent.counts.false_alarms == 0
        lower = [score for score in one.scores if score < silent.counts.threshold]
        assert count(one, max(lower)).false_alarms > 0


def test_f1_is_largest_where_all_are_called_anomalous(tmp_path):
    run = Run.read(make_run(tmp_path / "run"))
    one = scored(np.array([1, 0, 1, 1]), np.array([0.0, 1.0, 2.0, 3.0]))
    best = thresholds_of(run, one).presets[0].counts
    assert (best.misses, best.false_alarms) == (0, 1)
    assert best.threshold < 0.0


def test_calibrated_thresholds_are_the_calibration_s(tmp_path):
    folder = make_run(tmp_path / "run", false_alarm_rate=0.2)
    calibration = calibrate(folder)
    found = of_run(folder)
    rates = (0.2, 0.1, 0.05)  # 19 images promise no lower one
    assert [preset.label for preset in found.presets[:3]] == [
        f"calibrated for {100 * rate:g} % false alarms" for rate in rates
    ]
    assert [p.counts.threshold for p in found.presets[:3]] == list(
        map(calibration.threshold, rates)
    )
    assert found.first == calibration.threshold(0.2)
    assert found.remark == ""
    assert len(found.presets) == 5
    assert "Not calibrated" in of_run(folder, "b").remark
    calibrate(folder, "b", num_images=3)
    assert "too few" in of_run(folder, "b").remark


def test_a_calibration_of_another_head_is_refused(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    calibrate(folder)
    head = Run.read(folder).head_path("a", 0)
    head.write_bytes(b"another")
    exits_with("made with another head", folder, capsys=capsys)
    head.unlink()
    page, _ = page_of(folder)
    (text,) = page.texts("section", id="curves")
    assert f"{head.name} is missing" in text
    assert "calibrated for" not in text


def test_without_a_script_the_page_has_the_counts(tmp_path):
    folder = make_run(tmp_path / "run", seeds=(0, 1))
    calibrate(folder)
    page, _ = page_of(folder)
    assert all("hidden" in attributes for _, attributes, _ in page.of("div", data_of=None))
    tables = page.of("table", data_seed=None)
    assert [attributes["data-seed"] for _, attributes, _ in tables] == ["0", "1"] * 2
    expected = []
    for category, seed in itertools.product("ab", (0, 1)):
        for preset in of_run(folder, category, seed).presets:
            numbers = [text.removesuffix(" %") for text in shown(preset.counts)]
            threshold = f"{preset.counts.threshold:.5g}"
            expected.append(" ".join([preset.label, threshold, *numbers]))
    rows = []
    for _, attributes, texts in page.of("tr"):
        cells = [" ".join(text.split()) for text in texts if text.strip()]
        if cells[0].startswith(("calibrated for", "F1-max (", "no false alarm (")):
            assert not attributes
            rows.append(" ".join(cells))
    assert rows == expected


def test_the_line_in_a_histogram_is_where_the_threshold_is(tmp_path):
    folder = make_run(tmp_path / "run", ("a",))
    page, _ = page_of(folder)
    ((_, attributes, _),) = page.of("figure", data_low=None)
    low, high = float(attributes["data-low"]), float(attributes["data-high"])
    line = page.of("path", transform=None, **{"class": "threshold"})[0][1]["transform"]
    place = float(re.search(r"translate\((\S+) 0\)", line).group(1)) / 200
    assert low + place * (high - low) == pytest.approx(
        of_run(folder).first, abs=(high - low) / 3000
    )
    scores = Run.read(folder).load_scores("a", 0)["score"]
    assert low <= scores.min() < scores.max() <= high


def test_the_data_give_the_scores_back_to_the_bit(tmp_path):
    folder = make_run(tmp_path / "run", ("a", HOSTILE), seeds=(0, 1))
    page, text = page_of(folder)
    blocks = [json.loads("".join(t)) for _, _, t in page.of("script", type="application/json")]
    assert len(blocks) == 2
    for category, block in zip(("a", HOSTILE), blocks, strict=True):
        assert [fit["seed"] for fit in block] == [0, 1]
        for fit in block:
            arrays = Run.read(folder).load_scores(category, fit["seed"])
            assert fit["single"]
            for label, name in enumerate(("normal", "anomalous")):
                own = np.sort(arrays["score"][arrays["label"] == label])
                assert np.array_equal(np.array(fit[name], np.float32), own)
    assert max(map(len, re.findall(r"-?\d+\.\d+", text.split('"normal":')[1][:300]))) < 13
    double = random_scores(np.random.default_rng(0))
    (fit,) = page_data([thresholds_of(Run.read(folder), double)], 10**6)
    assert not fit["single"]
    assert fit["anomalous"] == sorted(double.scores[double.labels == 1].tolist())


def test_seeds_that_do_not_fit_are_counted_and_keep_their_table(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", seeds=(0, 1, 2))
    (fit,) = page_data([of_run(folder)], 10**6)
    monkeypatch.setattr(report, "MAX_DATA", 2 * (len(json.dumps(fit)) + 50))
    page, _ = page_of(folder)
    blocks = [json.loads("".join(t)) for _, _, t in page.of("script", type="application/json")]
    assert [[one["seed"] for one in block] for block in blocks] == [[0], [0]]
    (text,) = page.texts("section", id="curves")
    assert text.count("2 of the seeds have too many scores for the page to recount.") == 2
    assert len(page.of("table", data_seed=None)) == 6
    monkeypatch.setattr(report, "MAX_DATA", 10)
    page, _ = page_of(folder)
    assert not page.of("div", data_of=None)
    assert len(page.of("table", data_seed=None)) == 6


@pytest.mark.parametrize("label", [0, 1])
def test_test_sets_of_one_class_have_a_threshold(tmp_path, label):
    folder = make_run(tmp_path / "run", ("a",))
    path = Run.read(folder).scores_path("a", 0)
    np.savez(path, **dict(np.load(path)) | {"label": np.full(30, label)})
    (preset,) = of_run(folder).presets
    name = (
        "all called anomalous" if label else "no false alarm (chosen on the test set, optimistic)"
    )
    assert preset.label == name
    page, _ = page_of(folder)
    (text,) = page.texts("section", id="curves")
    assert "0 of 30 (0.0 %)" in text
    assert "nan" not in text


def test_only_the_script_of_the_hash_runs(tmp_path):
    page, _ = page_of(make_run(tmp_path / "run"))
    (script,) = programs(page)
    digest = base64.b64encode(hashlib.sha256("".join(script).encode()).digest()).decode()
    policy = page.of("meta", http_equiv="Content-Security-Policy")[0][1]["content"]
    assert policy.split("script-src ")[1] == f"'sha256-{digest}'"
    assert "default-src 'none'" in policy
    assert not [a for _, a, _ in page.elements if any(name.startswith("on") for name in a)]


def test_controls_have_names(tmp_path):
    page, text = page_of(make_run(tmp_path / "run", seeds=(0, 1)))
    assert len(re.findall(r"<label[^>]*>[^<]*\w[^<]*<(?:select|input)", text)) == len(
        [*page.of("select"), *page.of("input")]
    )
    assert [a["aria-live"] for _, a, _ in page.of("output")] == ["polite"] * 2
    groups = {a["aria-label"] for _, a, _ in page.of("div", role="group")}
    assert groups == {"Threshold of a", "Threshold of b"}
    first = next(element for element in page.elements if element[0] == "a")
    assert first[1]["href"] == "#main"
    assert page.of("main", id="main", tabindex="-1")
    assert "arrows move by one score" in page.texts("p", id="keys")[0]


@needs_chromium
@pytest.mark.parametrize("of_all", [False, True])
def test_an_address_with_a_threshold_is_counted_as_python_does(tmp_path, of_all):
    folder = make_run(tmp_path / "run", ("a", HOSTILE), seeds=(0, 1))
    report.main([str(folder)])
    run = Run.read(folder)
    threshold = float(run.load_scores("a", 1)["score"][7])  # a score itself: it is not above
    wanted = {"threshold": threshold, "seed": 1} | ({} if of_all else {"of": HOSTILE})
    page = dumped(f"{(folder / 'report.html').as_uri()}#{urlencode(wanted)}", tmp_path)
    moved = [count(read_scores(run, name, 1), threshold) for name in ("a", HOSTILE)]
    at_first = of_run(folder)
    unmoved = at_first.presets[at_first.start].counts
    assert recounted(page) == [shown(moved[0] if of_all else unmoved), shown(moved[1])]
    assert not [a for _, a, _ in page.of("div", data_of=None) if "hidden" in a]
    folded = [one for one in page.of("details") if "seeds" in "".join(one[2])]
    assert ["open" in attributes for _, attributes, _ in folded] == [of_all] * 2 + [True] * 2


@needs_chromium
def test_each_step_of_the_slider_is_counted_as_python_does(tmp_path):
    folder = make_run(tmp_path / "run", ("a",))
    path = Run.read(folder).scores_path("a", 0)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"score": arrays["score"].round(1)})  # ties, and single precision
    calibration = calibrate(folder)
    _, text = page_of(folder)
    steps = """<script>
      const slider = document.querySelector(".move input"), said = [];
      const texts = () => [...document.querySelectorAll("[data-count]")].map((b) => b.textContent);
      const note = () => said.push(texts());
      note();
      for (let step = 0; step <= Number(slider.max); step++) {
        slider.value = step;
        slider.dispatchEvent(new Event("input"));
        note();
      }
      slider.dispatchEvent(new Event("change"));
      said.push(location.hash, slider.getAttribute("aria-valuetext"));
      for (const button of document.querySelectorAll(".presets button")) { button.click(); note(); }
      said.push(document.querySelectorAll("[aria-pressed=true]").length);
      document.body.dataset.said = JSON.stringify(said);
    </script></body>"""
    unguarded = re.sub(r"<meta http-equiv=.*?>", "", text).replace("</body>", steps)
    (tmp_path / "steps.html").write_text(unguarded, encoding="utf-8")
    page = dumped((tmp_path / "steps.html").as_uri(), tmp_path)
    said = json.loads(page.of("body")[0][1]["data-said"])
    scores = read_scores(Run.read(folder), "a", 0)
    distinct = np.unique(scores.scores).tolist()
    assert len(distinct) < 30
    found = of_run(folder)
    first, all_called, *rest = said
    assert first[1:] == shown(found.presets[found.start].counts)
    assert found.first == calibration.threshold(0.05)
    assert all_called == ["below all scores", *shown(count(scores, -math.inf))]
    for value, numbers in zip(distinct, rest, strict=False):
        assert float(numbers[0]) == pytest.approx(value, rel=1e-4)
        assert numbers[1:] == shown(count(scores, value))
    address, spoken, *presets, pressed = rest[len(distinct) :]
    assert address == f"#{urlencode({'of': 'a', 'threshold': distinct[-1]})}"
    assert float(spoken) == pytest.approx(distinct[-1], rel=1e-4)
    assert [one[1:] for one in presets] == [shown(preset.counts) for preset in found.presets]
    assert pressed == 1


def test_rates_are_falling_shares():
    assert list(of_report.RATES) == sorted(of_report.RATES, reverse=True)
    assert all(0 < rate < 1 for rate in of_report.RATES)
