"""The semantic scripts end to end: the embedded digits, and a folder of classes drawn here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.features
import train_cifar10
from models.backbone.extractor import FrozenExtractor
from models.methods.noco import Noco
from tests.datasets.trees import save as save_image
from tests.scripts.runs import IMAGES, assert_same_pair, assert_same_run, measured, train_digits
from utils.runs.run import Run

CLASSES = ("0", "1")
NUM_DIGITS = 1797


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """How many images each call of the backbone got; none finds its features on disk."""
    monkeypatch.setattr(pipeline.features, "default_folder", lambda: tmp_path / "cache")
    counts = []
    stage_maps = FrozenExtractor.stage_maps

    def counted(self, images):
        counts.append(len(images))
        return stage_maps(self, images)

    monkeypatch.setattr(FrozenExtractor, "stage_maps", counted)
    return counts


def test_digits_are_told_apart(digits):
    rows = measured(digits)
    assert [(row["category"], row["seed"]) for row in rows] == [
        (category, seed) for category in CLASSES for seed in (0, 1)
    ]
    for row in rows:
        assert row["image_auroc"] > 0.9
        undefined = {name for name, value in row.items() if value is None}
        assert undefined == {"pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"}
        assert 100 < row["num_train"] < 115  # a class's share of the 1,078 training images
        assert (row["num_test"], row["step"]) == (719, 2)
        assert row["trainable"] == 320 * 321 + 1


def test_every_file_of_the_run_is_there_and_readable(digits):
    assert digits.parent.name == "digits-noco"
    config = json.loads((digits / "config.json").read_text())
    assert (config["protocol"], config["method"]["loss"]) == ("one-vs-rest", "squared")
    environment = json.loads((digits / "environment.json").read_text())
    assert environment["command"].startswith("train_mnist.py digits --output")
    run = Run.read(digits)
    for category in CLASSES:
        for seed in (0, 1):
            scores = run.load_scores(category, seed)
            assert scores["path"].tolist() == [f"test/{index}" for index in range(719)]
            expected = (scores["defect"] != category).astype(int)
            np.testing.assert_array_equal(scores["label"], expected)
            state, _ = run.load_head(category, seed)
            assert state["projector.weight"].shape == (320, 320)
        with Image.open(digits / f"overlays/{category}-seed0/gallery.png") as gallery:
            gallery.load()
            assert min(gallery.size) > 100
        assert not (digits / f"overlays/{category}-seed1").exists()
    lines = [json.loads(line) for line in (digits / "metrics.jsonl").read_text().splitlines()]
    # Of 719 digits of 8 x 8 pixels a few have a twin.
    events = [line["event"] for line in lines if line["event"] != "twins"]
    assert events == ["data", "step", "step"] * 4
    for name in ("table.md", "table.tex", "table.csv", "table.json"):
        text = (digits / name).read_text()
        assert "mean" in text
        assert "pixel" not in text
    assert "one-vs-rest" in (digits / "table.md").read_text()


def test_an_interrupted_run_continues_and_extracts_once_for_all_classes_and_seeds(
    digits, tmp_path, monkeypatch, seen
):
    fit, started = Noco.fit, []

    def interrupted(self, bank, **options):
        started.append(self)
        if len(started) == 4:  # the second seed of the second class
            raise KeyboardInterrupt
        fit(self, bank, **options)

    monkeypatch.setattr(Noco, "fit", interrupted)
    with pytest.raises(SystemExit):
        train_digits(tmp_path, "--seeds", "0", "1")
    assert len(measured(tmp_path / "digits-noco" / digits.name)) == 3
    assert sum(seen) == NUM_DIGITS
    seen.clear()
    assert_same_run(train_digits(tmp_path, "--seeds", "0", "1"), digits)
    assert sum(seen) == NUM_DIGITS


def test_one_class_alone_gives_the_bits_it_has_in_the_full_run(digits, tmp_path):
    alone = train_digits(tmp_path, "--categories", "1", "--seeds", "1")
    assert len(measured(alone)) == 1
    assert_same_pair(alone, digits, "1", 1)


def draw_class_folders(root, *, num_train=10, num_test=8, size=48):
    """Draws `train/<class>/` and `test/<class>/` of three textures that anyone tells apart."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    patterns = {
        "checks": lambda a, b: (np.sin((x + a) / 2) * np.sin((y + b) / 2)) > 0,
        "rings": lambda a, b: np.sin(np.hypot(x - 24 - a, y - 24 - b)) > 0,
        "stripes": lambda a, b: np.sin((x + y + a + b) / 3) > 0,
    }
    for split, count in (("train", num_train), ("test", num_test)):
        for name, pattern in patterns.items():
            for index in range(count):
                ink = pattern(*rng.uniform(-4, 4, 2))[:, :, None] * [90, 80, 70]
                image = 80 + ink + rng.normal(0, 8, (size, size, 3))
                save_image(
                    root / split / name / f"{index:02d}.png",
                    np.clip(image, 0, 255).astype(np.uint8),
                )


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    draw_class_folders(root)
    return root


def train_folder(root, output, *options, method="noco"):
    """Run train_cifar10.py on a folder of classes and return its run folder."""
    words = ["folder", method, "--data-root", str(root), "--output", str(output), *IMAGES]
    if method == "noco":
        words += ["--method.batch-size", "8", "--method.epochs", "20"]
    return train_cifar10.main([*words, "--layers", "3", *options])


@pytest.fixture(scope="module")
def whole(class_folders, tmp_path_factory):
    """The undisturbed run of the three classes."""
    return train_folder(class_folders, tmp_path_factory.mktemp("whole"), "--overlays", "2")


def test_folder_of_classes(whole):
    rows = measured(whole)
    assert [row["category"] for row in rows] == ["checks", "rings", "stripes"]
    for row in rows:
        assert row["image_auroc"] > 0.9
        assert (row["num_train"], row["num_test"]) == (10, 24)
    # The class's number stands beside its name.
    assert "1 rings" in (whole / "table.md").read_text()
    scores = Run.read(whole).load_scores("rings", 0)
    assert scores["path"][0].endswith("test/checks/00.png")
    assert scores["label"].tolist() == [1] * 8 + [0] * 8 + [1] * 8
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["command"].startswith("train_cifar10.py folder")


def test_leave_one_out_trains_on_all_other_classes(class_folders, tmp_path):
    options = ("--protocol", "leave-one-out", "--categories", "rings", "2")
    folder = train_folder(class_folders, tmp_path, *options)
    rows = measured(folder)
    assert [row["category"] for row in rows] == ["rings", "stripes"]
    for row in rows:
        assert (row["num_train"], row["num_test"]) == (20, 24)
        assert row["image_auroc"] > 0.8
    scores = Run.read(folder).load_scores("rings", 0)
    assert scores["label"].tolist() == [0] * 8 + [1] * 8 + [0] * 8
    assert "leave-one-out" in (folder / "table.md").read_text()


def test_a_class_that_is_left_out_may_have_a_single_training_image(tmp_path, seen):
    """Turned images are made for the tasks of all classes; such a class has no task."""
    root = tmp_path / "classes"
    draw_class_folders(root)
    for path in sorted((root / "train/stripes").iterdir())[1:]:
        path.unlink()
    options = ("--method.prototypes", "1", "--select", "synthetic")
    chosen = ("--categories", "checks", "rings")
    rows = measured(train_folder(root, tmp_path, *options, *chosen, method="noco_exact"))
    assert [row["category"] for row in rows] == ["checks", "rings"]
    for row in rows:
        assert (row["select"], row["num_train"], row["num_test"]) == ("synthetic", 10, 24)
        assert row["image_auroc"] > 0.9
    # Two of ten images of either class are held out and turned.
    assert sum(seen) == 21 + 24 + 2 * 2


def test_unreadable_images_shift_nothing(whole, tmp_path):
    root = tmp_path / "classes"
    draw_class_folders(root)
    bad = [root / name for name in ("train/checks/03.png", "test/checks/00.png")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:300])
    folder = train_folder(root, tmp_path, "--skip-unreadable", "--categories", "rings", "checks")
    rings, checks = measured(folder)
    assert (rings["num_train"], checks["num_train"]) == (10, 9)
    assert rings["skipped"] == checks["skipped"] == 2
    # The same ten rings train the same head, and each score stays with its image.
    heads = [Run.read(run).load_head("rings", 0)[0] for run in (folder, whole)]
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-3, atol=1e-4)
    scores = Run.read(folder).load_scores("rings", 0)
    assert len(scores["path"]) == 23
    assert str(bad[1]) not in scores["path"]
    for path, label in zip(scores["path"], scores["label"], strict=True):
        assert label == ("rings" not in path)
    data = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert all(str(path) in why for path, why in zip(bad, data["skipped"], strict=True))
    assert "unreadable images were left out" in (folder / "table.md").read_text()
