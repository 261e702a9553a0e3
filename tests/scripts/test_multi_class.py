"""One head for all categories: what it is fitted on, where it is kept, who can use it."""

import json
import shutil

import numpy as np
import pytest
import torch

import evaluate
import export
import predict
import sweep
import train_mvtec
from pipeline import recording
from tests.datasets.trees import draw_mvtec_category
from tests.scripts.runs import IMAGES, assert_same_run, measured, refusal, train, words_of
from utils.runs.rows import read_rows
from utils.runs.run import Run

JOINT = ("--protocol", "multi-class")
CALIBRATED = ("--calibration-share", "0.3", "--false-alarm-rate", "0.4")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "cloth", num_train=8, num_good=3)
    draw_mvtec_category(root, "wood", num_train=6, num_good=4, num_defective=1)
    return root


@pytest.fixture(scope="module")
def joint(root, tmp_path_factory):
    """A finished run with thresholds; tests leave it as it is."""
    return train(root, tmp_path_factory.mktemp("joint"), "knn", *JOINT, *CALIBRATED)


def test_the_head_is_that_of_the_normal_images_of_all(root, tmp_path):
    """Of nearest neighbours: the scores are those of a category with all training images."""
    together = tmp_path / "together"
    for name in ("cloth", "wood"):
        shutil.copytree(root / name, together / name)
    for path in (root / "wood/train/good").iterdir():
        shutil.copy(path, together / "cloth/train/good" / f"wood_{path.name}")
    one = train(root, tmp_path / "one", "knn", *JOINT)
    alone = train(root, tmp_path / "alone", "knn")
    merged = train(together, tmp_path / "merged", "knn", "--categories", "cloth")
    scores = [Run.read(folder).load_scores("cloth", 0)["score"] for folder in (one, merged, alone)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] <= scores[2]).all()
    assert (scores[0] < scores[2]).any()  # the wood has something in common with the cloth
    assert [row["num_train"] for row in read_rows(one / "results.csv")] == [14, 14]


def test_one_file_holds_the_head_and_every_category_its_scores(joint):
    assert [path.name for path in (joint / "heads").iterdir()] == ["seed0.safetensors"]
    assert sorted(path.name for path in (joint / "scores").iterdir()) == [
        "cloth-seed0.npz",
        "wood-seed0.npz",
    ]
    assert "ONE HEAD FOR ALL CATEGORIES (multi-class)" in (joint / "table.md").read_text()
    rows = read_rows(joint / "results.csv")
    assert [row["category"] for row in rows] == ["cloth", "wood"]
    assert len({row["head_bytes"] for row in rows}) == 1
    assert len(list((joint / "calibration").iterdir())) == 2
    assert "NoCo (paper)" not in (joint / "table.md").read_text()


def test_it_is_evaluated_exported_and_used_as_any_other(joint, root, tmp_path, monkeypatch):
    assert evaluate.main([str(joint)]) == 0
    monkeypatch.chdir(tmp_path)
    image = next((root / "wood/test").rglob("*.png"))
    for name in ("wood", "cloth"):
        predict.main([str(joint), str(image), "--category", name])
        written = ("--format", "torchscript", "--out", str(tmp_path / f"{name}.pt"))
        export.main([str(joint), "--category", name, *written])
    folders = sorted(path.name for path in (joint / "predictions").iterdir())
    assert folders == ["cloth-seed0", "wood-seed0"]


def test_the_same_command_finds_nothing_left_to_do(joint, root, monkeypatch):
    def forbidden(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr("pipeline.training.train_together", forbidden)
    assert train(root, joint.parents[1], "knn", *JOINT, *CALIBRATED) == joint


def test_a_run_that_is_stopped_while_it_records_has_no_half_of_its_results(
    root, tmp_path, monkeypatch
):
    undisturbed = train(root, tmp_path / "a", "knn", *JOINT)
    record = recording._record_one

    def stopped(experiment, run, data, fitted):
        if data.task.category == "wood":
            raise KeyboardInterrupt
        return record(experiment, run, data, fitted)

    with monkeypatch.context() as patched:
        patched.setattr(recording, "_record_one", stopped)
        with pytest.raises(SystemExit):
            train(root, tmp_path / "b", "knn", *JOINT)
    (folder,) = (tmp_path / "b").glob("*/*")
    assert not (folder / "results.csv").exists()
    assert train(root, tmp_path / "b", "knn", *JOINT) == folder
    assert_same_run(folder, undisturbed)


def test_other_training_images_of_any_category_are_noticed(root, tmp_path, capsys):
    copied = tmp_path / "images"
    shutil.copytree(root, copied)
    folder = train(copied, tmp_path / "runs", "knn", *JOINT)
    there = json.loads((folder / "data/cloth-seed0.json").read_text())
    assert len(there["images"]["train/good"]) == 14
    assert not any("wood" in name for name in there["images"]["test/good"])
    next((copied / "wood/train/good").iterdir()).unlink()
    message = refusal(capsys, train_mvtec.main, *words_of(copied, tmp_path / "runs", "knn", *JOINT))
    assert "cloth, seed 0 was made of other data" in message
    assert "1 file gone from train/good" in message
    assert evaluate.main([str(folder)]) == 0  # the test images are as they were


@pytest.mark.parametrize("cache", ["host", "disk", "none"])
def test_wherever_features_are_kept_the_numbers_are_the_same(
    joint, root, tmp_path, monkeypatch, cache
):
    monkeypatch.setenv("NOCO_CACHE", str(tmp_path / "cache"))
    folder = train(root, tmp_path, "knn", *JOINT, *CALIBRATED, "--cache", cache)
    for row, wanted in zip(measured(folder), measured(joint), strict=True):
        assert {**row, "twins": "", "remarks": ""} == {**wanted, "twins": "", "remarks": ""}


def test_what_is_chosen_on_synthetic_anomalies_is_the_same_for_all(root, tmp_path):
    options = ("--method.prototypes", "2", "--method.time", "10", "100", "1000")
    folder = train(root, tmp_path, "noco_exact", *JOINT, *options, "--select", "synthetic")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {
        name: [
            line["synthetic_auroc"]
            for line in lines
            if (line["event"], line["category"]) == ("selection", name)
        ]
        for name in ("cloth", "wood")
    }
    assert [len(curve) for curve in curves.values()] == [3, 3]
    assert curves["cloth"] != curves["wood"]
    means = [sum(pair) / 2 for pair in zip(*curves.values(), strict=True)]
    chosen = [line for line in lines if line["event"] == "chosen"]
    assert [line["category"] for line in chosen] == ["cloth", "wood"]
    assert all(line["synthetic_auroc"] == pytest.approx(max(means)) for line in chosen)
    assert chosen[0]["options"] == chosen[1]["options"]


def test_a_sweep_has_a_job_for_each_seed(root, tmp_path):
    plain = train(root, tmp_path / "plain", "patchcore", *JOINT, "--seeds", "0", "1")
    paths = ("--data-root", str(root), *IMAGES, *JOINT)
    words = ("--datasets", "train_mvtec:folder", "--methods", "patchcore", "--seeds", "0", "1")
    sweep.main([*words, "--output", str(tmp_path / "swept"), "--", *paths])
    (manifest,) = (tmp_path / "swept").glob("sweep-*/sweep.json")
    jobs = json.loads(manifest.read_text())["jobs"]
    assert [(job["category"], job["seed"]) for job in jobs] == [
        ("cloth and wood", 0),
        ("cloth and wood", 1),
    ]
    assert_same_run(tmp_path / "swept" / plain.parent.name / plain.name, plain)


def test_where_one_head_for_all_has_no_meaning_it_is_refused(root, tmp_path, capsys):
    def refused(method, *options):
        return refusal(
            capsys, train_mvtec.main, *words_of(root, tmp_path, method, *JOINT, *options)
        )

    assert "there is one, wood; leave the option out" in refused("knn", "--categories", "wood")
    assert "winclip, which learns nothing from normal images" in refused("anomalib:winclip")
    assert "--online follows a head of one category" in refused("noco_cf", "--online")
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_trains_sees_all_categories_and_is_watched_on_each(root, tmp_path):
    options = ("--method.epochs", "3", "--select", "best_test")
    folder = train(root, tmp_path, "noco", *JOINT, *options)
    rows = read_rows(folder / "results.csv")
    assert [(row["category"], row["select"]) for row in rows] == [
        *(("cloth", "last"), ("cloth", "best_test")),
        *(("wood", "last"), ("wood", "best_test")),
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {
        name: [
            line["image_auroc"]
            for line in lines
            if (line["event"], line["category"]) == ("step", name)
        ]
        for name in ("cloth", "wood")
    }
    means = torch.tensor(list(steps.values())).mean(dim=0)
    best = {row["step"] for row in rows if row["select"] == "best_test"}
    assert best == {int(means.argmax()) + 1}
    assert sorted(path.name for path in (folder / "heads").iterdir()) == [
        "seed0-last.safetensors",
        "seed0-pixel.safetensors",
        "seed0.safetensors",
    ]
    assert evaluate.main([str(folder)]) == 0
