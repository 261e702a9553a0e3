"""Pictures of kinds of defects: a sheet of each, a map of all regions, kinds against names."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from utils.pictures.words import without_formulas
from utils.runs.files import atomic_path

COLUMNS, ROWS = 8, 4
"""Of a sheet."""
_CELL = 1.35  # inches
_DPI = 110
_OUTLINE = "#D55E00"
_PERPLEXITY = 30.0
_FEWEST = 8  # regions below which neighbours mean nothing and their two main directions are drawn
_MARKERS = "osD^vPX*<>"
_MOST_NUMBERS = 24  # kinds or names beyond which a table's numbers are left out

Shown = tuple[np.ndarray, np.ndarray]
"""A piece: its image (H, W, 3) uint8, and its mask (H, W) bool."""


def save_sheet(
    path: Path, title: str, captions: Sequence[str], read: Callable[[int], Shown]
) -> Path:
    """Draw pieces of one kind, the mask's outline on each.

    Args:
        path: the PNG to write.
        title: heading.
        captions: of all pieces of the kind, in the order in which they are drawn.
        read: gives the piece of a position; asked only for those that fit.
    """
    shown = min(len(captions), COLUMNS * ROWS)
    columns = min(COLUMNS, max(3, shown))
    rows = -(-shown // columns)
    figure = Figure(figsize=(columns * _CELL, rows * (_CELL + 0.22) + 0.45), layout="constrained")
    left = len(captions) - shown
    figure.suptitle(title + (f" ({left} more)" if left else ""), fontsize="medium")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, axes in enumerate(grid):
        axes.set_axis_off()
        if i < shown:
            image, mask = read(i)
            axes.imshow(image)
            if mask.any() and not mask.all():
                axes.contour(mask, levels=[0.5], colors=_OUTLINE, linewidths=0.9)
            axes.set_title(captions[i], fontsize="x-small", pad=2)
    return _write(figure, path)


def save_map(
    path: Path, title: str, vectors: np.ndarray, labels: Sequence[str], *, random_seed: int
) -> Path:
    """Draw regions as points: near each other where their vectors are (t-SNE).

    Args:
        path: the PNG to write.
        title: heading.
        vectors: (R, D).
        labels: (R,) what their kinds are called.
        random_seed: of the layout.
    """
    places = _in_two_dimensions(vectors, random_seed)  # (R, 2)
    kinds = sorted(set(labels), key=lambda one: (len(one), one))
    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps["tab20" if len(kinds) > 10 else "tab10"].resampled(max(10, len(kinds)))
    for i, kind in enumerate(kinds):
        own = places[[label == kind for label in labels]]
        axes.scatter(
            own[:, 0],
            own[:, 1],
            s=16,
            color=colours(i),
            marker=_MARKERS[i % len(_MARKERS)],
            label=f"{kind} ({len(own)})",
            linewidths=0,
        )
    axes.set_title(title, fontsize="medium")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    return _write(figure, path)


def save_confusion(
    path: Path, title: str, kinds: Sequence[str], names: Sequence[str], counts: np.ndarray
) -> Path:
    """Draw how many images of each kind have each name, shaded by the share of the name.

    Args:
        path: the PNG to write.
        title: heading.
        kinds: K of them.
        names: M of them.
        counts: (K, M).
    """
    size = (2.4 + 0.55 * len(names), 1.7 + 0.4 * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=0, keepdims=True), 1)  # (K, M)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize="small")
    axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
    axes.set_xlabel("name of the folder")
    axes.set_ylabel("kind that was found")
    axes.set_title(title, fontsize="medium")
    if max(counts.shape) <= _MOST_NUMBERS:
        _write_numbers(axes, counts, shares)
    return _write(figure, path)


def _write_numbers(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.6 else "black"
        number = str(counts[row, column])
        axes.text(column, row, number, ha="center", va="center", color=colour, fontsize="small")


def _in_two_dimensions(vectors: np.ndarray, random_seed: int) -> np.ndarray:
    """Lay vectors (R, D) out as (R, 2)."""
    if len(vectors) < _FEWEST:
        rotated, sizes, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
        places = np.zeros((len(vectors), 2))
        places[:, : len(sizes)] = (rotated * sizes)[:, :2]
        return places
    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    layout = TSNE(2, perplexity=perplexity, init="pca", random_state=random_seed)
    return layout.fit_transform(vectors)


def _write(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as temporary:
        without_formulas(figure).savefig(temporary, dpi=_DPI, format="png")
    return path
