"""Runs on windows of images, and every script that goes on from them."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import discover
import evaluate
import export
import predict
import train_mvtec
from tests.datasets.trees import save
from tests.scripts.runs import refusal, train, words_of
from tests.threads import torch_threads
from utils.runs.rows import read_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
TILES = ("--tiles", "2", "--image-size", "48")
TOY = {
    "noco_cf": ("--method.prototypes", "2"),
    "simplenet": ("--method.epochs", "2"),
    "stpm": ("--method.epochs", "1"),
}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tiled(root, tmp_path_factory):
    """Windows of 48 pixels of images of 90, in a run with thresholds."""
    with torch_threads(1):
        options = ("--calibration-share", "0.4", "--false-alarm-rate", "0.1", "--save-maps")
        output = tmp_path_factory.mktemp("tiled")
        return train(root, output, "noco_cf", *TILES, *TOY["noco_cf"], *options)


def test_the_run_says_how_images_were_cut(tiled):
    assert json.loads((tiled / "config.json").read_text())["tiles"] == 2
    assert "2 x 2 windows of images of 90 pixels" in (tiled / "table.md").read_text()
    with np.load(tiled / "scores/cloth-seed0.npz") as saved:
        assert saved["map"].shape == (12, 90, 90)
        assert saved["mask"].shape == (12, 90, 90)


def test_prediction_and_evaluation_give_the_scores_of_the_run(tiled, root, tmp_path):
    with torch_threads(1):
        predict.main([str(tiled), str(root / "cloth/test"), "--out", str(tmp_path)])
    found = {row["path"]: row for row in rows_of(tmp_path / "scores.csv")}
    with np.load(tiled / "scores/cloth-seed0.npz") as saved:
        for path, score in zip(saved["path"], saved["score"], strict=True):
            row = found[str(path)]
            assert float(row["score"]) == pytest.approx(score, rel=1e-5)
            assert row["decision"] in {"normal", "anomalous"}
    (pixels,) = {cv2.imread(str(p), -1).shape for p in (tmp_path / "maps").glob("*.png")}
    assert pixels == (60, 90)
    evaluate.main([str(tiled)])


@pytest.mark.parametrize("file_format", ["onnx", "torchscript"])
def test_an_exported_file_cuts_images_itself(tiled, file_format, tmp_path):
    if file_format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    path = export.main(
        [str(tiled), "--format", file_format, "--out", str(tmp_path / f"m.{file_format}")]
    )
    said = json.loads(Path(f"{path}.json").read_text())
    assert said["input"]["images"].startswith("(B, 3, 90, 90) uint8")
    assert said["checked"]["batch_sizes"] == [1, 3, 8]
    for name in ("scores", "maps"):
        assert said["checked"][name]["share_of_range"] < 1e-4


def test_kinds_of_defects_are_found_in_windows(tiled):
    discover.main([str(tiled), "--masks", "true", "--kinds", "known"])
    assert list((tiled / "discovery").rglob("assignments.csv"))


@pytest.mark.parametrize("method", ["simplenet", "stpm"])
def test_windows_are_images_to_any_method(root, tmp_path, method):
    run = train(root, tmp_path, method, *TILES, *TOY[method], "--cache", "none")
    (row,) = read_rows(run / "results.csv")
    assert 0 <= row["image_auroc"] <= 1
    assert row["num_train"] == 25


def test_synthetic_defects_are_drawn_on_whole_images(root, tmp_path):
    options = ("--select", "synthetic", "--grid", "prototypes=1,2")
    run = train(root, tmp_path, "noco_cf", *TILES, *options)
    chosen = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(entry["event"] == "chosen" for entry in chosen)


def test_a_crop_keeps_its_share_and_learning_online_counts_images(root, tmp_path):
    options = ("--image-size", "54", "--crop-size", "48", "--tiles", "2", "--online")
    run = train(root, tmp_path, "noco_cf", *options, *TOY["noco_cf"])
    (curve,) = run.rglob("*online*/*.csv")
    assert [row["num_images"] for row in rows_of(curve)] == ["1", "2", "5", "10", "20", "25"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tiles", "2", "--tile-size", "24"), "--tiles and --tile-size both"),
        (("--tile-overlap", "0.5"), "--tile-overlap is of windows"),
        (("--tile-size", "64"), "must be smaller than the images of 64 pixels"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_is_read(capsys, tmp_path, options, said):
    words = words_of(tmp_path / "nowhere", tmp_path / "out", "noco_cf", *options)
    assert said in refusal(capsys, train_mvtec.main, *words)
    assert not (tmp_path / "out").exists()


def draw_wall(root, *, side, spot):
    """A rough wall of `side` pixels; a dark spot `spot` pixels wide on half of the test images."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]

    def image():
        coarse = cv2.resize(rng.normal(size=(side // 8, side // 8)), (side, side))
        grey = 120 + 18 * coarse + rng.normal(scale=4, size=(side, side))
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)

    for number in range(3):
        save(root / f"wall/train/good/{number}.png", image())
    for number in range(2):
        save(root / f"wall/test/good/{number}.png", image())
        defective, (y, x) = image(), rng.integers(spot, side - spot, 2)
        mask = (rows - y) ** 2 + (columns - x) ** 2 <= (spot / 2) ** 2
        defective[mask] = 20
        save(root / f"wall/test/spot/{number}.png", defective)
        save(root / f"wall/ground_truth/spot/{number}_mask.png", mask)


def test_a_defect_that_the_whole_image_hides_is_found_in_windows(tmp_path):
    """Six pixels of two thousand are less than one of 224: where one is left, it stays unseen."""
    draw_wall(tmp_path / "data", side=2000, spot=6)
    found = {}
    for name, options in {
        "whole": ("--image-size", "224"),
        "windows": ("--image-size", "2000", "--tile-size", "250", "--tile-overlap", "0"),
    }.items():
        run = train(tmp_path / "data", tmp_path, "noco_cf", *options, "--cache", "host")
        (found[name],) = read_rows(run / "results.csv")
    assert found["windows"]["image_auroc"] == 1
    assert found["windows"]["pixel_auroc"] > 0.99
    assert found["whole"]["image_auroc"] < 1
    assert not found["whole"]["pixel_auroc"] > 0.9  # undefined where the masks are lost as well


def test_windows_take_memory_by_the_batch(root, tmp_path, monkeypatch):
    """However many windows an image has, the backbone sees no more at once than was asked for."""
    from models.backbone.extractor import FrozenExtractor

    seen = []
    whole = FrozenExtractor.stage_maps
    monkeypatch.setattr(
        FrozenExtractor,
        "stage_maps",
        lambda self, images: (seen.append(tuple(images.shape)), whole(self, images))[1],
    )
    options = ("--image-size", "96", "--tile-size", "32", "--extract-batch-size", "5")
    train(root, tmp_path, "noco_cf", *options, *TOY["noco_cf"])
    assert max(shape[0] for shape in seen) == 5
    assert {shape[1:] for shape in seen} == {torch.Size((3, 32, 32))}
