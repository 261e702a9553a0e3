"""How far apart the colours of two images are, in Lab, as they should be and as published."""

import kornia.color
import torch.nn.functional as F
from torch import Tensor

COLOUR_SCALE = 0.001
"""Of the colour map beside that of structure (released code)."""
COLOUR_FILTER = 11
"""Side of the box over squared differences of colours, in pixels (released code)."""
WHITE = 180
"""What the released code makes of 1 before it casts to 8 bits."""
LEVELS = 256


def colour_map(images: Tensor, others: Tensor) -> Tensor:
    """Return the scaled mean, over a box, of the squared difference of a and b of Lab, (B, S, S).

    Args:
        images: (B, 3, S, S) float32, RGB in 0 to 1.
        others: the same.
    """
    difference = kornia.color.rgb_to_lab(images) - kornia.color.rgb_to_lab(others)
    return COLOUR_SCALE * box_mean(difference[:, 1:].square().sum(dim=1))


def wrapped_colour_map(images: Tensor, others: Tensor) -> Tensor:
    """Return what the released code has in its place, with values that wrap modulo 256.

    White is 180 and what leaves 0 to 255 wraps; Lab is rounded to 8 bits; then differences, their
    squares and the sum of two of them wrap, so that a difference of 16, or of 32, counts nothing
    and one of 10 counts 100; the mean over the box is rounded.
    """
    one, other = _lab_of_bytes(images), _lab_of_bytes(others)
    squares = wrapped_squares(one[:, 1:] - other[:, 1:])
    return COLOUR_SCALE * box_mean(squares.sum(dim=1).remainder(LEVELS)).round()


def as_bytes(images: Tensor) -> Tensor:
    """Return images as the released code casts them to 8 bits: whole numbers in 0 to 255."""
    return (images * WHITE).trunc().remainder(LEVELS)


def wrapped_squares(differences: Tensor) -> Tensor:
    """Return the squares of whole numbers in 8 bits without sign."""
    return differences.remainder(LEVELS).square().remainder(LEVELS)


def box_mean(maps: Tensor) -> Tensor:
    """Return the mean over a box about each pixel of maps (B, S, S); borders are reflected."""
    padded = F.pad(maps[:, None], [COLOUR_FILTER // 2] * 4, mode="reflect")
    return F.avg_pool2d(padded, COLOUR_FILTER, stride=1)[:, 0]  # (B, S, S)


def _lab_of_bytes(images: Tensor) -> Tensor:
    """Return Lab in whole numbers; what 8 bits add to a and b cancels in differences."""
    return kornia.color.rgb_to_lab(as_bytes(images) / (LEVELS - 1)).round()
