"""What DRAEM does to a texture before it is pasted: three of ten changes of colour or place.

Source: the released code of "DRAEM" (Zavrtanik et al., ICCV 2021), which names ten augmenters of a
library and their ranges. What it leaves to the library's defaults is written out below, and where
the library draws a colour space at random, HSV is always taken here.

Each takes an image (H, W, 3) uint8, RGB, and leaves it as it is; all it draws comes from `rng`.
"""

from collections.abc import Callable

import cv2
import numpy as np

Augmenter = Callable[[np.ndarray, np.random.Generator], np.ndarray]
LEVELS = np.array(range(256), np.float64)
GAMMA = (0.5, 2.0)
BRIGHTNESS_FACTOR = (0.8, 1.2)
BRIGHTNESS_STEP = (-30.0, 30.0)
SHARPNESS = (0.0, 2.0)
"""0 is smoothed, 1 as it was, 2 as much sharper."""
COLOUR_STEP = 50
"""Either way: of saturation in its 256 levels, of hue in as many of the whole circle."""
SOLARIZE_FROM = (32, 128)
KEPT_BITS = (1, 8)
CUT_OFF = (0.0, 20.0)
"""Per cent of the pixels, at each end, that auto-contrast lets saturate."""
LARGEST_TURN = 45.0
"""Degrees either way."""


def augment(image: np.ndarray, rng: np.random.Generator, count: int = 3) -> np.ndarray:
    """Apply `count` different augmenters, drawn at random, one after the other."""
    for index in rng.choice(len(AUGMENTERS), size=count, replace=False):
        image = AUGMENTERS[index](image, rng)
    return image


def turn(
    image: np.ndarray, degrees: float, *, centre: tuple[float, float] | None = None
) -> np.ndarray:
    """Turn an image or a map (H, W); what comes in from outside is 0.

    Args:
        image: (H, W, 3) or (H, W).
        degrees: against the clock.
        centre: column and row of what stays; None for the middle.
    """
    height, width = image.shape[:2]
    about = ((width - 1) / 2, (height - 1) / 2) if centre is None else centre
    matrix = cv2.getRotationMatrix2D(about, degrees, 1.0)
    return cv2.warpAffine(image, matrix, (width, height))


def change_gamma(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Raise each channel to a power of its own."""
    powers = rng.uniform(*GAMMA, size=3)
    return _mapped(image, 255 * (LEVELS / 255) ** powers[:, None])


def change_brightness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Multiply the value of HSV, and add to it."""
    value = LEVELS * rng.uniform(*BRIGHTNESS_FACTOR) + rng.uniform(*BRIGHTNESS_STEP)
    return _in_hsv(image, np.stack([LEVELS, LEVELS, value]))


def change_sharpness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move from a smoothed image to the image, or past it."""
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(image, -1, kernel / kernel.sum())
    factor = rng.uniform(*SHARPNESS)
    return cv2.addWeighted(image, factor, smooth, 1 - factor, 0)


def change_colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add to hue and saturation."""
    hue, saturation = rng.integers(-COLOUR_STEP, COLOUR_STEP + 1, size=2)
    return _in_hsv(image, np.stack([(LEVELS + hue) % 256, LEVELS + saturation, LEVELS]))


def solarize(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Invert all values from a threshold on, of every second image."""
    if rng.random() >= 0.5:
        return image
    threshold = rng.integers(*SOLARIZE_FROM, endpoint=True)
    return _mapped(image, np.where(threshold <= LEVELS, 255 - LEVELS, LEVELS))


def posterize(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep the highest bits of each value."""
    step = 2 ** (8 - int(rng.integers(*KEPT_BITS, endpoint=True)))
    return _mapped(image, LEVELS // step * step)


def invert(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Invert all values."""
    del rng
    return 255 - image


def stretch_contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stretch each channel to all levels, some pixels at either end beyond them."""
    share = rng.uniform(*CUT_OFF) / 100
    table = []
    for channel in cv2.split(image):
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().cumsum()
        low, high = np.searchsorted(counts, [share * counts[-1], (1 - share) * counts[-1]])
        table.append((LEVELS - low) * (255 / (high - low)) if high > low else LEVELS)
    return _mapped(image, np.stack(table))


def equalize(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make all levels of each channel as frequent."""
    del rng
    return cv2.merge([cv2.equalizeHist(channel) for channel in cv2.split(image)])


def turn_at_random(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn the image."""
    return turn(image, rng.uniform(-LARGEST_TURN, LARGEST_TURN))


AUGMENTERS: tuple[Augmenter, ...] = (
    change_gamma,
    change_brightness,
    change_sharpness,
    change_colour,
    solarize,
    posterize,
    invert,
    stretch_contrast,
    equalize,
    turn_at_random,
)


def _mapped(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replace each level by its entry in a table (256,), or (3, 256) of the channels."""
    levels = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    if levels.ndim == 2:
        levels = np.ascontiguousarray(levels.T)[None]  # (1, 256, 3)
    return cv2.LUT(image, levels)


def _in_hsv(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replace each level of hue, saturation and value, all of 256, by its entry in (3, 256)."""
    hsv = _mapped(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL), table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
