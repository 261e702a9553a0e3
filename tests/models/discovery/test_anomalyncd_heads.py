"""Classifiers by cosine, and the projection."""

import pytest
import torch

from models.discovery.anomalyncd.heads import Heads


def drawn(width=8, kinds=5, count=3, seed=0):
    heads = Heads(width, kinds, count)
    heads.initialise(torch.Generator().manual_seed(seed))
    return heads


def test_cosines_by_hand():
    heads = Heads(2, 2, 1)
    with torch.no_grad():
        heads.directions.copy_(torch.tensor([[[3.0, 0.0], [0.0, -0.1]]]))
        found = heads.cosines(torch.tensor([[3.0, 4.0], [-0.5, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[[0.6, -0.8], [-1.0, 0.0]]]))


def test_cosines_are_bounded_and_know_no_lengths():
    heads = drawn()
    tokens = 50 * torch.randn(40, 8)
    with torch.no_grad():
        before = heads.cosines(tokens)
        heads.directions.mul_(7)
        torch.testing.assert_close(heads.cosines(0.1 * tokens), before)
    assert before.shape == (3, 40, 5)
    assert before.abs().max() <= 1 + 1e-6
    assert before.abs().max() > 0.5


def test_the_length_of_a_direction_is_not_trained():
    """As of a layer whose weight is normalised, with a length of 1 that stays."""
    heads = drawn()
    heads.cosines(torch.randn(4, 8)).square().sum().backward()
    along = (heads.directions.grad * heads.directions).sum(dim=-1)
    assert heads.directions.grad.abs().max() > 1e-3
    torch.testing.assert_close(along, torch.zeros(3, 5), atol=1e-6, rtol=0)


def test_what_is_returned_of_a_vit_base():
    heads = drawn(768, 9, 4)
    assert sum(p.numel() for p in heads.parameters()) == 6_323_456
    projections, cosines = heads(torch.randn(6, 768))
    assert projections.shape == (6, 256)
    assert cosines.shape == (4, 6, 9)


def test_weights_are_drawn_from_the_generator():
    one, other = drawn(seed=5), drawn(seed=5)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(drawn(seed=6).directions, one.directions)
    weight = one.projection[2].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert all(not layer.bias.any() for layer in one.projection if hasattr(layer, "bias"))
    bound = 8**-0.5
    assert one.directions.abs().max() <= bound
    assert drawn(8, 200, 3).directions.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
