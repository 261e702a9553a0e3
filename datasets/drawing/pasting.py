"""CutPaste: a patch of an image, or a thin scar, is cut out, jittered in colour and pasted.

Source: "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization" (Li et al., CVPR
2021). A scar is also turned. Sizes in pixels are theirs at 256, scaled to the image.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

PATCH_AREA = (0.02, 0.15)  # share of the image, CVPR 2021, section 4
PATCH_ASPECT = (0.3, 3.3)  # (0.3, 1) or (1, 3.3)
SCAR_WIDTH = (2, 16)  # pixels at 256
SCAR_LENGTH = (10, 25)  # pixels at 256
SCAR_ANGLE = 45.0  # degrees either way
COLOUR_JITTER = 0.1  # of brightness, contrast, saturation and hue
AT = 256
"""Side of the image that sizes in pixels are given for."""

Jitter = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Makes other colours of a patch (h, w, 3) uint8."""


def jitter_shade(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation each by up to `COLOUR_JITTER`, in this order."""
    brightness, contrast, saturation = rng.uniform(1 - COLOUR_JITTER, 1 + COLOUR_JITTER, size=3)
    jittered = patch.astype(np.float32) * brightness
    jittered = (jittered - jittered.mean()) * contrast + jittered.mean()
    grey = jittered.mean(axis=2, keepdims=True)
    jittered = grey + (jittered - grey) * saturation
    return np.clip(np.rint(jittered), 0, 255).astype(np.uint8)


def jitter_colour(
    patch: np.ndarray, rng: np.random.Generator, strength: float = COLOUR_JITTER
) -> np.ndarray:
    """Change brightness, contrast, saturation and hue in a random order.

    As torchvision's ColorJitter does it on 8-bit images: contrast is about the mean grey value,
    saturation about each pixel's, and each step rounds.

    Args:
        patch: (h, w, 3) uint8, RGB.
        rng: draws how much, and the order.
        strength: of each: a factor of 1 - strength to 1 + strength, and that part of the circle
            either way; at most 1, hue at most half the circle.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, size=3)
    turn = round(rng.uniform(-1, 1) * min(strength, 0.5) * 256)
    for step in rng.permutation(4):
        if step == 0:
            patch = cv2.LUT(patch, _scaled(brightness))
        elif step == 1:
            mean = cv2.mean(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY))[0]
            patch = cv2.LUT(patch, _scaled(contrast, mean))
        elif step == 2:
            grey = cv2.cvtColor(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            patch = cv2.addWeighted(patch, saturation, grey, 1 - saturation, 0)
        elif turn:
            colours = cv2.cvtColor(patch, cv2.COLOR_RGB2HSV_FULL)
            colours[:, :, 0] += np.uint8(turn % 256)  # hue has 256 steps, round and round
            patch = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB_FULL)
    return patch


def paste_patch(
    image: np.ndarray, rng: np.random.Generator, *, jitter: Jitter = jitter_shade
) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of an image with a rectangle of it pasted elsewhere, and its mask.

    Args:
        image: (S, S, 3) uint8.
        rng: draws sizes, places and colours.
        jitter: of the rectangle's colours.

    Returns:
        (S, S, 3) uint8, and (S, S) bool.
    """
    size = image.shape[0]
    area = rng.uniform(*PATCH_AREA) * size * size
    low, high = (PATCH_ASPECT[0], 1.0) if rng.random() < 0.5 else (1.0, PATCH_ASPECT[1])
    aspect = rng.uniform(low, high)
    height = int(np.clip(round(math.sqrt(area / aspect)), 1, size))
    width = int(np.clip(round(math.sqrt(area * aspect)), 1, size))
    patch = jitter(_cut(image, height, width, rng), rng)
    pasted, mask = image.copy(), np.zeros(image.shape[:2], dtype=bool)
    top, left = place(image, height, width, rng)
    pasted[top : top + height, left : left + width] = patch
    mask[top : top + height, left : left + width] = True
    return pasted, mask


def paste_scar(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    jitter: Jitter = jitter_shade,
    whole: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of an image with a thin, turned piece of it pasted elsewhere, and its mask.

    Where the image has no room for it, which only tiny ones have not, a patch is pasted instead.

    Args:
        image: (S, S, 3) uint8.
        rng: draws sizes, places, angle and colours.
        jitter: of the scar's colours.
        whole: side of the image that `image` is a crop of, by which the scar is scaled; None where
            it is whole.

    Returns:
        (S, S, 3) uint8, and (S, S) bool.
    """
    size = image.shape[0]
    scale = (size if whole is None else whole) / AT
    width = int(np.clip(round(rng.uniform(*SCAR_WIDTH) * scale), 1, size))
    length = int(np.clip(round(rng.uniform(*SCAR_LENGTH) * scale), 2, size))
    scar = jitter(_cut(image, length, width, rng), rng)
    side = math.ceil(math.hypot(length, width))
    turn = cv2.getRotationMatrix2D(
        ((width - 1) / 2, (length - 1) / 2), rng.uniform(-SCAR_ANGLE, SCAR_ANGLE), 1.0
    )
    turn[:, 2] += np.array([(side - width) / 2, (side - length) / 2])
    # Its edge continues outwards: black interpolated into it would give every scar a dark rim.
    turned = cv2.warpAffine(scar, turn, (side, side), borderMode=cv2.BORDER_REPLICATE)
    cover = cv2.warpAffine(np.full((length, width), 255, np.uint8), turn, (side, side)) > 127
    if side > size or not cover.any():
        return paste_patch(image, rng, jitter=jitter)
    pasted, mask = image.copy(), np.zeros(image.shape[:2], dtype=bool)
    top, left = place(image, side, side, rng)
    pasted[top : top + side, left : left + side][cover] = turned[cover]
    mask[top : top + side, left : left + side] = cover
    return pasted, mask


def place(image: np.ndarray, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return top and left of a random rectangle inside an image."""
    top = int(rng.integers(0, image.shape[0] - height + 1))
    return top, int(rng.integers(0, image.shape[1] - width + 1))


def _cut(image: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    top, left = place(image, height, width, rng)
    return image[top : top + height, left : left + width]


def _scaled(factor: float, about: float = 0.0) -> np.ndarray:
    """Return each of the 256 values, its distance to `about` times a factor, clipped."""
    values = about + (np.arange(256) - about) * factor
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
