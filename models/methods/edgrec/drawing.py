"""How EdgRec corrupts a training image: a texture, or a turned piece of the image itself."""

import numpy as np

from datasets.drawing.augmenters import turn
from datasets.drawing.textures import Textures, paste_texture

LARGEST_TURN = 90.0
"""Degrees either way that a training image is turned (released code)."""
PIECE = (0.8, 0.9)
"""Sides of a piece, parts of the image's, before it is cut off at the border (released code)."""
RADIANS = (-6, 5)
"""That a piece is turned by, in whole numbers (released code)."""


def draw_training_image(
    image: np.ndarray,
    textures: Textures,
    rng: np.random.Generator,
    *,
    turned: float,
    corrupted: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a training image and what is made of it.

    Args:
        image: (S, S, 3) uint8.
        textures: to paste from.
        rng: draws everything.
        turned: share of the images that are turned.
        corrupted: share of those that are corrupted, half of them by a texture.

    Returns:
        The image, perhaps turned, and the corrupted one, both (S, S, 3) uint8.
    """
    if rng.random() < turned:
        image = turn(image, rng.uniform(-LARGEST_TURN, LARGEST_TURN))
    by_texture, is_corrupted = rng.random() < 0.5, rng.random() < corrupted
    if not is_corrupted:
        return image, image
    if by_texture:
        return image, paste_texture(image, textures, rng)[0]
    return image, paste_piece(image, rng)


def paste_piece(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a copy of an image with a large piece of it, turned, pasted elsewhere.

    The piece begins anywhere and ends at the border at the latest; it is turned about its corner
    within its own rectangle, where black comes in from outside.

    Args:
        image: (S, S, 3) uint8.
        rng: draws everything.
    """
    size = len(image)
    top, left = rng.integers(0, size, size=2).tolist()
    height, width = (int(size * part) for part in rng.uniform(*PIECE, size=2))
    piece = image[top : top + height, left : left + width]
    degrees = float(np.degrees(rng.integers(*RADIANS, endpoint=True)))
    piece = turn(np.ascontiguousarray(piece), degrees, centre=(0, 0))
    height, width = piece.shape[:2]
    pasted = image.copy()
    top = int(rng.integers(0, size - height + 1))
    left = int(rng.integers(0, size - width + 1))
    pasted[top : top + height, left : left + width] = piece
    return pasted
