"""AUROC on the test set after every epoch, for every seed, and what each way of selecting takes.

python -m figures.instability RUN [RUN ...] --out FILE

Needs runs made with --monitor-test (or --select best_test). A circle marks the last epoch, a square
the head that --select synthetic chose, and a star the best epoch on the test set, which is
optimistic: no one can choose it without the test labels.

Runs that differ only in --select are drawn as one: the curve comes from the fit on all normals, the
square from the run that selected. Of a run that selected and stands alone the curve is that of its
selection, whose fit saw the normals that were not held out.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.shared.drawing import grid_rows, parser, save_figure, style
from figures.shared.run_log import Curve, LoggedRun, Pair, options_without_effect, read_runs
from utils.cli import exits_cleanly
from utils.errors import RunError

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}
MARKS = {"last": "o", "synthetic": "s", "best on test (optimistic)": "*"}
_SIZES = {"o": 6.0, "s": 6.0, "*": 11.0}


@dataclass(frozen=True)
class Fits:
    """The fits of one configuration, joined from all its runs.

    Attributes:
        label: what sets it apart.
        curves: steps and metric, by category and seed.
        synthetic: step and metric of the head that synthetic selection gave.
        held_out: whether the fits of the curves saw only the normals not held out.
    """

    label: str
    curves: dict[Pair, Curve]
    synthetic: dict[Pair, tuple[int, float]]
    held_out: bool


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    options = parser("figures.instability", __doc__)
    options.add_argument("--metric", choices=METRICS, default="image_auroc")
    arguments = options.parse_args(argv)
    figure = draw(
        read_runs(arguments.runs, same_but=(options_without_effect() | {"select"}) - {"data_root"}),
        metric=arguments.metric,
    )
    paths = save_figure(figure, arguments.out)
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return paths


def draw(runs: Sequence[LoggedRun], *, metric: str = "image_auroc") -> Figure:
    """Draw a panel for each configuration and category, with a line for each seed.

    Raises:
        RunError: the metric was not logged after the epochs of a run.
    """
    configurations = joined(runs, metric)
    panels = [list(dict.fromkeys(category for category, _ in c.curves)) for c in configurations]
    seeds = sorted({seed for c in configurations for _, seed in c.curves})
    rows, columns, places = grid_rows(panels)
    figure = Figure(figsize=(0.9 + 2.9 * columns, 1.1 + 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    for fits, names, group in zip(configurations, panels, places, strict=True):
        for category, place in zip(names, group, strict=True):
            grid[place].set_visible(True)
            _draw_panel(grid[place], fits, category, seeds)
            grid[place].tick_params(labelleft=True)
            if place[1] == 0:
                grid[place].set_ylabel(f"{METRICS[metric]}, %")
    figure.legend(
        handles=_legend(seeds, any(fits.synthetic for fits in configurations)),
        loc="outside lower center",
        ncols=min(4, 2 * columns),  # a legend wider than the panels would be cut
        frameon=False,
        fontsize="small",
    )
    return figure


def joined(runs: Sequence[LoggedRun], metric: str) -> list[Fits]:
    """Join runs that share a label.

    Raises:
        RunError: no run of a label logged the metric after its epochs.
    """
    by_label: dict[str, list[LoggedRun]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    return [_join(label, group, metric) for label, group in by_label.items()]


def _join(label: str, runs: Sequence[LoggedRun], metric: str) -> Fits:
    synthetic = {
        (row["category"], row["seed"]): (int(row["step"]), float(row[metric]))
        for run in runs
        for row in run.run.rows()
        if row["select"] == "synthetic"
    }
    # The fit after a selection ends at the chosen epoch: its steps know neither last nor best.
    whole = [run for run in runs if run.run.config.get("select") != "synthetic"]
    curves: dict[Pair, Curve] = {}
    for run in whole or runs:
        found = run.curves(metric) if whole else run.selection_curves(f"test_{metric}")
        curves |= found
    if not curves:
        raise RunError(
            f"{runs[0].run.folder}: {metric} was not logged after each epoch; make the run with "
            "--monitor-test"
        )
    return Fits(label, curves, synthetic, held_out=not whole)


def _draw_panel(axes: Axes, fits: Fits, category: str, seeds: Sequence[int]) -> None:
    """Draw the lines and marks of one category, and name what each selection gives on average."""
    taken: dict[str, list[float]] = {mark: [] for mark in MARKS}
    for number, seed in enumerate(seeds):
        pair = (category, seed)
        if pair not in fits.curves:
            continue
        steps, values = fits.curves[pair]
        axes.plot(steps, [100 * v for v in values], **style(number), linewidth=1.0, alpha=0.8)
        best = int(np.argmax(values))
        marked = {  # the largest mark first: a smaller one on top of it stays visible
            "best on test (optimistic)": (steps[best], values[best]),
            "last": (steps[-1], values[-1]),
        }
        if pair in fits.synthetic:
            marked["synthetic"] = fits.synthetic[pair]
        for mark, (step, value) in marked.items():
            taken[mark].append(100 * value)
            axes.plot(
                step, 100 * value, linestyle="none", marker=MARKS[mark], zorder=3, clip_on=False,
                markersize=_SIZES[MARKS[mark]], markerfacecolor=style(number)["color"],
                markeredgecolor="black", markeredgewidth=0.7,
            )  # fmt: skip
    means = [f"{mark.split()[0]} {np.mean(v):.1f}" for mark, v in taken.items() if v]
    held_out = " (curves: some normals held out)" if fits.held_out else ""
    axes.set_title(f"{category}\n{fits.label}", fontsize="small")
    axes.set_xlabel(f"epoch{held_out}\nmean: {', '.join(means)}", fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(seeds: Sequence[int], with_synthetic: bool) -> list[Line2D]:
    marks = [
        Line2D([], [], linestyle="none", marker=marker, color="0.3", label=name,
               markersize=_SIZES[marker])
        for name, marker in MARKS.items()
        if with_synthetic or name != "synthetic"
    ]  # fmt: skip
    return [*(Line2D([], [], label=f"seed {s}", **style(i)) for i, s in enumerate(seeds)), *marks]


if __name__ == "__main__":
    main()
