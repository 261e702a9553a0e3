"""The file of an unfinished fit."""

import pytest
import torch

from tests.utils.runs.test_run import open_run
from utils.errors import RunError
from utils.runs.checkpoints import Checkpoint
from utils.runs.made_of import MadeOf

OF = {
    name: MadeOf({"train/good": {f"{name}.png": "12ab"}}, "", "w") for name in ("bottle", "cable")
}
STATE = {"phases": {"epochs": {"weights": torch.arange(3.0), "values": [{"loss": 0.1}]}}, "step": 3}


@pytest.fixture
def run(tmp_path):
    return open_run(tmp_path, made_of=OF)


def test_a_state_reads_back_and_is_deleted(run):
    checkpoint = Checkpoint(run, ["bottle"], 1, 0)
    assert checkpoint.load() is None
    checkpoint.save(STATE)
    assert checkpoint.path == run.folder / "checkpoints" / "bottle-seed1.pt"
    found = Checkpoint(run, ["bottle"], 1, 0).load()
    assert torch.equal(found["phases"]["epochs"].pop("weights"), torch.arange(3.0))
    assert found == {"phases": {"epochs": {"values": [{"loss": 0.1}]}}, "step": 3}
    assert Checkpoint(run, ["bottle"], 0, 0).load() is None  # of another seed
    checkpoint.delete()
    assert not checkpoint.path.parent.exists()
    checkpoint.delete()


def test_it_is_due_after_some_minutes(run, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    checkpoint = Checkpoint(run, ["bottle"], 0, 2.0)
    assert not checkpoint.is_due
    assert Checkpoint(run, ["bottle"], 0, 0.0).is_due
    now = 1120.0
    assert checkpoint.is_due
    checkpoint.save(STATE)
    assert not checkpoint.is_due


def test_a_fit_on_other_images_starts_again(run, tmp_path, capsys):
    Checkpoint(run, ["bottle"], 0, 0).save(STATE)
    run._lock.release()
    other = open_run(tmp_path, made_of=OF | {"bottle": OF["cable"]})
    assert Checkpoint(other, ["bottle"], 0, 0).load() is None
    assert "other images or weights; the fit starts again" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_corrupt_one_is_refused_with_the_way_out(run, content):
    checkpoint = Checkpoint(run, ["bottle"], 0, 0)
    checkpoint.save(STATE)
    whole = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(RunError, match=r"bottle-seed0\.pt: corrupt.*delete it"):
        checkpoint.load()


def test_one_that_runs_code_is_refused(run):
    checkpoint = Checkpoint(run, ["bottle"], 0, 0)
    checkpoint.path.parent.mkdir()
    torch.save({"made_of": print, "state": {}}, checkpoint.path)
    with pytest.raises(RunError, match="delete it"):
        checkpoint.load()


def test_those_of_finished_pairs_and_of_a_run_thrown_away_are_deleted(run, tmp_path):
    for seed in (0, 1):
        Checkpoint(run, ["bottle"], seed, 0).save(STATE)
    run.finish({("bottle", 0): [{"category": "bottle", "seed": 0, "select": "last", "loss": 1.0}]})
    run._lock.release()
    again = open_run(tmp_path, made_of=OF)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["bottle-seed1.pt"]
    again._lock.release()
    open_run(tmp_path, made_of=OF, restart=True)
    assert not (tmp_path / "checkpoints").exists()
