import itertools
import math

import cv2
import numpy as np
import pytest

from datasets.drawing.perlin import SMALLEST_CELL, perlin_mask, perlin_noise


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("size", "cells"), [(24, (2, 3)), (25, (4, 1)), (31, (5, 5))])
def test_noise_is_what_the_four_corners_say_pixel_by_pixel(size, cells):
    """As defined, with sides that cells need not divide."""
    found = perlin_noise(size, cells, rng())
    angles = rng().uniform(0, 2 * math.pi, size=(cells[0] + 1, cells[1] + 1))
    for y, x in itertools.product(range(0, size, 3), range(size)):
        place = np.array([y * cells[0] / size, x * cells[1] / size])
        corner = np.floor(place).astype(int)
        total = 0.0
        for step in itertools.product((0, 1), (0, 1)):
            at = corner + step
            away = place - at
            slope = np.array([np.sin(angles[tuple(at)]), np.cos(angles[tuple(at)])])
            near = 1 - np.abs(away)  # of each axis; fade(1 - t) = 1 - fade(t)
            weight = np.prod(6 * near**5 - 15 * near**4 + 10 * near**3)
            total += weight * float(slope @ away)
        assert found[y, x] == pytest.approx(math.sqrt(2) * total, abs=1e-5)


def test_noise_is_nothing_at_the_corners_and_bounded():
    noise = np.stack([perlin_noise(64, (8, 4), rng(seed)) for seed in range(50)])
    assert np.abs(noise[:, ::8, ::16]).max() < 1e-6
    assert np.abs(noise).max() <= 1
    assert noise.std(axis=0)[4, 8] > 0.2
    assert abs(noise.mean()) < 0.01


def test_masks_cover_a_part_of_the_image_in_pieces_no_finer_than_the_cells():
    masks = [perlin_mask(128, rng(seed)) for seed in range(200)]
    shares = np.array([mask.mean() for mask in masks])
    assert all(mask.dtype == bool and mask.shape == (128, 128) for mask in masks)
    assert shares.max() < 0.5
    assert 0.02 < shares.mean() < 0.12
    # An empty one is rare, and can be: a single cell may have no slope that is steep enough.
    assert (shares == 0).mean() < 0.25
    for mask in masks:
        count, _ = cv2.connectedComponents(mask.astype(np.uint8))
        # Each cell has at most two peaks.
        assert count - 1 <= 2 * (128 // SMALLEST_CELL) ** 2


@pytest.mark.parametrize("cells", [1, 4, 16])
def test_more_cells_make_more_and_smaller_pieces(cells):
    pieces, areas = [], []
    for seed in range(30):
        mask = perlin_noise(128, (cells, cells), rng(seed)) > 0.5
        count, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        pieces.append(count - 1)
        areas += stats[1:, cv2.CC_STAT_AREA].tolist()
    assert np.mean(pieces) <= cells**2
    assert np.mean(pieces) >= 0.1 * cells**2
    assert np.mean(areas) <= (128 / cells) ** 2
    assert np.mean(areas) >= 0.02 * (128 / cells) ** 2


@pytest.mark.parametrize("size", [1, 7, 16, 33, 300])
def test_masks_of_any_size_follow_from_the_seed(size):
    first, again, other = (perlin_mask(size, rng(seed)) for seed in (4, 4, 5))
    assert first.shape == (size, size)
    assert np.array_equal(first, again)
    assert size < 33 or not np.array_equal(first, other)
