"""Perlin noise, and the masks of irregular blobs that are cut from it.

Source of the noise: "Improving Noise" (Perlin, SIGGRAPH 2002). Source of the masks: the released
code of "DRAEM" (Zavrtanik et al., ICCV 2021), which MemSeg and EdgRec take them from.
"""

import functools
import math

import numpy as np

from datasets.drawing.augmenters import turn

SMALLEST_CELL = 8
"""Pixels: of 32 cells in 256 (released code of DRAEM)."""
MOST_HALVINGS = 5
"""Of an image's side to that of a cell, at most (released code of DRAEM)."""
THRESHOLD = 0.5
"""Above it is the mask (released code of DRAEM)."""
LARGEST_TURN = 90.0
"""Degrees either way (released code of DRAEM)."""


def perlin_noise(size: int, cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw Perlin noise.

    Each corner of a grid of cells has a random slope; a pixel has the mean of what the slopes of
    its cell's four corners say, weighted by how near they are. The noise is 0 at the corners.

    Args:
        size: S, pixels of a side.
        cells: along rows and columns, whole cells that fill the image.
        rng: draws the slopes.

    Returns:
        (S, S) float32, in -1 to 1.
    """
    rows, columns = cells
    angles = rng.uniform(0, 2 * math.pi, size=(rows + 1, columns + 1))
    down, along = (f(angles).astype(np.float32) for f in (np.sin, np.cos))
    weights_y, offsets_y = _corners(size, rows)
    weights_x, offsets_x = _corners(size, columns)
    # A slope's share is separable, so all pixels come of two products.
    noise = offsets_y @ down @ weights_x.T + weights_y @ along @ offsets_x.T  # (S, S)
    return math.sqrt(2) * noise


@functools.lru_cache(maxsize=64)
def _corners(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, along one axis, each corner's weight at each pixel, and that times its distance.

    Both are (size, cells + 1) float32; the distance is in cells.
    """
    places = np.arange(size) * (cells / size)
    before = np.floor(places).astype(int)
    past = places - before
    faded = past**3 * (past * (past * 6 - 15) + 10)
    weights, offsets = np.zeros((2, size, cells + 1), np.float32)
    pixels = np.arange(size)
    weights[pixels, before], weights[pixels, before + 1] = 1 - faded, faded
    offsets[pixels, before] = (1 - faded) * past
    offsets[pixels, before + 1] = faded * (past - 1)
    for array in (weights, offsets):
        array.flags.writeable = False  # every caller gets the same
    return weights, offsets


def perlin_mask(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a mask: where Perlin noise, turned, exceeds a threshold.

    Each axis has 1, 2, 4, ... or 32 cells, of 8 pixels or more; the turn brings 0 in at the
    corners. The mask may be empty.

    Args:
        size: S, pixels of a side.
        rng: draws everything.

    Returns:
        (S, S) bool.
    """
    halvings = min(MOST_HALVINGS, max(0, int(math.log2(size / SMALLEST_CELL))))
    rows, columns = (2 ** rng.integers(0, halvings + 1, size=2)).tolist()
    noise = perlin_noise(size, (rows, columns), rng)
    return turn(noise, rng.uniform(-LARGEST_TURN, LARGEST_TURN)) > THRESHOLD
