"""What is pasted comes from the image, at the sizes of the paper, in colours near its own."""

import colorsys
import functools

import numpy as np
import pytest

from datasets.drawing.pasting import (
    COLOUR_JITTER,
    SCAR_LENGTH,
    SCAR_WIDTH,
    jitter_colour,
    jitter_shade,
    paste_patch,
    paste_scar,
)

SIZE = 48


def noise(size=SIZE, seed=0):
    """An image whose pixels all differ from their neighbours, so that a paste shows."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def as_it_is(patch, rng):
    del rng
    return patch


def box_of(mask):
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


@pytest.mark.parametrize("seed", range(8))
def test_a_patch_is_a_rectangle_of_the_image(seed):
    image = noise()
    pasted, mask = paste_patch(image, np.random.default_rng(seed), jitter=as_it_is)
    top, bottom, left, right = box_of(mask)
    assert mask[top:bottom, left:right].all()
    patch = pasted[top:bottom, left:right]
    places = np.lib.stride_tricks.sliding_window_view(image, patch.shape)[:, :, 0]
    assert (places == patch).all(axis=(2, 3, 4)).sum() == 1
    assert np.array_equal(pasted[~mask], image[~mask])


def test_a_scar_is_turned_and_of_the_image():
    """Of an image that is bright in one half, a scar has what is bright or dark, or an edge."""
    image = np.full((256, 256, 3), 60, np.uint8)
    image[:, 128:] = 200
    bright, boxes = [], []
    for seed in range(40):
        pasted, mask = paste_scar(image, np.random.default_rng(seed), jitter=as_it_is)
        bright.append((pasted[mask] == 200).all())
        top, bottom, left, right = box_of(mask)
        boxes.append(mask.sum() / ((bottom - top) * (right - left)))
        assert ((pasted[mask] >= 60) & (pasted[mask] <= 200)).all()
    assert 0.3 < np.mean(bright) < 0.7
    assert min(boxes) < 0.6  # a turned rectangle leaves corners of its box


def test_a_scar_on_a_crop_keeps_its_size_in_pixels_of_the_whole():
    def largest(**where):
        rngs = map(np.random.default_rng, range(80))
        boxes = [box_of(paste_scar(noise(64), rng, **where)[1]) for rng in rngs]
        return max(bottom - top for top, bottom, _, _ in boxes)

    of_crop, alone = largest(whole=256), largest()
    assert SCAR_LENGTH[1] * 0.8 < of_crop <= np.hypot(SCAR_LENGTH[1], SCAR_WIDTH[1]) + 1
    assert alone <= of_crop / 4 + 2


def test_where_a_scar_has_no_room_a_patch_is_pasted():
    rngs = map(np.random.default_rng, range(20))
    masks = [paste_scar(noise(8), rng, whole=256)[1] for rng in rngs]
    for mask in masks:
        top, bottom, left, right = box_of(mask)
        assert mask[top:bottom, left:right].all()


@pytest.mark.parametrize("paste", [paste_patch, paste_scar])
def test_colours_change_by_the_jitter_that_is_asked_for(paste):
    image = np.full((SIZE, SIZE, 3), 128, np.uint8)
    image[:, :, 0] = 160
    for jitter in (jitter_shade, jitter_colour):
        values = []
        for seed in range(40):
            pasted, mask = paste(image, np.random.default_rng(seed), jitter=jitter)
            values.append(pasted[mask].mean(axis=0))
        change = np.abs(np.array(values) - (160, 128, 128)).max(axis=0)
        assert change.min() > 6
        assert change.max() < 2.5 * COLOUR_JITTER * 160


def test_without_strength_nothing_changes():
    image = noise()
    before = image.copy()
    assert np.array_equal(jitter_colour(image, np.random.default_rng(1), 0.0), before)
    assert not np.array_equal(jitter_colour(image, np.random.default_rng(1)), before)
    assert np.array_equal(image, before)


def test_grey_stays_grey_and_brightness_is_a_factor():
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = []
    for seed in range(200):
        jittered = jitter_colour(grey, np.random.default_rng(seed))
        assert (jittered == jittered[0, 0, 0]).all()
        values.append(int(jittered[0, 0, 0]))
    assert 89 <= min(values) < 93
    assert 107 < max(values) <= 111


def test_hue_turns_both_ways_by_at_most_the_strength():
    red = np.zeros((2, 2, 3), np.uint8)
    red[:, :, 0] = 200
    turns = []
    for seed in range(200):
        pixel = jitter_colour(red, np.random.default_rng(seed))[0, 0] / 255
        hue = colorsys.rgb_to_hsv(*pixel)[0]
        turns.append((hue + 0.5) % 1 - 0.5)
    assert -COLOUR_JITTER - 0.02 < min(turns) < -0.07
    assert 0.07 < max(turns) < COLOUR_JITTER + 0.02


def test_saturation_moves_colours_from_their_own_grey():
    """Contrast does not: it is about one grey of the image."""
    image = np.array([[[200, 100, 100], [100, 200, 100]]], np.uint8)
    spreads = []
    for seed in range(100):
        jittered = jitter_colour(image, np.random.default_rng(seed)).astype(int)
        spreads.append(np.ptp(jittered, axis=2).mean())
    assert min(spreads) < 85
    assert max(spreads) > 115


@pytest.mark.parametrize("paste", [paste_patch, paste_scar])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_the_smallest_images_get_something(paste, size):
    for seed in range(20):
        image = noise(size, seed)
        draw = functools.partial(paste, jitter=jitter_colour)
        pasted, mask = draw(image, np.random.default_rng(seed))
        assert mask.any()
        assert (pasted.shape, pasted.dtype) == (image.shape, np.uint8)
