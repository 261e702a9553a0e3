"""Boxes around regions, against cases of the released code that were worked out."""

import numpy as np
import pytest

from utils.discovery.regions import Box, boxes_of, crop, merge


def with_squares(shape, *squares):
    mask = np.zeros(shape, dtype=bool)
    for top, left, height, width in squares:
        mask[top : top + height, left : left + width] = True
    return mask


def test_small_regions_get_a_fifth_of_the_longer_side():
    places = [(100, 100), (100, 800), (800, 100), (800, 800), (480, 480)]
    mask = with_squares((1000, 1000), *((y, x, 10, 10) for y, x in places))
    found = boxes_of(mask, 2 + 1)
    assert len(found) == 3
    assert all((b.right - b.left, b.bottom - b.top) == (200, 200) for b in found)
    assert len(boxes_of(mask, 9)) == 5


def test_an_image_without_a_region_is_looked_at_whole():
    assert boxes_of(np.zeros((30, 50), dtype=bool), 1) == [Box(0, 0, 50, 30)]


def test_boxes_are_moved_inside_the_image():
    (found,) = boxes_of(with_squares((400, 400), (0, 380, 20, 20)), 1)
    assert found == Box(320, 0, 400, 80)


def test_a_chain_of_four_gives_two_that_overlap():
    chain = [Box(left, 0, left + 200, 200) for left in (0, 190, 380, 570)]
    found = sorted(merge(chain, 10), key=lambda box: box.left)
    assert found == [Box(0, -190, 580, 390), Box(190, -190, 770, 390)]


def test_gaps():
    box = Box(0, 0, 10, 10)
    assert box.gap(Box(5, 5, 20, 20)) == -1
    assert box.gap(Box(10, 0, 20, 10)) == 0
    assert box.gap(Box(13, 14, 20, 20)) == pytest.approx(5)
    assert merge([box, Box(30, 0, 40, 10)], 5) == [box, Box(30, 0, 40, 10)]


def test_beyond_a_narrow_image_all_is_black():
    image = np.full((200, 800, 3), 9, dtype=np.uint8)
    mask = with_squares((200, 800), (80, 100, 20, 500))
    (box,) = boxes_of(mask, 1)
    found = crop(image, box)
    assert found.shape == (550, 550, 3)
    assert (found == 9).all(axis=2).sum() == 200 * 550
    assert crop(mask, box).sum() == mask.sum()


def test_half_pixels_of_a_merged_box_round():
    image = np.ones((20, 20), dtype=np.uint8)
    assert crop(image, Box(-1, 0.5, 10, 11.5)).shape[1] == 11
