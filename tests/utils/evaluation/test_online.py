"""Learning from one image at a time ends where fitting all of them does."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

from models.detector import FeatureShape, LearnsOnline
from models.errors import ModelError
from models.methods.noco import Noco, NocoOptions
from models.methods.noco_cf.noco_exact import NocoExact, NocoExactOptions
from tests.models.banks import seeded
from tests.utils.banks import bank_of, set_of
from utils.evaluation.online import COLUMNS, checkpoints, online_curve, save_online_curve


@pytest.mark.parametrize(
    ("count", "steps"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (10, [1, 2, 5, 10]),
        (60, [1, 2, 5, 10, 20, 50, 60]),
        (100, [1, 2, 5, 10, 20, 50, 100]),
        (101, [1, 2, 5, 10, 20, 50, 100, 101]),
    ],
)
def test_checkpoints(count, steps):
    assert checkpoints(count) == steps


@pytest.fixture(scope="module")
def data():
    """12 normal images to learn from, and a test set whose anomalies leave their subspace."""
    generator = seeded()
    flat = torch.randn(24, 6, 4, 4, generator=generator)
    flat[:, 4:] *= 0.05
    test = flat[12:]
    masks = torch.zeros(12, 4, 4, dtype=torch.bool)
    masks[6:, :2, :2] = True
    test[6:, 4:, :2, :2] += 0.15 * torch.randn(6, 2, 2, 2, generator=generator)
    return bank_of(flat[:12]), set_of(bank_of(test), [0] * 6 + [1] * 6, masks=masks)


def noco_cf(kind=NocoExact, prototypes=1, **options):
    return kind(FeatureShape((6,)), NocoExactOptions(prototypes=prototypes, **options))


def test_the_curve_ends_at_the_ordinary_fit(data):
    train, test = data
    rows = online_curve(noco_cf(time=(100.0,)), train, test, generator=seeded())
    fitted = noco_cf(time=(100.0,))
    fitted.fit(train, generator=seeded(1))
    metrics = test.measure(test.score(fitted)).values
    assert [row["num_images"] for row in rows] == [1, 2, 5, 10, 12]
    assert all(tuple(row) == COLUMNS for row in rows)
    for name in COLUMNS[1:]:
        assert rows[-1][name] == pytest.approx(metrics[name], abs=1e-6)
    assert 0.5 < rows[-1]["pixel_auroc"] < 1
    assert len({row["pixel_auroc"] for row in rows}) > 1, "the curve must move"


def test_the_first_point_knows_one_image_of_a_random_order(data):
    train, test = data
    first = {}
    for seed in range(3):
        detector = noco_cf(time=(100.0,))
        rows = online_curve(detector, train, test, generator=seeded(seed))
        row = int(torch.randperm(12, generator=seeded(seed))[0])
        alone = noco_cf(time=(100.0,))
        alone.fit(train.subset([row]), generator=seeded())
        expected = test.measure(test.score(alone)).values["pixel_auroc"]
        assert rows[0]["pixel_auroc"] == pytest.approx(expected, abs=1e-6)
        first[row] = rows[0]["pixel_auroc"]
    assert len(set(first.values())) == len(first) > 1


class Counting(NocoExact):
    """Notes how many images it is given at a time."""

    def start(self, generator):
        self.given = []
        super().start(generator)

    def partial_fit(self, stages):
        self.given.append(len(stages[0]))
        super().partial_fit(stages)


def test_each_image_arrives_once_and_alone(data):
    train, test = data
    detector = noco_cf(Counting)
    online_curve(detector, train, test, generator=seeded())
    assert detector.given == [1] * 12


def test_what_cannot_learn_online_says_so(data):
    with pytest.raises(ModelError, match="prototypes are centres") as refused:
        online_curve(noco_cf(prototypes=2), *data, generator=seeded())
    assert refused.value.change == {"prototypes": "1"}
    assert not NocoExactOptions(prototypes=2).learns_online
    assert not isinstance(Noco(FeatureShape((6,)), NocoOptions()), LearnsOnline)
    assert not NocoOptions().learns_online


def test_curve_is_written_as_csv_and_picture(tmp_path):
    values = [(n, 0.5 + n / 20, 0.6, math.nan, math.nan) for n in (1, 2, 5)]
    rows = [dict(zip(COLUMNS, value, strict=True)) for value in values]
    path = tmp_path / "online/tile.csv"
    save_online_curve(path, rows, title="tile, seed 0")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["num_images"] for line in lines] == ["1", "2", "5"]
    assert [float(line["image_auroc"]) for line in lines] == [0.55, 0.6, 0.75]
    assert lines[0]["aupro"] == "nan"
    assert b"\r" not in path.read_bytes()
    picture = np.array(Image.open(path.with_suffix(".png")).convert("L"))
    assert picture.min() < 100
    assert sorted(p.name for p in path.parent.iterdir()) == ["tile.csv", "tile.png"]
