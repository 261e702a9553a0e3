"""Runs on images that keep their aspect, whose margins count nowhere."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

import evaluate
import export
import predict
import train_mvtec
from tests.scripts.runs import refusal, train, words_of
from tests.threads import torch_threads
from utils.runs.rows import read_rows

PADDED = ("--resize", "bilinear_padded", "--image-size", "48")


@pytest.fixture(scope="module", params=[(), ("--tiles", "2")], ids=["whole", "tiles"])
def padded(request, root, tmp_path_factory):
    with torch_threads(1):
        options = ("--method.prototypes", "2", "--select", "synthetic", *request.param)
        output = tmp_path_factory.mktemp("padded")
        return train(root, output, "noco_cf", *PADDED, *options, "--save-maps", "--overlays", "2")


def test_margins_hold_no_scores_and_no_defects(padded):
    with np.load(padded / "scores/cloth-seed0.npz") as saved:
        maps, masks = saved["map"], saved["mask"]
    side = maps.shape[1]
    margin = side // 6  # images are 90 x 60
    for one in (slice(0, margin), slice(side - margin, side)):
        assert (maps[:, one] == maps.min((1, 2))[:, None, None]).all()
        assert not masks[:, one].any()


def test_prediction_gives_the_scores_of_the_run_and_maps_of_the_whole_image(padded, root, tmp_path):
    with torch_threads(1):
        predict.main([str(padded), str(root / "cloth/test"), "--out", str(tmp_path)])
    with (tmp_path / "scores.csv").open(newline="") as file:
        found = {row["path"]: float(row["score"]) for row in csv.DictReader(file)}
    with np.load(padded / "scores/cloth-seed0.npz") as saved:
        for path, score in zip(saved["path"], saved["score"], strict=True):
            assert found[str(path)] == pytest.approx(score, rel=1e-5)
    for path in (tmp_path / "maps").glob("*.png"):
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert pixels.shape == (60, 90)
        assert (pixels > 0).all()  # 0 stands for what a crop cut away
    evaluate.main([str(padded)])
    assert 0 <= read_rows(padded / "results.csv")[0]["pixel_auroc"] <= 1


def test_export_says_that_a_file_would_not_know_the_margins(padded, capsys, tmp_path):
    words = (padded, "--format", "torchscript", "--out", tmp_path / "m.pt")
    assert "would not know which part of an image is margin" in refusal(capsys, export.main, *words)
    assert not Path(tmp_path / "m.pt").exists()


def test_a_crop_of_padded_images_is_refused(capsys, root, tmp_path):
    words = [*words_of(root, tmp_path, "knn", *PADDED), "--crop-size", "32"]
    assert "add --crop-size none" in refusal(capsys, train_mvtec.main, *words)
