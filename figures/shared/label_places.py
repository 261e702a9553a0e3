"""Where to write the labels of points so that none covers another, a mark or the frame."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath


@dataclass(frozen=True)
class Box:
    """A rectangle, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Return the common area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def distance(self, x: float, y: float) -> float:
        """Return how far a point is from the rectangle; 0 inside."""
        across = max(self.left - x, 0.0, x - self.right)
        return math.hypot(across, max(self.bottom - y, 0.0, y - self.top))

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


def place_labels(
    centres: Sequence[tuple[float, float]],
    radii: Sequence[float],
    texts: Sequence[str],
    size: float,
    frame: Box,
) -> list[Box]:
    """Return a box for each label: the nearest free place around its point, points in crowds first.

    Args:
        centres: of the marks, in points.
        radii: of the marks, in points.
        texts: labels, perhaps of several lines.
        size: of the letters, in points.
        frame: labels stay inside.
    """
    marks = [
        Box(x - 0.8 * r, y - 0.8 * r, x + 0.8 * r, y + 0.8 * r)
        for (x, y), r in zip(centres, radii, strict=True)
    ]

    def neighbours(i: int) -> float:
        return sum(-math.dist(centres[i], other) < 80 for other in centres)

    placed: dict[int, Box] = {}
    for i in sorted(range(len(texts)), key=lambda i: (-neighbours(i), i)):
        width, height = _extent(texts[i], size)
        best, cost = None, math.inf
        for distance, turn in itertools.product((3, 9, 18, 30, 45, 65, 90), range(16)):
            angle = 2 * math.pi * turn / 16
            reach = radii[i] + distance
            x = centres[i][0] + math.cos(angle) * (reach + width / 2)
            y = centres[i][1] + math.sin(angle) * (reach + height / 2)
            box = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            others = [*marks, *placed.values()]
            covered = sum(box.overlap(other) for other in others) + box.area - box.overlap(frame)
            # A line from the point should not run through another label or mark.
            steps = [k / 12 for k in range(1, 12)]
            line = [(x + s * (centres[i][0] - x), y + s * (centres[i][1] - y)) for s in steps]
            targets = [*placed.values(), *marks[:i], *marks[i + 1 :]]
            crossed = sum(other.distance(*at) == 0 for other in targets for at in line)
            # Nor should a label stand as near to another point as to its own.
            near = sum(
                max(0.0, radii[k] + 9 - box.distance(*centres[k]))
                for k in range(len(centres))
                if k != i
            )
            total = covered + 40 * crossed + 3 * near + 0.3 * distance
            if total < cost:
                best, cost = box, total
        assert best is not None
        placed[i] = best
    return [placed[i] for i in range(len(texts))]


def _extent(text: str, size: float) -> tuple[float, float]:
    """Return width and height of a label in points, with a margin around it."""
    lines = text.split("\n")
    font = FontProperties(size=size)
    widths = [
        TextPath((0, 0), line.replace("$", "S"), prop=font).get_extents().width for line in lines
    ]
    return max(widths) + 14, 1.25 * size * len(lines) + 2
