"""The blockwise search against all distances in float64, on data that is hard for products."""

import importlib.util
import re

import pytest
import torch

from models.errors import ModelError
from models.features import nearest as module
from models.features.nearest import check_search, direct_distances, nearest
from tests.models.banks import seeded
from tests.models.pretended import pretended_device

NO_FAISS = importlib.util.find_spec("faiss") is None


def reference(queries, memory, count):
    """Distances (P, count), float64, from all differences."""
    offsets = queries.double()[:, None] - memory.double()[None]  # (P, M, C)
    return offsets.square().sum(dim=2).sqrt().sort(dim=1).values[:, :count]


def check(queries, memory, count, *, rtol=1e-5, **options):
    distances, rows = nearest(queries, memory, count, **options)
    expected = reference(queries, memory, count)
    assert distances.dtype == queries.dtype
    assert rows.dtype == torch.int64
    torch.testing.assert_close(distances.double(), expected, rtol=rtol, atol=0.0)
    offsets = queries.double()[:, None] - memory.double()[rows]
    torch.testing.assert_close(offsets.norm(dim=2), expected, rtol=rtol, atol=0.0)
    assert all(len(set(row)) == count for row in rows.tolist())


def blocked(monkeypatch, product, gather=2**23):
    monkeypatch.setattr(module, "PRODUCT", product)
    monkeypatch.setattr(module, "GATHER", gather)


@pytest.mark.parametrize("count", [1, 3, 20, 157])
@pytest.mark.parametrize("product", [1, 700, 2**22])
def test_equals_all_distances(monkeypatch, count, product):
    """Also with blocks of a single feature, with ragged ones, and with all features asked for."""
    blocked(monkeypatch, product, gather=2000)
    queries = torch.randn(41, 12, generator=seeded(1))
    check(queries, torch.randn(157, 12, generator=seeded(2)) + 0.3, count)


def test_a_gpu_finds_the_same_in_its_larger_blocks(monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 4)
    blocked(monkeypatch, 700, gather=2000)
    queries, memory = (torch.randn(n, 12, generator=seeded(n)) for n in (157, 410))
    expected = nearest(queries, memory, 3)
    sizes = []
    search = module._search
    monkeypatch.setattr(
        module, "_search", lambda *given: sizes.append(len(given[0])) or search(*given)
    )
    with pretended_device(monkeypatch):
        found = [part.cpu() for part in nearest(queries.to("cuda"), memory.to("cuda"), 3)]
    assert max(sizes) > 4
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.fixture
def directly(monkeypatch):
    """How many queries each direct search got, in a list that the test reads."""
    counts = []
    search_directly = module._search_directly

    def counted(queries, memory, count):
        counts.append(len(queries))
        return search_directly(queries, memory, count)

    monkeypatch.setattr(module, "_search_directly", counted)
    return counts


@pytest.mark.parametrize("count", [3, 239])
def test_distances_far_below_the_rounding_of_the_norms(directly, count):
    """Norms of 4e3 and distances of 1e-2: in float32 the expanded square knows nothing of them."""
    centres = torch.randn(4, 16, generator=seeded(3)) * 1000
    memory = centres.repeat_interleave(60, dim=0)
    memory = memory + 1e-2 * torch.randn(memory.shape, generator=seeded(4))
    queries = memory[::7] + 1e-2 * torch.randn(memory[::7].shape, generator=seeded(5))
    check(queries, memory, count)
    # Not one could be left to the product; where it proposes all, all were compared already.
    assert sum(directly) == (len(queries) if count == 3 else 0)


def test_ordinary_features_are_left_to_the_product(directly):
    check(torch.randn(50, 16, generator=seeded(6)), torch.randn(300, 16, generator=seeded(7)), 3)
    assert not directly


def test_copies_are_at_distance_zero_and_cost_no_direct_search(directly):
    memory = (torch.randn(30, 8, generator=seeded(1)) + 100).repeat(20, 1)
    distances, _ = nearest(memory[:30], memory, 5)
    assert torch.equal(distances, torch.zeros(30, 5))
    assert not directly


def test_an_outlier_in_the_memory_costs_no_accuracy():
    memory = torch.randn(200, 8, generator=seeded(1))
    memory[17] = 1e6
    check(torch.randn(20, 8, generator=seeded(2)), memory, 4)


def test_float64_stays_float64():
    queries = torch.randn(10, 5, generator=seeded(1), dtype=torch.float64)
    memory = torch.randn(40, 5, generator=seeded(2), dtype=torch.float64)
    check(queries, memory, 2, rtol=1e-13)


def test_a_pair_has_one_distance_in_every_batch():
    """What the coreset's exactness stands on."""
    points = torch.randn(300, 37, generator=seeded(1)) * 50
    together = direct_distances(points, points[:11])
    alone = torch.stack([direct_distances(points, points[i : i + 1])[:, 0] for i in range(11)], 1)
    assert torch.equal(together, alone)
    p, c = torch.randint(300, (500,), generator=seeded(2)), torch.arange(500) % 11
    pairs = direct_distances(points[p].unsqueeze(1), points[c].unsqueeze(1)).flatten()
    assert torch.equal(pairs, together[p, c])


def test_autocast_does_not_reach_the_search():
    queries = torch.randn(20, 64, generator=seeded(1))
    memory = torch.randn(500, 64, generator=seeded(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (queries @ memory.T).dtype == torch.bfloat16
        check(queries, memory, 3)


def test_more_neighbours_than_features_is_an_error():
    with pytest.raises(ModelError, match=re.escape("5 nearest neighbours were asked for")):
        nearest(torch.zeros(2, 3), torch.zeros(4, 3), 5)


def test_missing_faiss_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install faiss-cpu") as caught:
        check_search("faiss")
    assert "exact" in caught.value.change["search"]
    check_search("exact")


@pytest.mark.skipif(NO_FAISS, reason="faiss is not installed")
def test_faiss_finds_the_same():
    check_search("faiss")
    queries = torch.randn(41, 12, generator=seeded(1))
    check(queries, torch.randn(157, 12, generator=seeded(2)), 3, search="faiss")
