"""Runs on a vision transformer, whose weights are random here, through every script.

They lie in a file: what `--weights random` makes is kept nowhere, so nothing could be scored again.
"""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import evaluate
import export
import predict
import train_mvtec
from tests.scripts.runs import train_digits
from tests.threads import torch_threads
from utils.runs.rows import read_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
BACKBONE = "test_vit"  # three blocks, patches of 16 pixels
METHODS = {
    "noco_cf": ("--method.prototypes", "2"),
    "patchcore": ("--method.coreset-ratio", "0.1"),
    "padim": ("--method.dims", "20"),
    "knn": (),
    "uniad": (
        "--method.epochs",
        "1",
        "--method.hidden",
        "16",
        "--method.heads",
        "2",
        "--method.neighbourhood",
        "3",
    ),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(BACKBONE).state_dict(), path)
    return path


@pytest.fixture(scope="module", params=METHODS)
def trained(request, weights, root, tmp_path_factory):
    with torch_threads(1):
        return train_mvtec.main(
            [
                *("folder", request.param, "--data-root", str(root)),
                *("--output", str(tmp_path_factory.mktemp("vit")), "--backbone", BACKBONE),
                *("--weights", str(weights), "--layers", "0", "2", "--image-size", "96"),
                *("--crop-size", "none", "--workers", "0", "--overlays", "0"),
                *METHODS[request.param],
            ]
        )


def test_a_run_goes_through_predict_and_evaluate(trained, root, tmp_path):
    (row,) = read_rows(trained / "results.csv")
    assert 0 <= row["image_auroc"] <= 1
    assert json.loads((trained / "config.json").read_text())["layers"] == [0, 2]
    with torch_threads(1):
        predict.main([str(trained), str(root / "cloth/test"), "--out", str(tmp_path)])
    with (tmp_path / "scores.csv").open(newline="") as file:
        found = {row["path"]: float(row["score"]) for row in csv.DictReader(file)}
    with np.load(trained / "scores/cloth-seed0.npz") as saved:
        for path, score in zip(saved["path"], saved["score"], strict=True):
            assert found[str(path)] == pytest.approx(score, rel=1e-4)
    evaluate.main([str(trained)])
    assert (trained / "evaluation.csv").is_file()


@pytest.mark.parametrize("file_format", ["onnx", "torchscript"])
def test_a_run_is_exported(trained, file_format, tmp_path):
    if file_format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = tmp_path / f"head.{file_format}"
    export.main([str(trained), "--format", file_format, "--out", str(out)])
    said = json.loads(out.with_name(f"{out.name}.json").read_text())
    assert said["backbone"] == BACKBONE
    assert said["checked"]["scores"]["share_of_range"] < 1e-3


def test_random_weights_are_said_in_the_table(root, tmp_path):
    run = train_mvtec.main(
        [
            *("folder", "knn", "--data-root", str(root), "--output", str(tmp_path)),
            *("--backbone", BACKBONE, "--weights", "random", "--layers", "2"),
            *("--image-size", "96", "--crop-size", "none", "--workers", "0", "--overlays", "0"),
        ]
    )
    assert "RANDOM" in (run / "table.md").read_text().upper()


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_a_class_token_stands_for_an_image_of_digits(weights, tmp_path, pool):
    run = train_digits(
        tmp_path, "--backbone", BACKBONE, "--weights", str(weights), "--layers", "2",
        "--pool", pool, "--image-size", "32",
    )  # fmt: skip
    rows = read_rows(run / "results.csv")
    assert len(rows) == 2
    assert ("pool" in json.loads((run / "config.json").read_text())) == (pool == "class_token")
