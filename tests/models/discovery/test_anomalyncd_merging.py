"""Pieces of one image are averaged, the larger ones counting more."""

import math

import pytest
import torch

from models.discovery.anomalyncd.merging import merged_probabilities
from models.errors import ModelError


def test_two_pieces_of_the_specification():
    """Areas 40000 and 10000 at temperature 100: the softmax of 2 and 1."""
    found = merged_probabilities(torch.eye(2), [40000, 10000], [0, 0], 100)
    torch.testing.assert_close(found, torch.tensor([[0.7310586, 0.2689414]]))


def test_images_are_merged_each_by_itself_in_any_order():
    rows = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5], [0.3, 0.7]])
    found = merged_probabilities(rows, [400, 0, 9, 100], [1, 0, 2, 1], 10)
    weight = math.exp(2) / (math.exp(2) + math.exp(1))
    mixed = weight * rows[0] + (1 - weight) * rows[3]
    torch.testing.assert_close(found, torch.stack([rows[1], mixed, rows[2]]))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3))


def test_large_areas_do_not_overflow():
    found = merged_probabilities(torch.eye(2), [10**10, 10**8], [0, 0], 1)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match=r"images \[1\] have no piece"):
        merged_probabilities(torch.eye(2), [1, 1], [0, 2], 50)
    with pytest.raises(ModelError, match="below 0"):
        merged_probabilities(torch.eye(2), [1, 1], [0, -1], 50)
    with pytest.raises(ModelError, match="2 rows of probabilities, 1 areas"):
        merged_probabilities(torch.eye(2), [1], [0, 0], 50)
    assert merged_probabilities(torch.empty(0, 3), [], [], 50).shape == (0, 3)
