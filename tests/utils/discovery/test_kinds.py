"""Kinds of well separated groups, and what becomes of few, many and equal vectors."""

import numpy as np
import pytest

from utils.discovery import kinds as module
from utils.discovery.agreement import agreement
from utils.discovery.kinds import cluster, nearest

SIZES = (30, 20, 10)


@pytest.fixture
def groups():
    """Vectors of three groups, shuffled, and their groups."""
    rng = np.random.default_rng(0)
    centres = np.eye(8)[:3]
    names = rng.permutation(np.repeat(range(3), SIZES))
    return (centres[names] + 0.1 * rng.standard_normal((60, 8))).astype(np.float32), names


@pytest.mark.parametrize("how", ["ward", "kmeans"])
@pytest.mark.parametrize("number", [3, None])
def test_groups_are_found_the_largest_first(groups, how, number):
    vectors, names = groups
    found = cluster(vectors, number, how, random_seed=0)
    assert agreement(found.kinds.tolist(), [str(n) for n in names]).f1 == 1
    assert np.bincount(found.kinds).tolist() == list(SIZES)
    assert found.was_estimated == (number is None)
    for kind in range(3):
        assert np.allclose(found.centres[kind], vectors[found.kinds == kind].mean(0), atol=1e-6)


def test_kmeans_goes_by_angles():
    rng = np.random.default_rng(0)
    directions = np.repeat([[1.0, 0.0], [0.8, 0.6]], 20, axis=0)
    vectors = directions * rng.uniform(0.2, 20, (40, 1))
    found = cluster(vectors, 2, "kmeans", random_seed=0)
    assert len(set(found.kinds[:20])) == len(set(found.kinds[20:])) == 1
    assert found.kinds[0] != found.kinds[20]


def test_many_vectors_are_joined_by_those_drawn(groups, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 40)
    vectors, names = groups
    found = cluster(vectors, 3, "ward", random_seed=0)
    assert len(found.kinds) == 60
    assert agreement(found.kinds.tolist(), [str(n) for n in names]).f1 == 1


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_vectors_are_one_kind_unless_more_are_asked_for(count):
    vectors = np.random.default_rng(0).standard_normal((count, 4))
    assert len(cluster(vectors, None, "ward", random_seed=0).centres) == 1
    assert len(cluster(vectors, 9, "ward", random_seed=0).centres) == count


def test_equal_vectors_are_one_kind():
    assert len(cluster(np.ones((40, 4)), None, "ward", random_seed=0).centres) == 1


def test_nearest_centres_and_how_sure_that_is():
    centres = np.array([[0.0, 0.0], [4.0, 0.0]])
    kinds, sure = nearest(np.array([[0.0, 0.0], [2.0, 5.0], [3.0, 0.0]]), centres)
    assert kinds[[0, 2]].tolist() == [0, 1]
    assert sure.tolist() == pytest.approx([1, 0, 1 - 1 / 3])
    assert nearest(np.ones((2, 2)), centres[:1])[1].tolist() == [1, 1]
