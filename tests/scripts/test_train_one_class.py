"""The semantic scripts end to end: the embedded digits, and a folder of classes drawn here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import pipeline.features
import train_cifar10
import train_mnist
from models.backbone.extractor import FrozenExtractor
from models.methods.noco import Noco
from tests.datasets.trees import save as save_image
from utils.runs.files import read_rows
from utils.runs.run import Run

CLASSES = ("0", "1", "6")
NUM_DIGITS = 1797
QUICK = ("--image-size", "32", "--method.epochs", "2", "--workers", "0", "--overlays", "3")


def train_digits(output, *options):
    """Run train_mnist.py on the embedded digits and return its run folder."""
    arguments = ["digits", "--output", str(output), *QUICK, "--categories", *CLASSES, *options]
    return train_mnist.main(arguments)


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


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return train_digits(tmp_path_factory.mktemp("digits"), "--seeds", "0", "1")


def measured(folder):
    """The rows of results.csv without the time they took and the undefined pixel metrics."""
    rows = []
    for row in read_rows(folder / "results.csv"):
        undefined = {name for name, value in row.items() if value != value}
        assert undefined == {"pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"}
        rows.append(
            {k: v for k, v in row.items() if k not in undefined and not k.endswith("_seconds")}
        )
    return rows


def test_digits_are_told_apart(digits):
    rows = measured(digits)
    assert [(row["category"], row["seed"]) for row in rows] == [
        (category, seed) for category in CLASSES for seed in (0, 1)
    ]
    for row in rows:
        assert row["image_auroc"] > 0.9
        assert 100 < row["num_train"] < 115  # a class's share of the 1,078 training images
        assert (row["num_test"], row["step"]) == (719, 2)
        assert row["trainable"] == 320 * 321 + 1


def test_a_head_that_learns_nothing_fails(tmp_path):
    folder = train_digits(tmp_path, "--method.learning-rate", "1e-12", "--overlays", "0")
    assert np.mean([row["image_auroc"] for row in measured(folder)]) < 0.7


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
            (row,) = (
                row
                for row in measured(digits)
                if (row["category"], row["seed"]) == (category, seed)
            )
            auroc = roc_auc_score(scores["label"], scores["score"])
            assert row["image_auroc"] == pytest.approx(auroc, abs=1e-9)
            state, _ = run.load_head(category, seed)
            assert state["projector.weight"].shape == (320, 320)
        with Image.open(digits / f"overlays/{category}-seed0/gallery.png") as gallery:
            gallery.load()
            assert min(gallery.size) > 100
        assert not (digits / f"overlays/{category}-seed1").exists()
    lines = [json.loads(line) for line in (digits / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["data", "step", "step"] * 6
    for name in ("table.md", "table.tex", "table.csv", "table.json"):
        text = (digits / name).read_text()
        assert "mean" in text
        assert "pixel" not in text
    assert "one-vs-rest" in (digits / "table.md").read_text()


def test_backbone_sees_each_image_once_for_all_classes_and_seeds(tmp_path, seen, digits):
    folder = train_digits(tmp_path, "--seeds", "0", "1")
    assert sum(seen) == NUM_DIGITS
    assert measured(folder) == measured(digits)


def test_one_class_alone_gives_the_bits_it_has_in_the_full_run(digits, tmp_path):
    alone = train_mnist.main(
        ["digits", "--output", str(tmp_path), *QUICK, "--categories", "6", "--seeds", "1"]
    )
    (row,) = measured(alone)
    (expected,) = [x for x in measured(digits) if (x["category"], x["seed"]) == ("6", 1)]
    assert row == expected
    for one, two in zip(
        Run.read(alone).load_scores("6", 1).values(),
        Run.read(digits).load_scores("6", 1).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    heads = [Run.read(folder).load_head("6", 1)[0] for folder in (alone, digits)]
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())


def test_interrupted_run_continues_to_the_same_results(digits, tmp_path, monkeypatch, seen, capsys):
    fit, started = Noco.fit, []

    def interrupted(self, bank, **options):
        started.append(self)
        if len(started) == 4:  # the second seed of the second class
            raise KeyboardInterrupt
        fit(self, bank, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Noco, "fit", interrupted)
        with pytest.raises(SystemExit) as exit_:
            train_digits(tmp_path, "--seeds", "0", "1")
    assert exit_.value.code == 130
    (folder,) = (tmp_path / "digits-noco").iterdir()
    assert len(measured(folder)) == 3
    assert train_digits(tmp_path, "--seeds", "0", "1") == folder
    assert measured(folder) == measured(digits)
    for name in ("metrics.jsonl", "config.json", "table.md", "table.csv", "table.json"):
        assert (folder / name).read_bytes() == (digits / name).read_bytes(), name

    seen.clear()
    train_digits(tmp_path, "--seeds", "0", "1")
    assert seen == [], "nothing is pending, so nothing is extracted"


def test_best_on_test_stands_beside_the_last_epoch(digits, tmp_path):
    folder = train_digits(tmp_path, "--select", "best_test", "--overlays", "0")
    rows = measured(folder)
    assert [row["select"] for row in rows] == ["last", "best_test"] * 3
    honest = [row for row in measured(digits) if row["seed"] == 0]
    for last, best, expected in zip(rows[::2], rows[1::2], honest, strict=True):
        assert last == expected
        assert best["image_auroc"] >= last["image_auroc"]
    assert "best on test (optimistic)" in (folder / "table.md").read_text()


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
    arguments = ["folder", method, "--data-root", str(root), "--output", str(output)]
    arguments += ["--backbone", "tf_efficientnet_lite0", "--layers", "3"]
    arguments += ["--image-size", "64", "--crop-size", "none", "--workers", "0", "--overlays", "2"]
    if method == "noco":
        arguments += ["--method.batch-size", "8", "--method.epochs", "20"]
    return train_cifar10.main([*arguments, *options])


def test_folder_of_classes(class_folders, tmp_path):
    folder = train_folder(class_folders, tmp_path)
    rows = measured(folder)
    assert [row["category"] for row in rows] == ["checks", "rings", "stripes"]
    for row in rows:
        assert row["image_auroc"] > 0.9
        assert (row["num_train"], row["num_test"]) == (10, 24)
    # The class's number stands beside its name.
    assert "1 rings" in (folder / "table.md").read_text()
    scores = Run.read(folder).load_scores("rings", 0)
    assert scores["path"][0].endswith("test/checks/00.png")
    assert scores["label"].tolist() == [1] * 8 + [0] * 8 + [1] * 8
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"].startswith("train_cifar10.py folder")


def test_leave_one_out_trains_on_all_other_classes(class_folders, tmp_path):
    folder = train_folder(
        class_folders, tmp_path, "--protocol", "leave-one-out", "--categories", "rings", "2"
    )
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
    rows = measured(train_folder(root, tmp_path, *options, *chosen, method="noco_cf"))
    assert [row["category"] for row in rows] == ["checks", "rings"]
    for row in rows:
        assert (row["select"], row["num_train"], row["num_test"]) == ("synthetic", 10, 24)
        assert row["image_auroc"] > 0.9
    # Two of ten images of either class are held out and turned.
    assert sum(seen) == 21 + 24 + 2 * 2


def test_unreadable_images_shift_nothing(class_folders, tmp_path):
    root = tmp_path / "classes"
    draw_class_folders(root)
    bad = [root / name for name in ("train/checks/03.png", "test/checks/00.png")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:300])
    folder = train_folder(root, tmp_path, "--skip-unreadable", "--categories", "rings", "checks")
    whole = train_folder(class_folders, tmp_path, "--categories", "rings")
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
    assert [str(path) in reason for path, reason in zip(bad, data["skipped"], strict=True)] == [
        True,
        True,
    ]
    assert "unreadable images were left out" in (folder / "table.md").read_text()
