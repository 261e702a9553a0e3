"""The comparison's sweep is one that can run, short or not."""

import argparse
from pathlib import Path

import pytest

from benchmarks import comparison
from configs.sweep import sweep_options
from models.method import find_methods
from pipeline.planning import plan


def asked(**changes):
    given = {
        **{"embedded": [], "data_root": [], "classes": [], "methods": None, "seeds": ["0"]},
        **{"backbone": "tf_efficientnet_lite0", "short": False, "jobs": "1"},
        **{"output": Path("made")},
    }
    return argparse.Namespace(**(given | changes))


@pytest.mark.parametrize("short", [True, False])
def test_every_method_is_planned_on_every_kind_of_data(short, tmp_path):
    words = comparison.words_of_sweep(
        asked(
            embedded=["demo", "digits"],
            data_root=[tmp_path / "my parts"],
            classes=[tmp_path / "classes"],
            short=short,
        )
    )
    # Folders that are not there yet stop no plan of the embedded ones.
    alone = comparison.words_of_sweep(asked(embedded=["demo", "digits"], short=short))
    runs, left_out = plan(*sweep_options(alone))
    assert not left_out
    found = {(run.experiment.dataset, run.experiment.method_name) for run in runs}
    expected = {
        (dataset, method)
        for dataset, task in comparison.EMBEDDED.items()
        for method in find_methods(task)
        if method not in comparison.NOT_RUN
    }
    assert found == expected
    quoted = [word for word in words if "my parts" in word]
    assert len(quoted) == sum(dataset == "demo" for dataset, _ in expected)
    assert all(f"'{tmp_path}/my parts'" in word for word in quoted)


def test_what_is_shortened_is_there():
    known = find_methods("structured") | find_methods("semantic")
    assert comparison.SHORT.keys() <= known.keys()


def test_some_methods_may_be_named_and_some_data_must_be(capsys):
    words = comparison.words_of_sweep(asked(embedded=["demo"], methods=["knn"]))
    assert words[:2] == ["--set", "demo knn --backbone tf_efficientnet_lite0"]
    with pytest.raises(SystemExit) as stop:
        comparison.main([])
    assert stop.value.code == 2
    assert "name data" in capsys.readouterr().err
