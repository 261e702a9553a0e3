import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.knn import Knn, KnnOptions
from tests.models.banks import Bank, draw_bank, seeded


def knn(channels, **options):
    return Knn(FeatureShape((channels,)), KnnOptions(**options))


def fitted(bank, seed=0, **options):
    detector = knn(bank.channels, **options)
    detector.fit(bank, generator=seeded(seed))
    return detector


def as_positions(features):
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def test_hand_worked():
    """Memory 0, 1, 5 and 9 on a line; 3 is 2 from 1 and 5, and 9 is 0 from 9 and 4 from 5."""
    bank = Bank(torch.tensor([0.0, 1, 5, 9]).reshape(4, 1, 1, 1))
    queries = torch.tensor([3.0, 9]).reshape(2, 1, 1, 1)
    assert fitted(bank)(queries).flatten().tolist() == [4.0, 8.0]
    assert fitted(bank, distance="euclidean")(queries).flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("side", [1, 4])
@pytest.mark.parametrize("neighbours", [1, 2, 7])
def test_equals_scikit_learn(side, neighbours):
    bank, queries = draw_bank(count=10, side=side), draw_bank(count=3, side=side, seed=2).features
    found = NearestNeighbors(n_neighbors=neighbours).fit(as_positions(bank.features).double())
    distances, _ = found.kneighbors(as_positions(queries).double())
    for distance, power in (("squared", 2), ("euclidean", 1)):
        maps = fitted(bank, num_neighbors=neighbours, distance=distance)(queries)
        assert maps.shape == (3, side, side)
        np.testing.assert_allclose(maps.flatten(), (distances**power).mean(axis=1), rtol=1e-5)


def test_no_features_are_drawn_where_all_fit():
    detector = fitted(draw_bank(count=4, side=5), max_positions=100)
    assert len(detector.memory) == 100
    assert detector.remarks == []


def test_features_are_drawn_at_random_where_they_do_not_fit():
    bank = draw_bank(count=4, side=5)
    detector = fitted(bank, max_positions=30)
    everything = as_positions(bank.features)
    rows = (detector.memory[:, None] == everything[None]).all(dim=2).nonzero()[:, 1]
    assert len(rows) == 30
    assert (rows.diff() > 0).all()
    assert rows[0] < 50 < rows[-1]
    assert not torch.equal(detector.memory, fitted(bank, seed=1, max_positions=30).memory)
    assert torch.equal(detector.memory, fitted(bank, max_positions=30).memory)
    (remark,) = detector.remarks
    assert "30 of 100" in remark
    assert "--method.max-positions" in remark
    assert len(fitted(bank, max_positions=None).memory) == 100


def test_stored_head_scores_the_same(tmp_path):
    bank, queries = draw_bank(), draw_bank(seed=2).features
    detector = fitted(bank)
    save_file(detector.state_dict(), tmp_path / "head.safetensors")
    other = knn(bank.channels)
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(other(queries), detector(queries))
    with pytest.raises(RuntimeError, match="size mismatch"):
        knn(bank.channels + 1).load_state_dict(detector.state_dict())


def test_finds_what_lies_apart():
    bank = draw_bank(count=40, channels=20, side=1)
    normal = draw_bank(count=30, channels=20, side=1, seed=2).features
    scores = fitted(bank)(torch.cat([normal, normal + 2])).flatten()
    assert roc_auc_score([0] * 30 + [1] * 30, scores) > 0.95


def test_monitor_is_called_once():
    calls = []
    detector = knn(6)
    detector.fit(draw_bank(), generator=seeded(), monitor=lambda *call: calls.append(call))
    assert calls == [(1, {"memory": 200})]
    assert detector.stopped_at(1) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 0}, "--method.num-neighbors 0 must be above 0"),
        (
            {"num_neighbors": 5, "max_positions": 4},
            "--method.max-positions 4 must be at least --method.num-neighbors 5",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        KnnOptions(**options)


def test_too_few_normal_features_are_an_error():
    message = "2 nearest neighbours need as many normal features: there are 1"
    with pytest.raises(ModelError, match=message) as caught:
        fitted(draw_bank(count=1, side=1))
    assert caught.value.change == {"num_neighbors": "lower"}


def test_unfitted_detector_is_an_error():
    with pytest.raises(ModelError, match="memory holds 0"):
        knn(6)(draw_bank().features)
