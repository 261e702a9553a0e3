"""The lazy selection against the plain loop, index by index, and the two reads of a bank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.features import coreset
from models.features.coreset import (
    _LazyGreedy,
    draw_projection,
    greedy_k_centre,
    read_positions,
    read_projected,
)
from models.features.nearest import direct_distances
from tests.models.banks import Bank, as_positions, draw_bank, seeded


def plain(points, count, starts):
    """Farthest point first, a pass over all points for each choice."""
    distances = direct_distances(points, starts).mean(dim=1)
    chosen = []
    for _ in range(count):
        farthest = int(distances.argmax())
        chosen.append(farthest)
        to_new = direct_distances(points, points[farthest : farthest + 1])[:, 0]
        distances = torch.minimum(distances, to_new)
    return chosen


def first(points, num_starts=10):
    return points[torch.randperm(len(points), generator=seeded())[:num_starts]]


def small_blocks(monkeypatch, *, pool=16):
    """Many rounds, products and blocks where there are few points."""
    monkeypatch.setattr(coreset, "POOL_RANGE", (pool, pool))
    monkeypatch.setattr(coreset, "ROWS", 7)
    monkeypatch.setattr(coreset, "CENTRES", 5)
    monkeypatch.setattr(coreset, "PAIRS", 3)


def clustered(count=600, channels=8, seed=0):
    centres = torch.randn(12, channels, generator=seeded(seed)) * 3
    owner = torch.randint(12, (count,), generator=seeded(seed + 1))
    return centres[owner] + torch.randn(count, channels, generator=seeded(seed + 2))


@pytest.mark.parametrize("gap", [0.0, 3e3, 3e4])
@pytest.mark.parametrize("count", [1, 2, 200])
def test_chooses_what_the_plain_loop_chooses(monkeypatch, count, gap):
    """Also where norms drown the distances and no product can tell near points apart."""
    small_blocks(monkeypatch)
    points = clustered()
    points[::2] += gap
    chosen = greedy_k_centre(points, count, generator=seeded())
    assert chosen.tolist() == plain(points, count, first(points))


def test_chooses_what_the_plain_loop_chooses_with_the_real_block_sizes():
    points = clustered(count=4000, channels=32)
    chosen = greedy_k_centre(points, 800, generator=seeded())
    assert chosen.tolist() == plain(points, 800, first(points))


@pytest.mark.parametrize("burst", [2, 7, 64])
def test_steps_in_bursts_choose_the_same(monkeypatch, burst):
    """On a device several steps are made before the host asks how many counted."""
    small_blocks(monkeypatch)
    points = clustered(count=400)
    lazy = _LazyGreedy(points, 150, first(points))
    lazy.burst = burst
    assert lazy.choose().tolist() == plain(points, 150, first(points))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.integers(1, 20),
)
def test_ties_and_copies_are_resolved_as_in_the_plain_loop(count, channels, side, seed, pool):
    """Points on a coarse lattice: most distances are equal and most points are copies."""
    points = torch.randint(0, side, (60, channels), generator=seeded(seed)).float()
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, pool=pool)
        chosen = greedy_k_centre(points, count, generator=seeded()).tolist()
    distinct = len(points.unique(dim=0))
    assert chosen == plain(points, min(count, distinct), first(points))
    assert len(points[chosen].unique(dim=0)) == len(chosen) == min(count, distinct)


def test_one_point_remains_of_equal_points():
    assert greedy_k_centre(torch.ones(50, 4), 10, generator=seeded()).tolist() == [0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_points_that_are_not_finite_are_refused(bad):
    points = clustered()
    points[500, 3] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        greedy_k_centre(points, 10, generator=seeded())


def test_projection_keeps_distances():
    points = torch.randn(40, 600, generator=seeded(1))
    projection = draw_projection(600, 128, seeded())
    ratio = torch.pdist(points @ projection) / torch.pdist(points)
    assert ratio.mean() == pytest.approx(1.0, abs=0.05)
    assert ratio.std() < 0.1
    assert torch.equal(projection, draw_projection(600, 128, seeded()))


@pytest.mark.parametrize(("channels", "projected"), [(127, False), (128, False), (129, True)])
def test_projection_never_adds_dimensions(channels, projected):
    assert (draw_projection(channels, 128, seeded()) is not None) == projected


def test_bank_is_read_position_by_position():
    # Two full batches and one of a single image.
    bank = Bank(torch.randn(9, 6, 2, 3, generator=seeded()))
    positions = as_positions(bank.features)
    assert torch.equal(read_projected(bank, None), positions)
    projection = torch.randn(6, 2, generator=seeded(1))
    torch.testing.assert_close(read_projected(bank, projection), positions @ projection)


@pytest.mark.parametrize("rows", [[80, 0, 35, 36, 7], [5], list(range(81)), [3, 3, 50]])
def test_positions_come_in_the_order_asked_for(rows):
    bank = draw_bank(count=9, channels=6, side=3)
    read = read_positions(bank, torch.tensor(rows))
    assert torch.equal(read, as_positions(bank.features)[rows])
