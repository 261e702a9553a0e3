import numpy as np
import pytest

from datasets.drawing import augmenters
from datasets.drawing.augmenters import AUGMENTERS, augment, turn


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def image():
    """Smooth, in colour, (40, 40, 3) uint8."""
    y, x = np.mgrid[:40, :40]
    channels = [6 * x, 120 + 60 * np.sin(y / 5), 20 + 2 * x + 3 * y]
    return np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("augmenter", AUGMENTERS, ids=lambda one: one.__name__)
def test_each_changes_an_image_by_the_seed_alone_and_leaves_its_own(augmenter, image):
    before = image.copy()
    results = [augmenter(image, rng(seed)) for seed in range(8)]
    assert np.array_equal(image, before)
    assert all(one.dtype == np.uint8 and one.shape == image.shape for one in results)
    assert any(not np.array_equal(one, image) for one in results)
    assert np.array_equal(results[3], augmenter(image, rng(3)))


def test_gamma_is_a_power_of_each_channel(image):
    powers = rng().uniform(0.5, 2, size=3)
    wanted = 255 * (image / 255) ** powers
    assert np.abs(augmenters.change_gamma(image, rng()) - wanted).max() <= 0.5 + 1e-6


def test_inverting_twice_is_nothing(image):
    once = augmenters.invert(image, rng())
    assert np.array_equal(once, 255 - image)
    assert np.array_equal(augmenters.invert(once, rng()), image)


def test_solarizing_inverts_from_a_threshold_on(image):
    found = [augmenters.solarize(image, rng(seed)) for seed in range(40)]
    changed = [one for one in found if not np.array_equal(one, image)]
    assert 8 < len(changed) < 32  # every second one
    for one in changed:
        inverted = one != image
        assert np.array_equal(one[inverted], 255 - image[inverted])
        assert 32 <= image[inverted].min() <= 129
        assert image[~inverted & (image != 127)].max() < image[inverted].min()


def test_posterizing_keeps_the_highest_bits(image):
    for seed in range(20):
        found = augmenters.posterize(image, rng(seed))
        bits = int(rng(seed).integers(1, 8, endpoint=True))
        assert np.array_equal(found, image >> (8 - bits) << (8 - bits))


def test_contrast_is_stretched_to_both_ends():
    image = (100 + np.arange(64, dtype=np.uint8).reshape(8, 8) // 2)[..., None].repeat(3, axis=2)
    for seed in range(10):
        found = augmenters.stretch_contrast(image, rng(seed))
        assert found.min() == 0
        assert found.max() == 255
        ordered = found.ravel()[np.argsort(image.ravel(), kind="stable")]
        assert (np.diff(ordered.astype(int)) >= 0).all()


def test_an_image_of_one_level_has_no_contrast_to_stretch():
    flat = np.full((9, 9, 3), 77, np.uint8)
    assert np.array_equal(augmenters.stretch_contrast(flat, rng()), flat)


def test_colours_turn_and_grey_has_none(image):
    grey = np.repeat(image[:, :, :1], 3, axis=2)
    for seed in range(10):
        turned = augmenters.change_brightness(grey, rng(seed))
        assert np.abs(np.ptp(turned.astype(int), axis=2)).max() == 0
    hues = [augmenters.change_colour(image, rng(seed)) for seed in range(10)]
    # The value of HSV, the largest channel, stays.
    assert max(np.abs(one.max(axis=2).astype(int) - image.max(axis=2)).max() for one in hues) <= 1


def test_sharpness_between_smooth_and_twice_as_sharp(image):
    point = np.zeros((5, 5, 3), np.uint8)
    point[2, 2] = 130
    for seed in range(10):
        factor = rng(seed).uniform(0, 2)
        found = augmenters.change_sharpness(point, rng(seed))
        smooth = np.array([130 * 5 / 13, 10])
        wanted = np.clip(np.array([130, 0]) * factor + smooth * (1 - factor), 0, 255)
        assert np.abs(found[[2, 1], [2, 1], 0] - wanted).max() <= 1


def test_a_turn_by_a_right_angle_moves_pixels_and_one_by_less_brings_black_in():
    image = np.arange(25 * 3, dtype=np.uint8).reshape(5, 5, 3) + 100
    assert np.array_equal(turn(image, 90.0), np.rot90(image))
    turned = turn(np.full((15, 15), 9, np.uint8), 45.0)
    assert (turned[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
    assert (turned[4:11, 4:11] == 9).all()
    corner = turn(image, 30.0, centre=(0, 0))
    assert np.array_equal(corner[0, 0], image[0, 0])


def test_three_different_ones_are_drawn_in_any_order(image, monkeypatch):
    called = []

    def numbered(number):
        def change(image, rng):
            called.append(number)
            return image

        return change

    monkeypatch.setattr(augmenters, "AUGMENTERS", tuple(map(numbered, range(10))))
    for seed in range(200):
        augment(image, rng(seed))
    triples = np.array(called).reshape(-1, 3)
    assert all(len(set(triple)) == 3 for triple in triples.tolist())
    assert np.bincount(triples.ravel(), minlength=10).min() > 30
    assert (np.diff(triples, axis=1) < 0).any()
