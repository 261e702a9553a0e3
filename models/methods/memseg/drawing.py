"""How MemSeg draws anomalies into normal images: a texture, or the image itself in disorder."""

from typing import Literal

import cv2
import numpy as np

from datasets.drawing.augmenters import augment, change_brightness, change_colour, turn_at_random
from datasets.drawing.perlin import perlin_mask
from datasets.drawing.textures import Textures, paste

Foreground = Literal["all", "otsu"]
OPACITY = (0.15, 1.0)
"""Of what is drawn over the image (reimplementation)."""
GRID = (4, 8)
"""Rows and columns of the parts that change places (paper)."""
GRID_OF_CODE = (8, 8)
"""The same of the reimplementation."""


def draw_training_image(
    image: np.ndarray,
    textures: Textures,
    rng: np.random.Generator,
    *,
    anomalous: float,
    foreground: Foreground,
    released: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a training image, and where it is anomalous.

    Args:
        image: (S, S, 3) uint8.
        textures: to draw from.
        rng: draws everything.
        anomalous: share of the images that get an anomaly, half of them a texture.
        foreground: where it may be.
        released: disorder the image as the reimplementation does.

    Returns:
        The image (S, S, 3) uint8, and the mask (S, S) bool, which may be empty.
    """
    size = len(image)
    if rng.random() >= anomalous:
        return image, np.zeros((size, size), dtype=bool)
    mask = perlin_mask(size, rng)
    if foreground == "otsu":
        mask &= find_foreground(image)
    if rng.random() < 0.5:
        source = textures.draw(size, rng)
    elif released:
        source = disordered(augment(image, rng), GRID_OF_CODE, rng)
    else:
        source = disordered(mildly_changed(image, rng), GRID, rng)
    return paste(image, source, mask, rng.uniform(*OPACITY)), mask


def find_foreground(image: np.ndarray) -> np.ndarray:
    """Return which pixels are none of the background, (S, S) bool.

    Grey values are split by Otsu's threshold; the background is the part that has more of the
    image's border.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    _, bright = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    border = np.concatenate([bright[0], bright[-1], bright[1:-1, 0], bright[1:-1, -1]])
    return bright == 0 if border.mean() > 0.5 else bright == 1


def mildly_changed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror, turn, and change brightness, saturation and hue of an image, each or not (paper)."""
    chosen = rng.random(5) < 0.5
    if chosen[0]:
        image = image[:, ::-1]
    if chosen[1]:
        image = image[::-1]
    image = np.ascontiguousarray(image)
    for change, is_chosen in zip(
        (turn_at_random, change_brightness, change_colour), chosen[2:], strict=True
    ):
        if is_chosen:
            image = change(image, rng)
    return image


def disordered(image: np.ndarray, grid: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return an image whose parts, of a grid of rows and columns, changed places.

    A side that the grid does not divide is squeezed until it does, and stretched again.
    """
    size = len(image)
    rows, columns = grid
    height, width = max(1, size // rows), max(1, size // columns)
    if (rows * height, columns * width) != (size, size):
        image = cv2.resize(image, (columns * width, rows * height))
    parts = image.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    parts = rng.permutation(parts.reshape(-1, height, width, 3))
    mixed = parts.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    mixed = mixed.reshape(rows * height, columns * width, 3)
    return mixed if len(mixed) == size == mixed.shape[1] else cv2.resize(mixed, (size, size))
