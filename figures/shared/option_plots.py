"""The figure of a swept option and what is written beside it."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from figures.shared.drawing import COLOURS, MARKERS, parser, save_with_table
from figures.shared.option_curves import METRICS, Curve, Sweep, read_curves
from figures.shared.option_tables import table_of
from utils.errors import RunError
from utils.tables.results import SELECT_LABELS

SELECT_STYLES: dict[str, Literal["-", "--", ":"]] = {
    "last": "-",
    "synthetic": "--",
    "best_test": ":",
}
_MAX_TICKS = 9
_NARROW = 36  # letters of a label that leave room for a second column in the legend


def make(sweep: Sweep, argv: Sequence[str] | None, description: str | None) -> list[Path]:
    """Make the figure and the tables of the runs on the command line; return the files written."""
    arguments = parser(sweep.module, description).parse_args(argv)
    curves = read_curves(arguments.runs, sweep)
    return save_with_table(draw(curves, sweep), arguments.out, table_of(curves, sweep))


def draw(curves: Sequence[Curve], sweep: Sweep) -> Figure:
    """Draw a column for each data set and a row for each metric that is defined somewhere."""
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    labels = list(dict.fromkeys(curve.label for curve in curves))
    selects = [s for s in SELECT_STYLES if any(curve.select == s for curve in curves)]
    metrics = [m for m in METRICS if any(_drawn(curve, m) for curve in curves)]
    if not metrics:
        raise RunError("image AUROC is undefined in every run: nothing can be drawn")
    size = (
        1.2 + 3.9 * len(datasets),
        0.9 + 2.9 * len(metrics) + 0.25 * max(len(labels), len(selects)),
    )
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(metrics), len(datasets), squeeze=False)
    for row, metric in enumerate(metrics):
        for axes, dataset in zip(grid[row], datasets, strict=True):
            shown = [c for c in curves if c.dataset == dataset and _drawn(c, metric)]
            if not shown:  # a semantic data set beside a structured one
                axes.set_visible(False)
                continue
            for curve in shown:
                _draw_curve(axes, curve, metric, labels.index(curve.label))
            _dress(axes, sweep, shown)
            unlike = f"\n{fill(shown[0].unlike, 58)}" if shown[0].unlike and row == 0 else ""
            axes.set_title(f"{dataset} ({_over(shown[0])}){unlike}", fontsize="small")
            axes.set_ylabel(f"{METRICS[metric]}, %")
    curve_keys = [
        Line2D([], [], color=_colour(i), marker=_marker(i), label=label)
        for i, label in enumerate(labels)
    ]
    select_keys = [
        Line2D([], [], color="0.3", linestyle=SELECT_STYLES[s], label=SELECT_LABELS[s])
        for s in selects
    ]
    narrow = all(len(str(key.get_label())) <= _NARROW for key in curve_keys)
    # A legend fills column by column: blanks keep curves in one and ways of selecting in the other.
    blanks = len(select_keys) - len(curve_keys) if narrow else 0
    curve_keys += [Line2D([], [], linestyle="none", label=" ") for _ in range(blanks)]
    figure.legend(
        handles=[*curve_keys, *select_keys],
        loc="outside lower center",
        frameon=False,
        fontsize="small",
        ncols=2 if narrow else 1,
    )
    return figure


def _drawn(curve: Curve, metric: str) -> bool:
    return any(not math.isnan(point.mean(metric)) for point in curve.points)


def _over(curve: Curve) -> str:
    categories = sorted(curve.points[0].categories)
    return categories[0] if len(categories) == 1 else f"mean of {len(categories)}"


def _draw_curve(axes: Axes, curve: Curve, metric: str, number: int) -> None:
    values = [point.value for point in curve.points]
    means = np.array([point.mean(metric) for point in curve.points])
    spread = np.nan_to_num([point.std(metric) for point in curve.points])
    axes.plot(
        values, means, color=_colour(number), marker=_marker(number), markersize=4.5,
        linewidth=1.4, linestyle=SELECT_STYLES[curve.select],
    )  # fmt: skip
    axes.fill_between(
        values, means - spread, means + spread, color=_colour(number), alpha=0.1, linewidth=0
    )


def _dress(axes: Axes, sweep: Sweep, curves: Sequence[Curve]) -> None:
    values = sorted({point.value for curve in curves for point in curve.points})
    if sweep.scale != "linear":
        axes.set_xscale("log", base=int(sweep.scale.removeprefix("log")))
    shown = values[:: -(-len(values) // _MAX_TICKS)]
    axes.set_xticks(shown, [f"{value:g}" for value in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(sweep.axis)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _marker(number: int) -> str:
    return MARKERS[number // len(COLOURS) % len(MARKERS)]
