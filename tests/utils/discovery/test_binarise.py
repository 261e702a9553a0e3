"""MEBin against the test vectors and properties of its released code."""

import numpy as np
import pytest
import scipy.ndimage

from utils.discovery import binarise as module
from utils.discovery.binarise import binarise, range_of, steadiest


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ([0] * 4 + [1] * 5 + [2] * 5 + [1] * 5 + [3] * 3, (18, 1)),
        ([0] * 5 + [1] * 3 + [2] * 3, (None, 0)),
        ([0] * 3 + [2] * 4 + [1] * 6 + [2] * 5, (12, 1)),
        ([1] * 4 + [2] * 6 + [3] * 6, (9, 2)),
        ([], (None, 0)),
        ([0] * 64, (None, 0)),
    ],
)
def test_the_number_that_stays_the_same_longest(counts, wanted):
    assert steadiest(counts, 4) == wanted


@pytest.mark.parametrize(("low", "high", "raw"), [(0, 255, 183), (60, 240, 189)])
def test_the_cut_is_at_the_end_of_the_longest_run(monkeypatch, low, high, raw):
    counts = iter([0] * 4 + [1] * 5 + [2] * 5 + [1] * 5 + [3] * 3 + [0] * 42)
    monkeypatch.setattr(module, "_count", lambda _: next(counts))
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = binarise(values, low, high, erodes=False)
    assert (found.count, found.threshold) == (1, raw)
    assert np.array_equal(found.mask, values > raw)


def blob(values, top, left, peak, width=14):
    y, x = np.mgrid[: values.shape[0], : values.shape[1]]
    bump = peak * np.exp(-((y - top) ** 2 + (x - left) ** 2) / (2 * width**2))
    return np.maximum(values, bump)


def drawn(seed=0):
    """A map of noise alone, and one with two blobs besides."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0, 40, (2, 256, 256))
    noise[1] = blob(blob(noise[1], 80, 70, 220), 170, 190, 200)
    return noise.astype(np.uint8)


def test_two_blobs_are_found_and_noise_is_none():
    maps = drawn()
    low, high = range_of(maps)
    assert low < 41
    empty, two = (binarise(one, low, high) for one in maps)
    assert (empty.count, two.count) == (0, 2)
    assert not empty.mask.any()
    assert scipy.ndimage.label(two.mask, np.ones((3, 3)))[1] == 2
    assert two.mask[80, 70]
    assert two.mask[170, 190]


def test_integers_do_not_wrap():
    """In 8 bits 235 x (240 - 60) would."""
    maps = drawn()
    whole = [one.astype(np.int64) for one in maps]
    low, high = np.uint8(maps[0].max()), np.uint8(maps[1].max())
    for small, large in zip(maps, whole, strict=True):
        ours, wanted = binarise(small, int(low), int(high)), binarise(large, int(low), int(high))
        assert ours.threshold == wanted.threshold
        assert np.array_equal(ours.mask, wanted.mask)


def test_the_mask_is_what_scipy_erodes():
    maps = drawn(3)
    low, high = range_of(maps)
    found = binarise(maps[1], low, high)
    wanted = scipy.ndimage.binary_erosion(
        maps[1] > found.threshold, np.ones((6, 6)), border_value=1
    )
    assert np.array_equal(found.mask, wanted)


@pytest.mark.parametrize(("side", "left"), [(5, 0), (6, 1), (8, 9)])
def test_specks_vanish_and_a_square_of_six_is_one_pixel(side, left):
    values = np.zeros((64, 64), dtype=np.uint8)
    values[20 : 20 + side, 30 : 30 + side] = 255
    found = binarise(values, 0, 255)
    assert int(found.mask.sum()) == left
    assert binarise(values, 0, 255, erodes=False).mask.sum() == side * side


def test_the_same_masks_at_any_bit_depth():
    maps = drawn(5).astype(np.uint16) * 257
    low, high = range_of(maps)
    deep = binarise(maps[1], low, high)
    shallow = binarise(drawn(5)[1], *range_of(drawn(5)))
    assert deep.count == shallow.count
    assert (deep.mask == shallow.mask).mean() > 0.999


def test_one_map_or_equal_ones_have_no_region_unless_normal_images_give_a_bound():
    _, values = drawn()
    peak = int(values.max())
    assert range_of([values]) == (peak, peak)
    alone = binarise(values, peak, peak)
    assert (alone.count, alone.mask.any()) == (0, False)
    assert binarise(values, 45, peak).count == 2
