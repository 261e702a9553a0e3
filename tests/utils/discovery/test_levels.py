"""Masks by what normal images reach."""

import numpy as np
import pytest

from utils.discovery.levels import Levels, above_levels, levels_of

LEVELS = Levels(threshold=1.0, floor=2.0, lowest_peak=1.5)


def test_levels_are_quantiles_of_normal_images():
    maps = np.random.default_rng(0).uniform(0, 1, (20, 32, 32)).astype(np.float32)
    maps[3] *= 0.5
    levels = levels_of(maps, np.arange(20.0), 0.1)
    assert levels.threshold == pytest.approx(np.quantile(np.arange(20.0), 0.9))
    assert levels.floor == pytest.approx(np.quantile(maps[:, ::2, ::2], 0.995))
    assert levels.lowest_peak == maps[3].max()


def test_pixels_count_by_how_far_they_exceed_the_middle_of_floor_and_peak():
    scores = np.array([[0.0, 2.0, 3.0], [3.5, 4.0, 1.0]])
    assert above_levels(scores, 1.5, LEVELS).tolist() == [[0, 0, 0], [0.5, 1, 0]]


def test_images_that_score_like_normal_ones_have_no_mask():
    scores = np.array([[0.0, 9.0]])
    assert not above_levels(scores, 1.0, LEVELS).any()
    assert above_levels(scores, 1.01, LEVELS).any()


def test_a_map_below_the_floor_is_cut_by_itself():
    """Of methods whose score is not their map's peak."""
    weights = above_levels(np.array([[0.0, 0.1, 0.2], [0.1, 0.1, 1.0]]), 3.0, LEVELS)
    assert np.count_nonzero(weights) == 1
    assert weights[1, 2] == pytest.approx(1 - 0.55)
