"""Methods through the scripts: digits, selection without test images, and features on disk."""

import importlib.util
import json

import pytest

import train_mnist
import train_mvtec
from tests.datasets.trees import draw_mvtec_category
from tests.scripts.runs import DIGITS, measured, refusal, train, words_of
from utils.features.store import FeatureStore, default_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "cloth", num_train=10, num_good=6, num_defective=4)
    return root


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
    rows = measured(train_mnist.main([*DIGITS, method, "--output", str(tmp_path), *options]))
    assert [row["category"] for row in rows] == ["0", "7"]
    # Deep SVDD learns all it knows in these few epochs.
    least = 0.75 if method == "deep_svdd" else 0.9
    assert sum(row["image_auroc"] for row in rows) / 2 > least


def lines_of(folder, event):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_selection_on_pasted_defects(root, tmp_path):
    options = ("--method.prototypes", "2", "--method.time", "10", "100", "1000")
    selecting = (*options, "--grid", "prototypes=1,2", "--select", "synthetic")
    folder = train(root, tmp_path, "noco_exact", *selecting)
    (row,) = measured(folder)
    assert row["select"] == "synthetic"
    assert row["image_auroc"] > 0.9
    assert row["pixel_auroc"] > 0.9
    assert row["trainable"] == 0
    assert row["num_train"] == 10  # refitted on all normals

    curve = lines_of(folder, "selection")
    assert [(line["options"]["prototypes"], line["time"]) for line in curve] == [
        (prototypes, time) for prototypes in (1, 2) for time in (10, 100, 1000)
    ]
    assert not any(key.startswith("test_") for line in curve for key in line)
    best = max(curve, key=lambda line: (line["synthetic_auroc"], line["synthetic_image_auroc"]))
    (chosen,) = lines_of(folder, "chosen")
    assert chosen["options"] == {**best["options"], "time": [best["time"]]}
    assert chosen["synthetic_auroc"] == best["synthetic_auroc"]
    prototypes, time = best["options"]["prototypes"], best["time"]
    assert row["chosen"] == f"prototypes={prototypes} time={time:g}"
    (step,) = lines_of(folder, "step")
    assert step["time"] == time

    # Watching the test set chooses nothing and changes no number.
    watched = train(root, tmp_path / "watched", "noco_exact", *selecting, "--monitor-test")
    assert measured(watched) == [row]
    assert all("test_image_auroc" in line for line in lines_of(watched, "selection"))

    # The chosen options alone give the same numbers.
    options = ("--method.prototypes", str(prototypes), "--method.time", str(time))
    plain = train(root, tmp_path / "plain", "noco_exact", *options, "--select", "last")
    (alone,) = measured(plain)
    assert alone["image_auroc"] == pytest.approx(row["image_auroc"], abs=1e-6)
    assert alone["pixel_auroc"] == pytest.approx(row["pixel_auroc"], abs=1e-4)


def test_a_single_training_image_fits_but_cannot_select(tmp_path, capsys):
    draw_mvtec_category(tmp_path / "data", "cloth", num_train=1, num_good=3)
    words = words_of(tmp_path / "data", tmp_path, "noco_exact", "--method.prototypes", "1")
    (row,) = measured(train_mvtec.main([*words, "--select", "last"]))
    assert 0 <= row["image_auroc"] <= 1
    message = refusal(capsys, train_mvtec.main, *words, "--select", "synthetic")
    assert "at least two normal training images" in message


@pytest.mark.parametrize(
    ("method", "options", "parts"),
    [
        ("noco_exact", ("--method.time", "10", "100"), 3),  # selection has its pasted images
        ("stpm", ("--method.epochs", "2"), 2),
    ],
)
def test_features_on_disk_give_the_same_table_without_the_backbone(
    root, tmp_path, monkeypatch, method, options, parts
):
    monkeypatch.setenv("NOCO_CACHE", str(tmp_path / "cache"))
    in_memory = train(root, tmp_path / "a", method, *options, "--cache", "host")
    cold = train(root, tmp_path / "b", method, *options, "--cache", "disk")
    assert len(FeatureStore(default_folder()).entries()) == parts

    def forbidden(*_):
        raise AssertionError("the images were taken again")

    monkeypatch.setattr("datasets.reading.loading.BatchLoader.__iter__", forbidden)
    warm = train(root, tmp_path / "c", method, *options, "--cache", "disk", "--device", "cpu")
    assert measured(in_memory) == measured(cold) == measured(warm)
    assert len(FeatureStore(default_folder()).entries()) == parts


def test_a_method_that_cannot_be_built_says_so_before_an_image_is_read(
    root, tmp_path, monkeypatch, capsys
):
    def forbidden(*_):
        raise AssertionError("an image was read")

    found = importlib.util.find_spec
    monkeypatch.setattr(
        "models.features.nearest.importlib.util.find_spec",
        lambda name: None if name == "faiss" else found(name),
    )
    monkeypatch.setattr("datasets.reading.loading.BatchLoader.__iter__", forbidden)
    words = words_of(root, tmp_path, "patchcore", "--method.search", "faiss")
    assert "pip install faiss-cpu" in refusal(capsys, train_mvtec.main, *words)
