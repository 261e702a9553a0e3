"""A picture of pairs of images side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.pictures.words import without_formulas
from utils.runs.files import atomic_path

_COLUMNS = 3
_DPI = 110


def save_pairs(
    path: Path, pairs: Sequence[tuple[np.ndarray, np.ndarray, str]], *, title: str
) -> None:
    """Draw pairs of images, three to a row.

    Args:
        path: of the PNG.
        pairs: two images (H, W, 3) uint8 of any size, and what stands above them.
        title: of the picture.
    """
    rows = -(-len(pairs) // _COLUMNS)
    figure = Figure(figsize=(3.4 * _COLUMNS, 0.5 + 2.0 * rows), layout="constrained", dpi=_DPI)
    figure.suptitle(title, fontsize="medium")
    grid = figure.subplots(rows, 2 * _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (left, right, words) in enumerate(pairs):
        row, column = divmod(number, _COLUMNS)
        for side, image in enumerate((left, right)):
            grid[row, 2 * column + side].imshow(image, aspect="auto")
        grid[row, 2 * column].set_title(words, fontsize="x-small", loc="left")
    with atomic_path(path) as temporary:
        without_formulas(figure).savefig(temporary, format="png")
