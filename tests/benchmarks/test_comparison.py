"""The comparison's sweep is one that can run, short or not."""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import comparison
from configs.sweep import sweep_options
from models.method import find_methods
from pipeline.planning import plan
from tests.scripts.runs import refusal


def asked(**changes):
    given = {
        **{"data_sets": [], "data_root": [], "classes": [], "methods": None, "seeds": ["0"]},
        **{"backbone": "tf_efficientnet_lite0", "budget": "presets", "jobs": 1, "categories": []},
        **{"output": Path("made"), "skip_invalid": False, "dry_run": False},
    }
    return argparse.Namespace(**(given | changes))


def words_of(*further, **changes):
    arguments = asked(**changes)
    places = comparison.places_of(arguments)
    methods = comparison.methods_for(places, arguments.methods)
    return comparison.words_of_sweep(places, methods, arguments, further)


@pytest.mark.parametrize("budget", comparison.BUDGETS)
def test_every_method_is_planned_on_every_kind_of_data(budget, tmp_path):
    words = words_of(
        data_sets=["demo", "digits"],
        data_root=[tmp_path / "my parts"],
        classes=[tmp_path / "classes"],
        budget=budget,
    )
    # Folders that are not there yet stop no plan of the embedded ones.
    runs, left_out = plan(*sweep_options(words_of(data_sets=["demo", "digits"], budget=budget)))
    assert not left_out
    found = {(run.experiment.dataset, run.experiment.method_name) for run in runs}
    expected = {
        (dataset, method)
        for dataset, task in (("demo", "structured"), ("digits", "semantic"))
        for method in find_methods(task)
        if method not in comparison.NOT_RUN
    }
    assert found == expected
    quoted = [word for word in words if "my parts" in word]
    assert len(quoted) == sum(dataset == "demo" for dataset, _ in expected)
    assert all(f"'{tmp_path}/my parts'" in word for word in quoted)


@pytest.mark.parametrize("budget", comparison.BUDGETS)
@pytest.mark.parametrize("task", ["structured", "semantic"])
def test_what_is_shortened_is_there(budget, task):
    known = find_methods("structured") | find_methods("semantic")
    assert comparison.BUDGETS[budget][task].keys() <= known.keys()
    assert comparison.MINUTES[task].keys() <= find_methods(task).keys()


def test_a_smaller_budget_has_three_digits_and_what_it_leaves_alone_first():
    words = words_of(data_sets=["mnist=/data", "digits"], budget="minutes")
    shortened = ["--method." in word for word in words[1 : words.index("--seeds")]]
    assert shortened == sorted(shortened)
    kept = words[words.index("--categories") + 1 : words.index("--output")]
    assert kept == [f"{name}={digit}" for name in ("mnist", "digits") for digit in (0, 3, 8)]
    assert "--categories" not in words_of(data_sets=["mnist=/data"])


def test_options_of_the_user_count_more_than_the_budgets():
    words = words_of("--image-size", "64", data_sets=["demo"], methods=["pni"], budget="short")
    assert words[1].endswith(f"{comparison.SHORT['pni']} --image-size 64")
    assert words[-3:] == ["--", "--overlays", "0"]


def test_what_is_passed_on_to_the_sweep():
    words = words_of(
        data_sets=["digits"], methods=["knn"], budget="short", categories=["7"], jobs=3,
        skip_invalid=True, dry_run=True,
    )  # fmt: skip
    assert words[: words.index("--output")] == [
        *("--set", "digits knn --backbone tf_efficientnet_lite0", "--seeds", "0", "--jobs", "3"),
        *("--categories", "7"),
    ]
    assert {"--skip-invalid", "--dry-run"} <= set(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "name data"),
        ("--data-sets mvtek", "unknown data set"),
        ("--data-sets demo --methods knn nosuch", "--methods nosuch: not run here"),
        ("--data-sets demo --methods deep_svdd", "--methods deep_svdd: not run here"),
        ("--data-sets demo --methods saa", "--methods saa: not run here"),
        ("--data-sets digits=/data", "digits takes no folder"),
        ("--data-sets demo demo", "demo is named twice"),
        ("--data-root a a", "a is named twice"),
        ("--data-sets demo --jobs 0", "'0' is no number of 1 or more"),
        ("--data-sets demo --jobs two", "'two' is no number of 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(words, said, capsys):
    assert said in refusal(capsys, comparison.main, *words.split())


@pytest.mark.parametrize(("code", "drawn"), [(0, True), (1, True), (2, False), (130, False)])
def test_the_page_is_of_what_is_complete(code, drawn, tmp_path, monkeypatch, capsys):
    """Jobs that failed are no reason against it, a sweep that was refused or interrupted is."""
    runs = tmp_path / "sweep-comparison/runs.txt"
    runs.parent.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.csv").touch()
    runs.write_text(f"{tmp_path / 'run'}\n")
    called = []

    def code_of(words):
        called.append(words)
        return code if words[0] == "sweep.py" else 0

    monkeypatch.setattr(comparison, "code_of", code_of)
    with pytest.raises(SystemExit) as stop:
        comparison.main(["--data-sets", "digits", "--methods", "knn", "--output", str(tmp_path)])
    assert stop.value.code == code
    assert ("figures.compare" in called[-1]) == drawn
    assert ("lacks the runs of jobs that failed" in capsys.readouterr().err) == (code == 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_waited_for(number):
    """The child says when it is ready, and takes its time to end."""
    child = """
import signal, sys, time
from utils.cli import stopped_as_interrupted
try:
    with stopped_as_interrupted():
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    print("ended", flush=True)
"""
    words = [
        sys.executable,
        "-c",
        f"from benchmarks import comparison as c; c.code_of(['-c', {child!r}])",
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, error = process.communicate(timeout=30)
    assert said == "ended\n"
    assert "KeyboardInterrupt" in error
