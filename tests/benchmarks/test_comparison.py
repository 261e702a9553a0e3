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


def asked(**changes):
    given = {
        **{"data_sets": [], "data_root": [], "classes": [], "methods": None, "seeds": ["0"]},
        **{"backbone": "tf_efficientnet_lite0", "budget": "presets", "jobs": "1"},
        **{"output": Path("made")},
    }
    return argparse.Namespace(**(given | changes))


def words_of(**changes):
    arguments = asked(**changes)
    return comparison.words_of_sweep(comparison.places_of(arguments), arguments)


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


def test_some_methods_may_be_named_and_some_data_must_be(capsys):
    words = words_of(data_sets=["demo"], methods=["knn"])
    assert words[:2] == ["--set", "demo knn --backbone tf_efficientnet_lite0"]
    for asked_for, said in (([], "name data"), (["--data-sets", "mvtek"], "unknown data set")):
        with pytest.raises(SystemExit) as stop:
            comparison.main(asked_for)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
