"""NoCo's Fig. 1: structured against semantic AUROC, circles as large as the trainable parameters.

python -m figures.figure1 RUN [RUN ...] --out FILE

Writes FILE.png, FILE.pdf, FILE.csv and FILE.md (the caption). A published method has a point when
NoCo's Table II prints all its numbers; a method of ours when it has runs of both kinds, with the
same options and the same way of selecting.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.shared.drawing import COLOURS, parser, save_with_table
from figures.shared.label_places import Box, place_labels
from figures.shared.own_results import (
    Series,
    by_setting,
    papers_data,
    pool,
    summarise,
    trainable,
    unfinished_notes,
)
from figures.shared.table_files import stem_of
from utils.cli import exits_cleanly
from utils.tables.published import published_table
from utils.tables.results import SELECT_LABELS
from utils.tables.table import Cell, Column, Row, Table

SIZE_PER_MILLION = 14.0
"""Square of a circle's diameter, in points, for each million of trainable parameters."""
LEGEND_MILLIONS = (1, 10, 50, 100)
_SIZE = 8.0  # of labels, points


@dataclass(frozen=True)
class Point:
    """A method in the figure.

    Attributes:
        label: method, and for ours what it is the mean of.
        structured: mean image AUROC in percent.
        semantic: likewise.
        millions: trainable parameters; nan where the paper prints none.
        kind: "published", "ours" (all data sets of the paper) or "not comparable".
        structured_data: what `structured` is the mean over.
        semantic_data: likewise.
    """

    label: str
    structured: float
    semantic: float
    millions: float
    kind: str
    structured_data: tuple[str, ...]
    semantic_data: tuple[str, ...]


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    options = parser("figures.figure1", __doc__)
    arguments = options.parse_args(argv)
    theirs, left_out = published_points()
    ours = own_points(pool(arguments.runs))
    notes = [*notes_of(ours), *unfinished_notes(arguments.runs)]
    table = table_of([*theirs, *ours], caption_of(left_out), notes)
    return save_with_table(draw([*theirs, *ours]), stem_of(arguments.out), table)


def published_points() -> tuple[list[Point], list[str]]:
    """Return the published points, and the methods without all numbers."""
    table = published_table("NoCo Table II")
    structured, semantic = papers_data(structured=True), papers_data(structured=False)
    points, left_out = [], []
    for method in dict.fromkeys(key[0] for key in table):
        x, y = (
            statistics.fmean(
                table.get((method, name, "mean", "image_auroc"), math.nan) for name in names
            )
            for names in (structured, semantic)
        )
        if math.isnan(x + y):
            left_out.append(method)
            continue
        millions = table.get((method, "-", "-", "trainable_params_millions"), math.nan)
        points.append(Point(method, x, y, millions, "published", structured, semantic))
    return points, left_out


def own_points(series: Sequence[Series]) -> list[Point]:
    """Pair the structured and the semantic runs of each method, options and way of selecting.

    Where a method has no way of selecting on both kinds (digits cannot be chosen by rotation), its
    only one on each side makes the pair. Means over some of the categories take no part.
    """
    groups: dict[tuple[str, ...], dict[str, list[Series]]] = {}
    for (method, options, backbone, select), by_data in by_setting(series).items():
        whole = [one for one in by_data.values() if summarise(one, "image_auroc").is_complete]
        if whole:
            groups.setdefault((method, options, backbone), {})[select] = whole
    points = []
    for (method, options, _), by_select in groups.items():
        sides = {
            kind: {
                select: kept
                for select, ones in by_select.items()
                if (kept := [one for one in ones if one.is_structured is kind])
            }
            for kind in (True, False)
        }
        pairs = [(select, select) for select in sides[True] if select in sides[False]]
        if not pairs and len(sides[True]) == len(sides[False]) == 1:
            pairs = [(next(iter(sides[True])), next(iter(sides[False])))]
        for left, right in pairs:
            name = ", ".join(filter(None, [method, options]))
            selects = dict.fromkeys(SELECT_LABELS[select] for select in (left, right))
            label = f"{name} ({' / '.join(selects)})"
            points.append(_own_point(label, sides[True][left], sides[False][right]))
    return points


def _own_point(label: str, structured: Sequence[Series], semantic: Sequence[Series]) -> Point:
    x, y = (
        statistics.fmean(summarise(one, "image_auroc").mean or math.nan for one in side)
        for side in (structured, semantic)
    )
    names = [tuple(sorted(one.data for one in side)) for side in (structured, semantic)]
    papers = [set(papers_data(structured=side)) for side in (True, False)]
    is_whole = papers == [set(side) for side in names]
    kind = "ours" if is_whole else "not comparable"
    return Point(label, x, y, trainable([*structured, *semantic]), kind, names[0], names[1])


def caption_of(left_out: Sequence[str]) -> str:
    """Say what is drawn, and what is not."""
    structured, semantic = papers_data(structured=True), papers_data(structured=False)
    return (
        "NoCo Fig. 1: mean image AUROC on structured (x) and semantic data (y); the area of a "
        "circle is proportional to the trainable parameters. Published: means of NoCo Table II "
        f"over {', '.join(structured)} (structured) and over {', '.join(semantic)} (semantic); not "
        f"drawn, since the table has no number for some: {', '.join(left_out)}. A cross: the table "
        "prints no parameters."
    )


def notes_of(ours: Sequence[Point]) -> list[str]:
    """Say which of our points compare, and why others do not."""
    if not ours:
        return ["ours: no method has complete runs of both kinds."]
    return [
        f"ours: {point.label}: {_why(point)}, not comparable."
        for point in ours
        if point.kind != "ours"
    ]


def _why(point: Point) -> str:
    names = {*point.structured_data, *point.semantic_data}
    if names <= {"demo", "digits"}:
        return "demo data"
    papers = {*papers_data(structured=True), *papers_data(structured=False)}
    return "some of the paper's data" if names <= papers else "other data"


def draw(points: Sequence[Point]) -> Figure:
    """Draw the points; ours are filled, those on other data than the paper's dashed and grey."""
    figure = Figure(figsize=(8.6, 6.2))
    axes = figure.add_axes((0.08, 0.09, 0.70, 0.87))
    axes.set_xlabel("structured: mean image AUROC, %")
    axes.set_ylabel("semantic: mean image AUROC, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for name, values in (
        ("x", [p.structured for p in points]),
        ("y", [p.semantic for p in points]),
    ):
        space = max(2.0, 0.12 * (max(values) - min(values)))
        low, high = min(values) - space, max(values) + space
        axes.set_xlim(low, high) if name == "x" else axes.set_ylim(low, high)
    for point in sorted(points, key=lambda p: -(0 if math.isnan(p.millions) else p.millions)):
        _mark(axes, point)
    _label(figure, axes, points)
    _legend(figure)
    return figure


_STYLES: dict[str, dict[str, Any]] = {
    "published": {"facecolor": COLOURS[4], "edgecolor": COLOURS[0], "alpha": 0.55},
    "ours": {"facecolor": COLOURS[1], "edgecolor": "black", "alpha": 0.85},
    "not comparable": {"facecolor": "#dddddd", "edgecolor": COLOURS[1], "linestyle": "--"},
}


def circle_size(millions: float) -> float:
    """Return the square of a circle's diameter in points: its area is in proportion."""
    return SIZE_PER_MILLION * millions


def _mark(axes: Axes, point: Point) -> None:
    place = ([point.structured], [point.semantic])
    style = _STYLES[point.kind]
    # A head without trained parameters has a circle of no area; a cross still shows where it is.
    if math.isnan(point.millions) or circle_size(point.millions) < 4:
        marker = "x" if math.isnan(point.millions) else "+"
        axes.scatter(*place, s=45, marker=marker, color=style["edgecolor"], linewidth=1.6, zorder=3)
    if not math.isnan(point.millions):
        axes.scatter(*place, s=circle_size(point.millions), linewidth=1.1, zorder=2, **style)


def _label(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each label where it covers no mark and no other label, with a line to its point."""
    to_points = 72 / figure.dpi
    centres = [axes.transData.transform((p.structured, p.semantic)) * to_points for p in points]
    radii = [
        4.0 if math.isnan(p.millions) else math.sqrt(circle_size(p.millions)) / 2 for p in points
    ]
    radii = [max(4.0, radius) for radius in radii]
    texts = [_text_of(point) for point in points]
    frame = axes.get_window_extent()
    limits = Box(*(value * to_points for value in frame.extents))
    boxes = place_labels([(float(x), float(y)) for x, y in centres], radii, texts, _SIZE, limits)
    line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#666666", "shrinkA": 1, "shrinkB": 3}
    for i, (point, text, box) in enumerate(zip(points, texts, boxes, strict=True)):
        middle = ((box.left + box.right) / 2 / to_points, (box.bottom + box.top) / 2 / to_points)
        x, y = axes.transData.inverted().transform(middle)
        axes.annotate(
            text,
            (point.structured, point.semantic),
            xytext=(x, y),
            size=_SIZE,
            color="black" if point.kind == "published" else COLOURS[1],
            ha="center",
            va="center",
            zorder=4,
            parse_math=False,
            arrowprops=line if box.distance(*centres[i]) > radii[i] + 8 else None,
        )


def _text_of(point: Point) -> str:
    if point.kind == "published":
        return point.label
    first = f"ours: {point.label}"
    if point.kind == "ours":
        return first
    return f"{first}\n{_why(point)}"  # the caption says what that means


def _legend(figure: Figure) -> None:
    """Draw circles of known area, and one of each style."""
    axes = figure.add_axes((0.80, 0.09, 0.19, 0.87))
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.text(0, 0.97, "trainable\nparameters", size=9, va="top")
    y = 0.84
    for millions in LEGEND_MILLIONS:
        radius = math.sqrt(circle_size(millions)) / 2 / (72 * 6.2 * 0.87)
        y -= radius + 0.012
        axes.scatter(
            [0.26], [y], s=circle_size(millions), facecolor="none", edgecolor="black", linewidth=1
        )
        axes.text(0.58, y, f"{millions} M", size=9, va="center")
        y -= radius + 0.012
    y -= 0.05
    for kind, label in (
        ("published", "published"),
        ("ours", "ours, the\npaper's data"),
        ("not comparable", "ours, not\ncomparable"),
    ):
        axes.scatter([0.26], [y], s=110, linewidth=1.1, **_STYLES[kind])
        axes.text(0.48, y, label, size=9, va="center")
        y -= 0.075
    axes.scatter([0.26], [y], s=45, marker="x", color=COLOURS[0], linewidth=1.6)
    axes.text(0.48, y, "not printed", size=9, va="center")
    axes.scatter([0.26], [y - 0.06], s=45, marker="+", color=COLOURS[1], linewidth=1.6)
    axes.text(0.48, y - 0.06, "below 0.3 M", size=9, va="center")


def table_of(points: Sequence[Point], caption: str, notes: Sequence[str]) -> Table:
    """Return the points with the caption of the figure."""
    columns = (
        Column("kind", "kind"),
        Column("structured", "structured"),
        Column("semantic", "semantic"),
        Column("trainable_millions", "trainable, M", "", "trainable"),
        Column("structured_data", "structured data"),
        Column("semantic_data", "semantic data"),
    )
    rows = tuple(
        Row(
            p.label,
            p.label,
            (
                Cell(text=p.kind),
                Cell(p.structured),
                Cell(p.semantic),
                Cell(None if math.isnan(p.millions) else p.millions),
                Cell(text="; ".join(p.structured_data)),
                Cell(text="; ".join(p.semantic_data)),
            ),
            block="published" if p.kind == "published" else "ours",
        )
        for p in points
    )
    return Table("method", caption, columns, rows, tuple(notes), hole="-")


if __name__ == "__main__":
    main()
