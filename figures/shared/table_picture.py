"""A table as a picture: booktabs rules, best in bold, second underlined, our part tinted."""

import textwrap
from collections.abc import Sequence
from itertools import chain

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from utils.tables.table import Table

# All lengths are points.
_SIZE = 8.0
_LINE = 11.0
_ROW = 14.0
_GAP = 11.0
_MARGIN = 8.0
_LETTER = 4.35  # mean width of a letter at this size, for wrapping running text
_MIN_WIDTH = 420.0
_LABEL_LETTERS = 58
_TINT = "#e6f1f8"


def draw(table: Table) -> Figure:
    """Draw a table at the size its text takes."""
    heads = [table.corner, *(column.name for column in table.columns)]
    labels, texts, marks = [row.label for row in table.rows], table.texts(), table.marks()
    groups, blocks, notes = table.groups(), table.blocks(), table.notes
    our_rows = [r for r, row in enumerate(table.rows) if row.is_ours]
    our_columns = [c for c, column in enumerate(table.columns) if column.is_ours]
    glued = [label.replace(" = ", "\xa0=\xa0") for label in labels]  # no line ends in "n ="
    wrapped = [textwrap.wrap(label, _LABEL_LETTERS) for label in glued]
    widths = [max(_width(line) for line in [heads[0], *chain(*wrapped)]) + _GAP]
    for c, head in enumerate(heads[1:]):
        widths.append(max(_width(t, bold=True) for t in [head, *(row[c] for row in texts)]) + _GAP)
    for group, start, end in groups:
        lack = _width(group) + _GAP - sum(widths[start + 1 : end + 1])
        for c in range(start + 1, end + 1):
            widths[c] += max(0.0, lack) / (end - start)
    width = max(_MIN_WIDTH, sum(widths))
    letters = int(width / _LETTER)
    above = textwrap.wrap(table.caption, letters)
    below = [
        line for note in notes for line in textwrap.wrap(note, letters, subsequent_indent="  ")
    ]
    has_groups = any(group for group, *_ in groups)
    heights = [_ROW + _LINE * (len(lines) - 1) for lines in wrapped]
    height = (
        _LINE * (len(above) + len(below)) + _ROW * (1 + has_groups) + sum(heights) + 6 * len(blocks)
    )
    figure = Figure(figsize=((width + 2 * _MARGIN) / 72, (height + 3 * _MARGIN) / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-_MARGIN, width + _MARGIN)
    axes.set_ylim(-height - 2 * _MARGIN, _MARGIN)
    axes.axis("off")
    rights = [sum(widths[: c + 1]) for c in range(len(widths))]  # right edge of each column

    y = 0.0
    for line in above:
        _text(axes, 0, y - _LINE / 2, line)
        y -= _LINE
    y -= 4
    top = y
    _rule(axes, 0, rights[-1], y, 1.2)
    if has_groups:
        for group, start, end in groups:
            if group:
                left, right = rights[start] + _GAP / 2, rights[end] - _GAP / 4
                _text(axes, (left + right) / 2, y - _ROW / 2, group, ha="center")
                _rule(axes, left, right, y - _ROW, 0.5)
        y -= _ROW
    _cells(axes, [heads[0]], heads[1:], [""] * (len(heads) - 1), rights, y, _ROW)
    y -= _ROW
    for block in blocks:
        y -= 2
        _rule(axes, 0, rights[-1], y, 0.7)
        for r in block:
            if r in our_rows:
                axes.fill_betweenx([y - heights[r], y], 0, rights[-1], color=_TINT, zorder=0, lw=0)
            _cells(axes, wrapped[r], texts[r], marks[r], rights, y, heights[r])
            y -= heights[r]
    y -= 2
    _rule(axes, 0, rights[-1], y, 1.2)
    for c in our_columns:
        left, right = rights[c] + _GAP / 2, min(rights[c + 1] + _GAP / 2, rights[-1])
        axes.fill_betweenx([y, top], left, right, color=_TINT, zorder=0, lw=0)
    y -= 4
    for line in below:
        _text(axes, 0, y - _LINE / 2, line, size=_SIZE - 1)
        y -= _LINE
    return figure


def _cells(
    axes: Axes,
    label: Sequence[str],
    texts: Sequence[str],
    marks: Sequence[str],
    rights: Sequence[float],
    y: float,
    height: float,
) -> None:
    """Write one row whose upper edge is at y."""
    middle = y - height / 2
    for i, line in enumerate(label):
        offset = ((len(label) - 1) / 2 - i) * _LINE
        _text(axes, 0, middle + offset, line)
    for text, mark, right in zip(texts, marks, rights[1:], strict=True):
        weight = "bold" if mark == "best" else "normal"
        _text(axes, right, middle, text, ha="right", weight=weight)
        if mark == "second":
            _rule(axes, right - _width(text), right, middle - 4.6, 0.6)


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = _SIZE,
    ha: str = "left",
    weight: str = "normal",
) -> None:
    # Without parse_math a name with two dollar signs would be set as a formula.
    axes.text(x, y, text, size=size, ha=ha, va="center_baseline", weight=weight, parse_math=False)


def _rule(axes: Axes, left: float, right: float, y: float, thickness: float) -> None:
    axes.plot([left, right], [y, y], color="black", linewidth=thickness, solid_capstyle="butt")


def _width(text: str, *, bold: bool = False) -> float:
    """Return the width of a text in points."""
    if not text.strip():
        return 0.0
    font = FontProperties(size=_SIZE, weight="bold" if bold else "normal")
    return float(TextPath((0, 0), text.replace("$", "S"), prop=font).get_extents().width)
