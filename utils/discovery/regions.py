"""From an image's mask to the square pieces of it that are looked at, one around each region.

Source: the released code of AnomalyNCD (see `binarise`): boxes are widened, moved inside the image,
and merged where they come near each other. A merged box is made square again after each union and
is not moved inside: what it shows beyond the image is black, without a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

MARGIN = 1.1
"""A box's side over that of the region it is around."""
SMALLEST, LARGEST = 0.1, 0.5
"""Half of a box's side, as a share of the image's longer side."""
NEAR = 0.01
"""Boxes whose gap is smaller are one, likewise."""


@dataclass(frozen=True)
class Box:
    """A rectangle in an image's pixels, which may reach beyond the image."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Of the rectangle."""
        return (self.right - self.left) * (self.bottom - self.top)

    def gap(self, other: "Box") -> float:
        """Return the distance to another box: 0 where they touch, -1 where they overlap."""
        across = max(self.left - other.right, other.left - self.right)
        down = max(self.top - other.bottom, other.top - self.bottom)
        if across < 0 and down < 0:
            return -1.0
        return float(np.hypot(max(0.0, across), max(0.0, down)))

    def joined(self, other: "Box") -> "Box":
        """Return the smallest square around both, the shorter side widened alike on both ends."""
        left, right = min(self.left, other.left), max(self.right, other.right)
        top, bottom = min(self.top, other.top), max(self.bottom, other.bottom)
        more = ((right - left) - (bottom - top)) / 2
        if more > 0:
            return Box(left, top - more, right, bottom + more)
        return Box(left + more, top, right - more, bottom)


def boxes_of(mask: np.ndarray, most: int) -> list[Box]:
    """Return the boxes of an image's regions, the largest first.

    Args:
        mask: (H, W) bool, at the size of the image.
        most: boxes kept, at least one. The released code keeps one more than it counts regions.

    Returns:
        At least one: an image without a region is looked at whole.
    """
    H, W = mask.shape
    contours, _ = cv2.findContours(
        np.ascontiguousarray(mask).view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    if not contours:
        return [Box(0, 0, W, H)]
    rectangles = sorted((cv2.boundingRect(c) for c in contours), key=lambda r: r[2] * r[3])
    merged = merge([_around(r, W, H) for r in rectangles], int(NEAR * max(H, W)))
    ranked = sorted(merged, key=lambda box: -box.area)
    return ranked[: max(1, most)]


def merge(boxes: Sequence[Box], distance: float) -> list[Box]:
    """Join boxes that are nearer to each other than a distance.

    Each box with its neighbours is a set; sets within another one count no more. That is no
    transitive closure: of a chain of four, two overlapping boxes are made.
    """
    near = [
        frozenset(j for j, other in enumerate(boxes) if i == j or box.gap(other) < distance)
        for i, box in enumerate(boxes)
    ]
    several = {group for group in near if len(group) > 1}
    largest = [group for group in several if not any(group < other for other in several)]
    members = frozenset().union(*largest)
    found = [box for i, box in enumerate(boxes) if i not in members]
    for group in largest:
        first, *rest = sorted(
            (boxes[i] for i in group), key=lambda b: (b.left, b.top, b.right, b.bottom)
        )
        for box in rest:
            first = first.joined(box)
        found.append(first)
    return found


def save_png(path: Path, pixels: np.ndarray) -> Path:
    """Write what `crop` returns, (H, W, 3) RGB or (H, W) grey, uint8; return the path."""
    shown = pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., ::-1])
    _, data = cv2.imencode(".png", shown)
    path.write_bytes(data.tobytes())
    return path


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """Return what a box shows of an image (H, W) or (H, W, 3); beyond it all is 0."""
    left, top, right, bottom = (round(x) for x in (box.left, box.top, box.right, box.bottom))
    H, W = image.shape[:2]
    found = np.zeros((bottom - top, right - left, *image.shape[2:]), dtype=image.dtype)
    rows = slice(max(0, top), min(H, bottom))
    columns = slice(max(0, left), min(W, right))
    found[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = image[
        rows, columns
    ]
    return found


def _around(rectangle: Sequence[int], W: int, H: int) -> Box:
    """Return the widened square around a rectangle, moved inside the image where it fits."""
    x, y, w, h = rectangle
    longer = max(H, W)
    half = max(int(max(w, h) * MARGIN * 0.5), int(SMALLEST * longer))
    half = min(half, int(LARGEST * longer))
    left = _inside(x + w // 2 - half, 2 * half, W)
    top = _inside(y + h // 2 - half, 2 * half, H)
    return Box(left, top, left + 2 * half, top + 2 * half)


def _inside(start: int, side: int, size: int) -> int:
    """Return where a side begins, moved inside the image; where it is longer it may end outside."""
    if start < 0:
        return 0
    return size - side if start + side > size else start
