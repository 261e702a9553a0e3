"""predict.py on tiny runs: what it writes and says, and what it refuses."""

import csv
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import predict
from datasets.reading.images import read_image
from pipeline.finished import FinishedRun, load_run
from tests.datasets.trees import save as save_image
from tests.datasets.trees import texture
from tests.scripts.runs import refusal
from tests.threads import torch_threads
from utils.runs.predictions import MapScale
from utils.runs.rows import read_rows


@pytest.fixture
def copy(calibrated, tmp_path):
    return shutil.copytree(calibrated, tmp_path / "a run")


def run(*words):
    return predict.main([*map(str, words), "--workers", "0"])


def refused(capsys, *words):
    return refusal(capsys, predict.main, *words, "--workers", "0")


def rows_of(folder):
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_test_set(calibrated, root, tmp_path):
    with torch_threads(1):  # as the run was made
        assert run(calibrated, root / "cloth/test", "--out", tmp_path, "--maps", "none") == 0
    found = {row["path"]: float(row["score"]) for row in rows_of(tmp_path)}
    with np.load(calibrated / "scores/cloth-seed0.npz") as saved:
        expected = dict(zip(saved["path"].tolist(), saved["score"].tolist(), strict=True))
    assert found.keys() == expected.keys()
    for path, score in found.items():  # batches are made up differently
        assert score == pytest.approx(expected[path], rel=1e-5)
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "maps.json").exists()


def test_calibration_of_training(calibrated, root):
    (row,) = read_rows(calibrated / "results.csv")
    assert (row["num_train"], row["calibration_images"], row["test_normals"]) == (15, 10, 6)
    assert row["false_alarm_rate_asked"] == 0.1
    record = json.loads((calibrated / "calibration/cloth-seed0.json").read_text())
    held = set(record["images"])
    assert len(held) == 10
    assert all((root / "cloth/train/good") in path.parents for path in map(Path, held))
    assert "False alarms: asked 10 %, seen" in (calibrated / "table.md").read_text()
    # Their scores are those the head gives them, and it was not fitted on them.
    assert run(calibrated, *held, "--maps", "none") == 0
    found = {row["path"]: row for row in rows_of(calibrated / "predictions/cloth-seed0")}
    scores = dict(zip(record["images"], record["scores"], strict=True))
    for path, row in found.items():
        assert float(row["score"]) == pytest.approx(scores[path], rel=1e-4)
        rank = sum(score >= float(row["score"]) for score in scores.values())
        assert float(row["p_value"]) == pytest.approx((1 + rank) / 11, abs=1.01 / 11)


def test_decisions_json_and_exit_codes(calibrated, root, capsys):
    images = (root / "cloth/test/hole", root / "cloth/test/good")
    assert run(calibrated, *images, "--json", "--false-alarm-rate", "0.1") == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == 9
    assert "images/s" in said.err
    for row in rows:
        assert (row["p_value"] <= 0.1) == (row["decision"] == "anomalous")
        assert (row["map"], row["error"]) == (None, None)
        if "/hole/" in row["path"]:
            assert row["decision"] == "anomalous"
            assert row["p_value"] == 1 / 11
    rate = ("--json", "--false-alarm-rate", "0.1", "--fail-on-anomaly")
    assert run(calibrated, root / "cloth/test/hole", *rate) == 1
    calm = ("--json", "--fail-on-anomaly", "--threshold", "1e9")
    assert run(calibrated, root / "cloth/test/hole", *calm) == 0
    assert run(calibrated, root / "cloth/test/hole", *calm[:-1], "-1e9") == 1
    error = refused(capsys, calibrated, images[0], "--false-alarm-rate", "0.05")
    assert "--false-alarm-rate 0.05 needs 19 calibration images or more and there are 10" in error
    # The run's own rate is taken where none is given.
    assert run(calibrated, images[0], "--json", "--fail-on-anomaly") == 1


def test_maps_have_the_size_of_the_image_and_give_values_back(calibrated, root, tmp_path):
    assert run(calibrated, root / "cloth/test/hole", "--threshold", "0.5", "--out", tmp_path) == 0
    about = json.loads((tmp_path / "maps.json").read_text())
    scale = MapScale(*(about[name] for name in ("low", "high", "coldest", "hottest")))
    assert about["clipped_pixels"] == 0
    finished = load_run(calibrated, device="cpu")
    detector = finished.detector("cloth", 0)
    for row in rows_of(tmp_path):
        pixels = np.array(Image.open(tmp_path / f"maps/{row['map']}.png"))
        drawn = np.array(Image.open(tmp_path / f"overlays/{row['map']}.png"))
        image = read_image(Path(row["path"]))
        assert pixels.shape == (60, 90) == drawn.shape[:2]
        assert pixels.dtype == np.uint16
        values = scale.decode(pixels)
        # 60 x 90 becomes 48 x 72, of which the middle 32 x 32 are 40 x 40 pixels of the original.
        seen = np.isfinite(values)
        assert seen[10:50, 25:65].all()
        assert seen.sum() == 1600
        # They are the map of the run; interpolation can only lower its maximum.
        step = (scale.high - scale.low) / 65534
        transformed = torch.from_numpy(finished.transform.image(image)).movedim(2, 0)
        highest = finished.score(detector, transformed.unsqueeze(0)).maps.max().item()
        assert values[seen].max() == pytest.approx(highest, rel=0.05)
        assert values[seen].max() <= highest * (1 + 1e-4) + step
        # The hole is dark, and where the map is highest.
        top, left = np.unravel_index(np.nanargmax(values), values.shape)
        assert image[max(top - 8, 0) : top + 9, max(left - 8, 0) : left + 9].min() < 20
        # The crop's edge is far from the corner: no contour reaches it.
        assert drawn[:8].mean() == pytest.approx(0.35 * image[:8].mean(), rel=0.02)


def test_names_patterns_and_unreadable_images(calibrated, root, tmp_path, capsys):
    folder = tmp_path / "ein Ordner/größe [1] 写真"
    rng = np.random.default_rng(0)
    for name in ("b ü.png", "a.png", "写真.png"):
        save_image(folder / name, texture(rng, (90, 60)))
    (folder / "c.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("none")
    shutil.copy(folder / "a.png", folder / "d")  # no suffix: only by its name
    out = tmp_path / "aus gabe"
    words = (folder, folder / "d", folder / "gone.png", "--out", out, "--threshold", "0")
    assert run(calibrated, *words) == 2
    assert "3 anomalous" not in capsys.readouterr().err
    rows = rows_of(out)
    names = [Path(row["path"]).name for row in rows]
    assert names == ["a.png", "b ü.png", "c.png", "写真.png", "d", "gone.png"]
    assert [row["number"] for row in rows] == [str(i) for i in range(6)]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, False, True]
    assert "cannot read the image" in rows[2]["error"]
    assert "not found" in rows[5]["error"]
    assert all((row["score"], row["decision"]) == ("", "") for row in rows if row["error"])
    assert all((out / f"maps/{row['map']}.png").exists() for row in rows if row["map"])
    assert run(calibrated, *words, "--skip-unreadable") == 0

    pattern = tmp_path / "ein Ordner/**/[ab]*.png"
    assert run(calibrated, pattern, "--out", out, "--threshold", "0", "--maps", "none") == 0
    assert [Path(row["path"]).name for row in rows_of(out)] == ["a.png", "b ü.png"]
    assert "no image matches" in refused(capsys, calibrated, tmp_path / "*.png")
    assert "no images" in refused(capsys, calibrated)
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in refused(capsys, calibrated, tmp_path / "empty")


def test_calibrate_with_new_normals(calibrated, copy, root, tmp_path, capsys):
    shutil.rmtree(copy / "calibration")
    test = root / "cloth/test"
    assert run(copy, test, "--maps", "none", "--out", tmp_path / "out") == 0
    assert "not calibrated" in capsys.readouterr().err
    assert {(row["p_value"], row["decision"]) for row in rows_of(tmp_path / "out")} == {("", "")}
    assert "nothing decides" in refused(capsys, copy, test, "--fail-on-anomaly")
    assert "needs a calibration" in refused(capsys, copy, test, "--false-alarm-rate", "0.1")

    # A training image under another name is one still.
    stolen = tmp_path / "new/stolen.png"
    stolen.parent.mkdir()
    shutil.copy(next((root / "cloth/train/good").iterdir()), stolen)
    error = refused(capsys, copy, stolen.parent, "--calibrate")
    assert "1 of 1 images are training images" in error
    assert not (copy / "calibration").exists()
    stolen.unlink()

    rng = np.random.default_rng(3)
    for number in range(9):
        save_image(stolen.parent / f"{number}.png", texture(rng, (90, 60)))
    assert run(copy, stolen.parent, "--calibrate") == 0
    assert "from 0.1 can be asked for" in capsys.readouterr().err
    assert run(copy, test / "hole", "--false-alarm-rate", "0.1", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["p_value"], row["decision"]) for row in rows} == {(0.1, "anomalous")}
    assert "leave out" in refused(capsys, copy, test, "--calibrate", "--json")


def test_heads_must_be_named_where_there_are_several(digits, tmp_path, capsys):
    save_image(tmp_path / "a.png", np.full((8, 8, 3), 90, dtype=np.uint8))
    folder, words = shutil.copytree(digits, tmp_path / "run"), (tmp_path / "a.png", "--category")
    error = refused(capsys, folder, tmp_path / "a.png")
    assert "several heads: choose one by --category (0, 1) and --seed (0, 1)" in error
    assert "--seed (0, 1)" in refused(capsys, folder, *words, "1")
    assert "no such head" in refused(capsys, folder, *words, "8", "--seed", "0")
    chosen = (folder, *words, "1", "--seed", "1")
    assert run(*chosen, "--threshold", "0") == 0
    assert [path.name for path in (folder / "predictions/1-seed1").iterdir()] == ["scores.csv"]
    assert "have no maps" in refused(capsys, *chosen, "--maps", "png16")
    assert "no head" in refused(capsys, *chosen, "--head", "pixel")


def test_runs_of_earlier_versions_load(copy, root, capsys):
    """Their heads do not say what was chosen, metrics.jsonl does; config.json lacks new fields."""
    run_now = load_run(copy)
    expected = run_now.detector("cloth", 0).state_dict()
    path = copy / "heads/cloth-seed0.safetensors"
    metadata = {"category": "cloth", "seed": "0", "select": "synthetic"}
    save_file(load_file(path), path, metadata=metadata)
    config = json.loads((copy / "config.json").read_text())
    assert config.pop("calibration_share") == 0.4
    config.pop("false_alarm_rate")
    (copy / "config.json").write_text(json.dumps(config))
    old = load_run(copy)
    assert old.experiment.calibration_share == 0
    again = old.detector("cloth", 0)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    (copy / "metrics.jsonl").write_text("")
    assert "does not say what was chosen" in refused(capsys, copy, root / "cloth/test/hole")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def tampered_config(**changes):
    def change(copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | changes))

    return change


def tampered_head(metadata=None, **tensors):
    def change(copy):
        path = copy / "heads/cloth-seed0.safetensors"
        base = {"category": "cloth", "seed": "0", "select": "synthetic", "options": "{}"}
        state = {**load_file(path), **tensors}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        save_file(state, path, metadata={**base, **(metadata or {})})

    return change


# tests/scripts/test_tampered_runs.py has what every reader of a run folder must refuse.
TAMPERED = {
    "config of no version": tampered_config(code="__import__('os')"),
    "config of no backbone": tampered_config(backbone="../../x"),
    "config of other stages": tampered_config(layers=[3]),
    "no head": lambda copy: (copy / "heads/cloth-seed0.safetensors").unlink(),
    "missing tensor": tampered_head(centres=None),
    "more tensors": tampered_head(more=torch.zeros(1)),
    "another shape": tampered_head(filters=torch.zeros(2, 3)),
    "head of another": tampered_head({"category": "wood"}),
    "other backbone": tampered_head({"backbone_digest": "0123456789abcdef"}),
    "options of no method": tampered_head({"options": '{"eval": "1"}'}),
    "options no object": tampered_head({"options": "[1"}),
    "options of another type": tampered_head({"options": '{"prototypes": "2"}'}),
    "pickled calibration": lambda copy: (copy / "calibration/cloth-seed0.json").write_bytes(
        pickle.dumps(Bomb())
    ),
    "no results": lambda copy: (copy / "results.csv").unlink(),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED.keys())
def test_a_tampered_run_is_an_error_and_never_executed(
    copy, root, tmp_path, monkeypatch, capsys, change
):
    change(copy)
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, copy, root / "cloth/test/hole", "--false-alarm-rate", "0.1")
    assert error.startswith("error: ")
    assert error.count("error:") == 1
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threshold", "1", "--false-alarm-rate", "0.1"), "both decide"),
        (("--false-alarm-rate", "1.5"), "between 0 and 1"),
        (("--threshold", "nan"), "finite"),
        (("--batch-size", "0"), "at least 1"),
        (("--json", "--maps", "both"), "--out"),
        (("--device", "tpu"), "--device tpu"),
        (("--colour", "red"), "colour"),
    ],
)
def test_bad_options_are_refused(calibrated, root, capsys, words, message):
    assert message in refused(capsys, calibrated, root / "cloth/test/hole", *words)


def test_memory_does_not_grow_with_the_number_of_images(calibrated, root, tmp_path):
    """2,000 images that would take 25 MB decoded and 200 MB as features."""
    images = tmp_path / "many"
    images.mkdir()
    source = next((root / "cloth/test/good").iterdir())
    for number in range(2000):
        (images / f"{number:04d}.png").symlink_to(source)
    process, peak, done = psutil.Process(), [0, 0], threading.Event()
    counts = [0]

    def watch():
        while not done.is_set():
            half = counts[0] >= 1000
            peak[half] = max(peak[half], process.memory_info().rss)
            time.sleep(0.005)

    finished = load_run(calibrated)
    detector = finished.detector("cloth", 0)
    options = predict.PredictOptions(
        calibrated, (str(images),), threshold=0.0, workers=0, maps="none"
    )
    paths = sorted(images.iterdir())
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for found in predict.predictions(options, finished, detector, paths):
            counts[0] += len(found)
    finally:
        done.set()
        watcher.join()
    assert counts == [2000]
    assert peak[1] - peak[0] < 5e6


def test_a_kill_loses_at_most_a_batch(calibrated, root, tmp_path, monkeypatch):
    scored = []
    score = FinishedRun.score

    def interrupted(self, detector, images, boxes=None):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(images))
        return score(self, detector, images, boxes)

    monkeypatch.setattr(FinishedRun, "score", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(calibrated, root / "cloth/test", "--out", tmp_path, "--batch-size", "4",
            "--threshold", "0")  # fmt: skip
    assert stop.value.code == 130
    assert not (tmp_path / "scores.csv").exists()
    assert len((tmp_path / "scores.csv.part").read_text().splitlines()) == 1 + 8
