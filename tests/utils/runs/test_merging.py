"""Merging run folders of single pairs into one."""

import json
import shutil

import numpy as np
import pytest
import torch

from utils.errors import RunError
from utils.runs.merging import merge
from utils.runs.run import Run
from utils.runs.scores import TestScores

CONFIG = {"dataset": "demo", "method": {"norm": 1.0}, "categories": [], "seeds": [0, 1]}


def make_part(folder, category, seed, *, finished=True, **changes):
    """A run folder of one pair, with a file of each kind."""
    config = CONFIG | {"categories": [category], "seeds": [seed]} | changes
    run = Run.open(
        folder,
        config,
        categories=[category],
        seeds=[seed],
        command=["train.py", category, str(seed)],
        device="cpu",
    )
    run.log(category, seed, event="step", step=1, loss=0.5 + seed)
    scores = TestScores(paths=["a", "b"], labels=[0, 1], scores=np.array([seed, 2.0]), defects="gb")
    run.save_scores(category, seed, scores)
    run.save_head(category, seed, {"w": torch.full((2,), float(seed))}, {"seed": str(seed)})
    picture = run.overlays_folder(category, seed) / "picture.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"png")
    if finished:
        rows = [{"category": category, "seed": seed, "select": "last", "image_auroc": 0.5 + seed}]
        run.finish({(category, seed): rows})
    return folder


@pytest.fixture
def parts(tmp_path):
    return {
        (category, seed): make_part(tmp_path / f"part {category} {seed}", category, seed)
        for seed in (1, 0)
        for category in ("wood", "a/b")
    }


def merge_into(folder, parts, may_differ=("categories", "seeds", "overlays")):
    options = {"categories": ["a/b", "wood"], "seeds": [0, 1], "command": ["train.py", "demo"]}
    return merge(folder, CONFIG, **options, parts=parts, may_differ=may_differ)


def test_the_whole_has_everything_in_the_order_of_its_table(parts, tmp_path):
    run = merge_into(tmp_path / "whole", parts)
    pairs = [("a/b", 0), ("a/b", 1), ("wood", 0), ("wood", 1)]
    assert [(row["category"], row["seed"]) for row in run.rows()] == pairs
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    assert [(entry["category"], entry["seed"]) for entry in logged] == pairs
    for category, seed in pairs:
        assert run.load_scores(category, seed)["score"].tolist() == [seed, 2.0]
        state, metadata = run.load_head(category, seed)
        assert state["w"].tolist() == [seed, seed]
        assert metadata["seed"] == str(seed)
        assert (run.overlays_folder(category, seed) / "picture.png").read_bytes() == b"png"
        assert run.pending(category) == []
    assert json.loads((run.folder / "config.json").read_text()) == CONFIG


def test_the_environment_names_the_whole_and_every_part(parts, tmp_path):
    folder = merge_into(tmp_path / "whole", parts).folder
    record = json.loads((folder / "environment.json").read_text())
    assert record["command"] == "train.py demo"
    commands = [start["command"] for start in record["continued"]]
    assert commands == [f"train.py {c} {s}" for c in ("a/b", "wood") for s in (0, 1)]


def test_pairs_that_are_there_already_stay(parts, tmp_path):
    folder = make_part(tmp_path / "whole", "wood", 1, categories=[], seeds=[0, 1])
    (head,) = (folder / "heads").glob("*")
    inode = head.stat().st_ino
    del parts["wood", 1]
    run = merge_into(folder, parts)
    assert run.head_path("wood", 1).stat().st_ino == inode
    assert len(run.rows()) == 4
    record = json.loads((folder / "environment.json").read_text())
    assert record["command"] == "train.py wood 1"
    assert record["continued"][0]["command"] == "train.py demo"


def test_merging_again_after_a_kill_gives_the_same(parts, tmp_path, monkeypatch):
    calls = []
    finish = Run.finish

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        finish(self, *arguments)

    monkeypatch.setattr(Run, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_into(tmp_path / "whole", parts)
    monkeypatch.undo()
    again, whole = merge_into(tmp_path / "whole", parts), merge_into(tmp_path / "other", parts)
    for name in ("results.csv", "metrics.jsonl"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_deleting_the_parts_leaves_the_whole(parts, tmp_path):
    run = merge_into(tmp_path / "whole", parts)
    for part in parts.values():
        shutil.rmtree(part)
    assert run.load_scores("wood", 1)["label"].tolist() == [0, 1]


def test_without_hard_links_files_are_copied(parts, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    run = merge_into(tmp_path / "whole", parts)
    assert run.load_scores("wood", 0)["score"].tolist() == [0.0, 2.0]


def test_a_part_of_other_options_is_refused(parts, tmp_path):
    other = make_part(tmp_path / "other", "wood", 0, method={"norm": 2.0})
    with pytest.raises(RunError, match=r"differ in method\.norm$"):
        merge_into(tmp_path / "whole", parts | {("wood", 0): other})


def test_a_part_may_differ_in_what_is_named_alone(parts, tmp_path):
    parts["wood", 0] = make_part(tmp_path / "undrawn", "wood", 0, overlays=0)
    assert len(merge_into(tmp_path / "whole", parts).rows()) == 4
    with pytest.raises(RunError, match=r"differ in categories, seeds$"):
        merge_into(tmp_path / "other", {("a/b", 0): parts["a/b", 0]}, may_differ=())


def test_an_unfinished_or_missing_part_is_refused(parts, tmp_path):
    unfinished = make_part(tmp_path / "unfinished", "wood", 0, finished=False)
    with pytest.raises(RunError, match="'wood', seed 0 is not finished"):
        merge_into(tmp_path / "whole", parts | {("wood", 0): unfinished})
    del parts["wood", 0]
    with pytest.raises(RunError, match="nothing to merge for 'wood', seed 0"):
        merge_into(tmp_path / "whole", parts)
