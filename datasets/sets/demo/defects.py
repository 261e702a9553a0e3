"""Draws the defects of the demo data set on grey crops, each with its mask.

- scratch: a thin bent line of one value, 1.6 to 2.6 standard deviations from the crop's mean.
- stain: a soft-edged blob, 20 to 35 % darker or brighter; the texture shows through.
- hole: a dark ellipse with a sharp edge.
- foreign: a blob of another texture, with the mean and contrast of what it covers.
- smear: a blob blurred along one direction; brightness stays, fine structure goes.

Stain, foreign and smear change structure more than brightness, or the other way round, so that
no single feature finds all five.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage
from skimage import draw, filters

CHANGE_THRESHOLD = 4
_PLAIN_CHANGE = 12
_MIN_AREA = 100


def draw_defect(
    kind: str, crop: np.ndarray, foreign: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one defect on a copy of a crop.

    The mask is the pixels changed by at least CHANGE_THRESHOLD grey levels that connect to a change
    of 12 or more, with the gaps closed where the drawn value happens to equal the old one. Outside
    of it the crop is left as it was.

    Args:
        kind: One of `datasets.sets.demo.demo.DEFECTS`.
        crop: (H, W) uint8.
        foreign: A crop of another texture, (H, W) uint8.
        rng: Where the defect is drawn, and how.

    Returns:
        The defective crop, (H, W) uint8, and its mask, (H, W) bool, with at least 100 pixels.
    """
    while True:
        drawn = _DRAWERS[kind](crop.astype(float), foreign.astype(float), rng)
        drawn_crop = np.clip(np.rint(drawn), 0, 255).astype(np.uint8)
        mask = _changed(crop, drawn_crop)
        # A smear on an even spot changes nothing: draw it elsewhere.
        if mask.sum() >= _MIN_AREA:
            return np.where(mask, drawn_crop, crop), mask


def _changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    change = np.abs(after.astype(int) - before.astype(int))
    # Hysteresis: a small change counts where it borders on a plain one, not as speckle of its own.
    changed = filters.apply_hysteresis_threshold(change, CHANGE_THRESHOLD - 1, _PLAIN_CHANGE - 1)
    # Padded, because closing treats what lies beyond the border as unchanged.
    closed = ndimage.binary_closing(np.pad(changed, 4, mode="edge"), iterations=2)[4:-4, 4:-4]
    filled = ndimage.binary_fill_holes(closed)
    regions, _ = ndimage.label(filled)
    areas = np.bincount(regions.ravel())
    return filled & (areas[regions] >= 8)  # (H, W)


def _draw_scratch(crop: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = min(crop.shape)
    start = rng.uniform(0.15 * size, 0.85 * size, 2)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.55) * size
    direction = np.array([np.sin(angle), np.cos(angle)])
    end = np.clip(start + length * direction, 0, size - 1)
    bend = (start + end) / 2 + rng.uniform(-0.15, 0.15) * size * direction[::-1] * [1, -1]
    points = np.rint([start, np.clip(bend, 0, size - 1), end]).astype(int)
    (r0, c0), (r1, c1), (r2, c2) = points.tolist()
    rows, columns = draw.bezier_curve(r0, c0, r1, c1, r2, c2, weight=1.0, shape=crop.shape)
    away = np.ones(crop.shape, dtype=bool)
    away[rows, columns] = False
    weight = np.clip(rng.uniform(1.5, 2.5) - ndimage.distance_transform_edt(away), 0, 1)
    value = crop.mean() + rng.choice([-1, 1]) * rng.uniform(1.6, 2.6) * crop.std()
    return crop * (1 - weight) + value * weight


def _draw_stain(crop: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    weight = _blob(crop.shape, rng, softness=0.25)
    return crop * (1 + weight * rng.choice([-1, 1]) * rng.uniform(0.2, 0.35))


def _draw_hole(crop: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    weight = _blob(crop.shape, rng, softness=0.1, wobble=0.0, radius=(0.04, 0.08))
    return crop * (1 - weight) + weight * rng.uniform(15, 40)


def _draw_foreign(crop: np.ndarray, foreign: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    weight = _blob(crop.shape, rng, softness=0.1)
    covered = weight > 0.5
    contrast = crop[covered].std() / max(foreign[covered].std(), 1.0)
    matched = (foreign - foreign[covered].mean()) * contrast + crop[covered].mean()
    return crop * (1 - weight) + matched * weight


def _draw_smear(crop: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle, length = rng.uniform(0, np.pi), rng.uniform(7, 13)
    steps = np.linspace(-length / 2, length / 2, 2 * int(length) + 1)
    shifted = [
        ndimage.shift(crop, (step * np.sin(angle), step * np.cos(angle)), order=1, mode="nearest")
        for step in steps
    ]
    weight = _blob(crop.shape, rng, softness=0.1)
    return crop * (1 - weight) + np.mean(shifted, axis=0) * weight


def _blob(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    softness: float,
    wobble: float = 0.3,
    radius: tuple[float, float] = (0.09, 0.17),
) -> np.ndarray:
    """Draws the weight, 1 inside and 0 outside, of a stretched disc with a wavy edge.

    The radius is a part of the image's side, softness and wobble are parts of the radius.
    """
    size = min(shape)
    row, column = rng.uniform(0.2 * size, 0.8 * size, 2)
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.7)
    y, x = np.mgrid[: shape[0], : shape[1]] - np.array([row, column])[:, None, None]  # (2, H, W)
    along = (x * np.cos(turn) + y * np.sin(turn)) / np.sqrt(stretch)
    across = (y * np.cos(turn) - x * np.sin(turn)) * np.sqrt(stretch)
    angle = np.arctan2(across, along)
    waves = sum(
        rng.uniform(-1, 1) / order * np.sin(order * angle + rng.uniform(0, 2 * np.pi))
        for order in (2, 3, 5)
    )
    distance = np.hypot(along, across) / (rng.uniform(*radius) * size * (1 + wobble * waves))
    return np.clip(0.5 + (1 - distance) / (2 * softness), 0, 1)  # (H, W)


_Drawer = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
_DRAWERS: dict[str, _Drawer] = {
    "foreign": _draw_foreign,
    "hole": _draw_hole,
    "scratch": _draw_scratch,
    "smear": _draw_smear,
    "stain": _draw_stain,
}
