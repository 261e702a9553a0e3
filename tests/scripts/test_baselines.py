"""The methods we compare with, through the scripts; and the store of features on disk."""

import importlib.util

import numpy as np
import pytest
import torch

import train_mnist
import train_mvtec
from models.backbone.extractor import FrozenExtractor
from models.building import build_detector, build_extractor
from models.method import find_method
from models.methods.stpm import StpmOptions
from tests.datasets.trees import draw_mvtec_category
from utils.features.store import FeatureStore, default_folder
from utils.runs.files import read_rows

IMAGES = (
    *("--backbone", "tf_efficientnet_lite0", "--image-size", "64", "--crop-size", "none"),
    *("--workers", "0", "--overlays", "0"),
)
DIGITS = ("digits", "--categories", "0", "7", "--overlays", "0", "--workers", "0")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "cloth", num_train=12, num_good=6, num_defective=5)
    return root


def train(root, output, method, *options):
    arguments = ["folder", method, "--data-root", str(root), "--output", str(output), *IMAGES]
    return train_mvtec.main([*arguments, *options])


def measured(folder):
    return [
        {name: value for name, value in row.items() if not name.endswith("_seconds")}
        for row in read_rows(folder / "results.csv")
    ]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("patchcore", ("--method.coreset-ratio", "0.5")),
        ("padim", ("--method.dims", "20")),
        ("knn", ()),
        ("mahalanobis", ("--method.feature-norm", "l2_per_layer")),
        ("stpm", ("--method.epochs", "12", "--method.batch-size", "4", "--image-size", "96")),
    ],
)
def test_visible_defects_are_found(root, tmp_path, method, options):
    folder = train(root, tmp_path, method, *options)
    (row,) = read_rows(folder / "results.csv")
    assert row["image_auroc"] > 0.9
    assert row["pixel_auroc"] > 0.9
    assert row["head_bytes"] > 0
    assert row["score_seconds"] > 0
    assert row["extract_seconds"] >= row["pass_test_seconds"] > 0
    assert (folder / "heads/cloth-seed0.safetensors").stat().st_size >= row["head_bytes"]


def test_image_score_of_the_method_is_the_one_recorded(root, tmp_path):
    """PatchCore's own score is not the maximum of its map."""
    folder = train(root, tmp_path, "patchcore", "--method.coreset-ratio", "0.5", "--save-maps")
    with np.load(folder / "scores/cloth-seed0.npz") as stored:
        ratio = stored["score"] / stored["map"].max(axis=(1, 2))
    assert ratio.std() > 0.01


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("panda", ("--method.epochs", "2", "--image-size", "32")),
        ("mean_shifted", ("--method.epochs", "1", "--image-size", "32")),
        ("deep_svdd", ("--method.pretrain-epochs", "5", "--method.epochs", "20")),
        ("knn", ("--method.feature-norm", "l2", "--image-size", "32")),
        ("padim", ("--image-size", "32")),
        ("patchcore", ("--image-size", "32")),
    ],
)
def test_digits_are_told_apart(tmp_path, method, options):
    folder = train_mnist.main([*DIGITS, method, "--output", str(tmp_path), *options])
    rows = read_rows(folder / "results.csv")
    assert [row["category"] for row in rows] == ["0", "7"]
    # Deep SVDD learns all it knows in these few epochs.
    least = 0.75 if method == "deep_svdd" else 0.9
    assert sum(row["image_auroc"] for row in rows) / 2 > least


def test_a_method_on_images_builds_from_what_stands_in_the_extractors_place():
    stpm = find_method("stpm")
    assert stpm.takes == {"images"}
    source = build_extractor(stpm, "resnet10t", (1, 2), weights="random")
    assert source.stage_channels == (3,)
    assert isinstance(source.network, FrozenExtractor)
    assert source.random_weights
    head = build_detector("stpm", source, StpmOptions(epochs=1))
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert head(images).shape == (1, 32, 32)
    lenet = build_extractor(find_method("deep_svdd"), "lenet", (0,))
    assert lenet.network is None
    assert not lenet.random_weights


@pytest.mark.parametrize("method", ["noco_cf", "stpm"])
def test_features_on_disk_give_the_same_table_without_the_backbone(
    root, tmp_path, monkeypatch, method
):
    monkeypatch.setenv("NOCO_CACHE", str(tmp_path / "cache"))
    options = {"noco_cf": ("--method.time", "10", "100"), "stpm": ("--method.epochs", "2")}[method]
    in_memory = train(root, tmp_path / "a", method, *options, "--cache", "host")
    cold = train(root, tmp_path / "b", method, *options, "--cache", "disk")
    entries = FeatureStore(default_folder()).entries()
    assert len(entries) == (3 if method == "noco_cf" else 2)  # selection has its pasted images

    def forbidden(*_):
        raise AssertionError("the images were taken again")

    monkeypatch.setattr("datasets.reading.loading.BatchLoader.__iter__", forbidden)
    warm = train(root, tmp_path / "c", method, *options, "--cache", "disk", "--device", "cpu")
    assert measured(in_memory) == measured(cold) == measured(warm)
    assert len(FeatureStore(default_folder()).entries()) == len(entries)


def test_a_method_that_cannot_be_built_says_so_before_an_image_is_read(
    root, tmp_path, monkeypatch, capsys
):
    def forbidden(*_):
        raise AssertionError("an image was read")

    found = importlib.util.find_spec
    without = {"faiss": None}
    monkeypatch.setattr(
        "models.features.nearest.importlib.util.find_spec",
        lambda name: without.get(name, found(name)),
    )
    monkeypatch.setattr("datasets.reading.loading.BatchLoader.__iter__", forbidden)
    with pytest.raises(SystemExit) as exit_:
        train(root, tmp_path, "patchcore", "--method.search", "faiss")
    assert exit_.value.code == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err
