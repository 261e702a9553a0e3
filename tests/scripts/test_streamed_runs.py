"""`--cache none` through the scripts: the numbers of `--cache host`, and how often it reads."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import evaluate
import train_mnist
import train_mvtec
from datasets.reading.loading import ArrayDataset, ImageDataset
from models.backbone.extractor import FrozenExtractor
from tests.datasets.trees import draw_mvtec_category
from tests.scripts import runs
from tests.scripts.runs import DIGITS, measured, refusal
from utils.runs.rows import read_rows
from utils.runs.run import Run

NUM_TRAIN, NUM_TEST = 20, 18  # two kinds of 6 defects
CALIBRATED = ("--calibration-share", "0.3", "--false-alarm-rate", "0.3")
ONE_TIME = ("--method.time", "300", "--select", "last")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "cloth", num_train=NUM_TRAIN, num_good=6, num_defective=6)
    return root


def words_of(root, output, cache, method, *options):
    words = ("--extract-batch-size", "4", "--cache", cache, *options)
    return runs.words_of(root, output / cache, method, *words)


def train(*arguments):
    return train_mvtec.main(words_of(*arguments))


def assert_equal_runs(found, wanted, tolerance=0.0):
    rows, others = measured(found), measured(wanted)
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        assert (row.pop("twins"), "Leaks were not looked for" in row.pop("remarks")) == ("", True)
        for name, value in row.items():
            is_float = isinstance(value, float)
            expected = pytest.approx(other[name], abs=tolerance) if is_float else other[name]
            assert value == expected, name
        pair = row["category"], row["seed"]
        scores = [Run.read(folder).load_scores(*pair)["score"] for folder in (found, wanted)]
        np.testing.assert_allclose(*scores, rtol=tolerance, atol=0)
        heads = [Run.read(folder).load_head(*pair)[0] for folder in (found, wanted)]
        assert heads[0].keys() == heads[1].keys()
        for name in heads[0]:
            tensors = [head[name] for head in heads]
            if tolerance and name.endswith("filters"):
                # Their rows are eigenvectors, which have no sign; scores are lengths of products.
                tensors = [rows.mT @ rows for rows in tensors]
            np.testing.assert_allclose(*tensors, rtol=tolerance, atol=tolerance)


@pytest.fixture
def read(monkeypatch):
    """How often each file was decoded, and how many images the backbone got."""
    counts, item, stage_maps = Counter(), ImageDataset.__getitem__, FrozenExtractor.stage_maps

    def counted(self, index):
        counts[self.paths[index]] += 1
        return item(self, index)

    def seen(self, images):
        counts["backbone"] += len(images)
        return stage_maps(self, images)

    monkeypatch.setattr(ImageDataset, "__getitem__", counted)
    monkeypatch.setattr(FrozenExtractor, "stage_maps", seen)
    return counts


def times_read(read, split):
    files = [path for path in read if path != "backbone" and split in path.parts]
    assert len(files) == {"train": NUM_TRAIN, "test": NUM_TEST}[split]
    return {read[path] for path in files}


@pytest.mark.parametrize(
    ("method", "options", "train_times"),
    [
        ("noco_exact", ("--method.prototypes", "1", *ONE_TIME), 1),
        ("noco_exact", ("--method.prototypes", "2", *ONE_TIME), 2),  # first for k-means
        ("mahalanobis", (), 1),
        ("patchcore", ("--method.coreset-ratio", "0.5"), None),
    ],
)
def test_readings_in_order_give_the_bits_of_a_bank(
    root, tmp_path, read, method, options, train_times
):
    streamed = train(root, tmp_path, "none", method, *options)
    if train_times is not None:
        assert times_read(read, "train") == {train_times}
        assert read["backbone"] == train_times * NUM_TRAIN + NUM_TEST
    assert times_read(read, "test") == {1}
    assert_equal_runs(streamed, train(root, tmp_path, "host", method, *options))
    (row,) = read_rows(streamed / "results.csv")
    assert row["pass_test_seconds"] == 0
    # The backbone's time is where the features are read.
    assert row["extract_seconds"] < row["fit_seconds"] + row["score_seconds"]
    assert row["image_auroc"] > 0.9


# Equal to the bit where measured; but no promise of the backbone's libraries.
@pytest.mark.parametrize(
    ("method", "options", "tolerance"),
    [
        ("noco", ("--method.epochs", "2", "--method.batch-size", "3", "--select", "last"), 1e-6),
        ("noco", ("--method.epochs", "2", "--select", "best_test", "--monitor-test"), 1e-6),
        ("stpm", ("--method.epochs", "2", "--method.batch-size", "4"), 0.0),
        ("noco_exact", ("--method.time", "10", "100", "--select", "synthetic"), 1e-6),
        ("noco_exact", ("--method.prototypes", "1", *ONE_TIME, *CALIBRATED), 1e-6),
    ],
)
def test_other_readings_give_the_numbers_of_a_bank(root, tmp_path, method, options, tolerance):
    streamed, stored = (train(root, tmp_path, c, method, *options) for c in ("none", "host"))
    assert_equal_runs(streamed, stored, tolerance)


def test_an_online_curve_is_that_of_a_bank_and_ends_at_the_result(root, tmp_path):
    options = ("--method.prototypes", "1", *ONE_TIME, "--online")
    curves = []
    for cache in ("none", "host"):
        folder = train(root, tmp_path, cache, "noco_exact", *options)
        (path,) = (folder / "online").glob("*.csv")
        with path.open(newline="") as file:
            curves.append(list(csv.DictReader(file)))
    assert [line["num_images"] for line in curves[0]] == ["1", "2", "5", "10", "20"]
    for ours, theirs in zip(*curves, strict=True):
        for name, value in ours.items():
            assert float(value) == pytest.approx(float(theirs[name]), abs=1e-4)
    (row,) = measured(folder)
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert float(curves[1][-1][name]) == pytest.approx(row[name], abs=1e-4)
    assert np.array(Image.open(path.with_suffix(".png"))).std() > 0


def test_unreadable_images(root, tmp_path, capsys, read):
    damaged = tmp_path / "data"
    draw_mvtec_category(damaged, "cloth", num_train=NUM_TRAIN, num_good=6, num_defective=6)
    lost = [sorted((damaged / "cloth" / part).rglob("*.png"))[1] for part in ("train", "test")]
    for path in lost:
        path.write_bytes(path.read_bytes()[:200])
    options = ("noco_exact", "--method.prototypes", "1", *ONE_TIME)
    messages = [
        refusal(capsys, train_mvtec.main, *words_of(damaged, tmp_path, cache, *options))
        for cache in ("none", "host")
    ]
    assert messages[0] == messages[1]
    assert str(lost[0]) in messages[0]
    read.clear()
    streamed = train(damaged, tmp_path, "none", *options, "--skip-unreadable")
    # The first reading only looks which images there are.
    files = [path for path in read if path != "backbone"]
    assert {path: read[path] for path in files} == {p: 1 if p in lost else 2 for p in files}
    assert len(files) == NUM_TRAIN + NUM_TEST
    assert read["backbone"] == 5 * 4 + 5 * 4, "19 and 17 images in batches of four"
    (row,) = measured(streamed)
    assert row["pixel_auroc"] > 0.9  # masks still belong to their images
    assert (row["num_train"], row["num_test"], row["skipped"]) == (NUM_TRAIN - 1, NUM_TEST - 1, 2)
    data = json.loads((streamed / "metrics.jsonl").read_text().splitlines()[0])
    for path, reason in zip(lost, data["skipped"], strict=True):
        assert str(path) in reason
        assert "truncated" in reason
    assert str(lost[1]) not in Run.read(streamed).load_scores("cloth", 0)["path"]
    assert "2 unreadable images were left out" in (streamed / "table.md").read_text()
    stored = train(damaged, tmp_path, "host", *options, "--skip-unreadable")
    assert_equal_runs(streamed, stored, 1e-4)


def test_saved_heads_give_the_same_table_again(root, tmp_path, capsys):
    options = ("--method.prototypes", "1", *ONE_TIME)
    folder = train(root, tmp_path, "none", "noco_exact", *options)
    assert evaluate.main([str(folder), "--cache", "none", "--workers", "0"]) == 0
    assert evaluate.main([str(folder), "--cache", "host", "--workers", "0"]) == 0
    assert capsys.readouterr().out.count("seed 0  last:  equal") == 2


def test_tasks_of_a_data_set_read_their_own_images(tmp_path, monkeypatch):
    sizes, item = Counter(), ArrayDataset.__getitem__

    def counted(self, index):
        sizes[len(self), index] += 1
        return item(self, index)

    monkeypatch.setattr(ArrayDataset, "__getitem__", counted)
    folders = {}
    for cache in ("none", "host"):
        sizes.clear()
        words = ["--output", str(tmp_path / cache), "--cache", cache]
        words += ["--method.prototypes", "1", "--image-size", "32"]
        folders[cache] = train_mnist.main(["digits", "noco_exact", *DIGITS[1:], *words])
        num_train, num_test = sorted({length for length, _ in sizes}, reverse=True)
        times = {
            length: Counter(count for (of, _), count in sizes.items() if of == length)
            for length in (num_train, num_test)
        }
        rows = measured(folders[cache])
        assert all(row["image_auroc"] > 0.9 for row in rows)
        if cache == "none":
            assert times[num_train] == {1: sum(row["num_train"] for row in rows)}
            assert times[num_test] == {2: num_test}
        else:
            assert times == {num_train: {1: num_train}, num_test: {1: num_test}}
    assert_equal_runs(folders["none"], folders["host"], 1e-6)
