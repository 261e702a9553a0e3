"""How the figures look, and how they are written and called."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils.pictures.words import without_formulas
from utils.runs.files import atomic_path
from utils.tables.formats import to_markdown, write
from utils.tables.table import Table

# Okabe and Ito's palette, which the colour-blind tell apart; black and yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", ":", "-.")
MAX_COLUMNS = 5
_DPI = 150


def style(number: int) -> dict[str, Any]:
    """Return colour and line style of the number-th curve; 24 of them differ."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)],
    }


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the command line every figure has: run folders, and where to write.

    Args:
        module: e.g. "figures.loss_curve"; the default file is named like its last part.
        description: the module's docstring.
    """
    result = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    result.add_argument(
        "--out",
        type=Path,
        default=Path(module.rpartition(".")[2]),
        metavar="FILE",
        help="written as FILE.png and FILE.pdf (default: %(default)s)",
    )
    return result


def save_figure(figure: Figure, out: Path) -> list[Path]:
    """Write a figure as PNG and as PDF; return the paths.

    Args:
        figure: made without pyplot, so that nothing needs to be closed.
        out: the file, with .png, .pdf or no suffix.
    """
    stem = out.with_suffix("") if out.suffix in {".png", ".pdf"} else out
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
    without_formulas(figure)
    for path in paths:
        kind = path.suffix[1:]
        # Without its date a PDF has the same bytes each time it is made.
        metadata = {"CreationDate": None} if kind == "pdf" else None
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=_DPI, metadata=metadata)
    return paths


def save_with_table(figure: Figure, out: Path, table: Table) -> list[Path]:
    """Write a figure, and its numbers as FILE.md and FILE.csv; print the table and the paths."""
    paths = save_figure(figure, out)
    paths += write(table, paths[0].with_suffix(""), (".md", ".csv"))
    sys.stdout.write(to_markdown(table) + "".join(f"{path}\n" for path in paths))
    return paths


def grid_rows(panels: Sequence[Sequence[str]]) -> tuple[int, int, list[list[tuple[int, int]]]]:
    """Place groups of panels on a grid; each group starts a row, unless all have one panel.

    Returns:
        Rows, columns, and (row, column) of each panel of each group.
    """
    if all(len(group) == 1 for group in panels):
        count = len(panels)
        columns = min(MAX_COLUMNS, count)
        return -(-count // columns), columns, [[divmod(i, columns)] for i in range(count)]
    columns = min(MAX_COLUMNS, max(len(group) for group in panels))
    places, row = [], 0
    for group in panels:
        places.append([(row + i // columns, i % columns) for i in range(len(group))])
        row += -(-len(group) // columns)
    return row, columns, places
