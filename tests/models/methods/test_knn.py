import functools

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from models.errors import ModelError
from models.methods.knn import KnnOptions
from tests.models.banks import as_positions, draw_bank, fitted

knn = functools.partial(fitted, "knn")


@pytest.mark.parametrize("side", [1, 4])
@pytest.mark.parametrize("neighbours", [1, 2, 7])
def test_equals_scikit_learn(side, neighbours):
    bank, queries = draw_bank(count=10, side=side), draw_bank(count=3, side=side, seed=2).features
    found = NearestNeighbors(n_neighbors=neighbours).fit(as_positions(bank.features).double())
    distances, _ = found.kneighbors(as_positions(queries).double())
    for distance, power in (("squared", 2), ("euclidean", 1)):
        maps = knn(bank, num_neighbors=neighbours, distance=distance)(queries)
        assert maps.shape == (3, side, side)
        np.testing.assert_allclose(maps.flatten(), (distances**power).mean(axis=1), rtol=1e-5)


def test_no_features_are_drawn_where_all_fit():
    detector = knn(draw_bank(count=4, side=5), max_positions=100)
    assert len(detector.memory) == 100
    assert detector.remarks == []


def test_features_are_drawn_at_random_where_they_do_not_fit():
    bank = draw_bank(count=4, side=5)
    detector = knn(bank, max_positions=30)
    everything = as_positions(bank.features)
    rows = (detector.memory[:, None] == everything[None]).all(dim=2).nonzero()[:, 1]
    assert len(rows) == 30
    assert (rows.diff() > 0).all()
    assert rows[0] < 50 < rows[-1]
    (remark,) = detector.remarks
    assert "30 of 100" in remark
    assert "--method.max-positions" in remark
    assert len(knn(bank, max_positions=None).memory) == 100


def test_a_memory_smaller_than_the_neighbours_is_refused():
    message = "--method.max-positions 4 must be at least --method.num-neighbors 5"
    with pytest.raises(ValueError, match=message):
        KnnOptions(num_neighbors=5, max_positions=4)


def test_a_head_of_other_channels_is_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch"):
        knn(draw_bank(channels=7)).load_state_dict(knn(draw_bank()).state_dict())


def test_too_few_normal_features_are_an_error():
    message = "2 nearest neighbours need as many normal features: there are 1"
    with pytest.raises(ModelError, match=message) as caught:
        knn(draw_bank(count=1, side=1))
    assert caught.value.change == {"num_neighbors": "lower"}
