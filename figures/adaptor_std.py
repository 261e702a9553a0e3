"""Standard deviation of each channel before and after the adaptor (SimpleNet, Fig. 4).

python -m figures.adaptor_std RUN [RUN ...] --out FILE

A panel for each run and category; over all training positions, the seeds pooled. "After" is what
the discriminator sees: for nc_disc the adapted feature on its sphere.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from figures.shared.drawing import COLOURS, grid_rows, parser, save_figure
from figures.shared.run_log import LoggedRun, Pair, read_runs
from utils.cli import exits_cleanly
from utils.errors import RunError

SIDES = {"feature_std": "before the adaptor", "adapted_std": "after the adaptor"}
_NUM_BINS = 60

Spread = dict[str, np.ndarray]


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    arguments = parser("figures.adaptor_std", __doc__).parse_args(argv)
    paths = save_figure(draw(read_runs(arguments.runs)), arguments.out)
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return paths


def draw(runs: Sequence[LoggedRun]) -> Figure:
    """Draw the two histograms of each run and category.

    Raises:
        RunError: a run's method has no adaptor to tell of.
    """
    spreads = [spreads_of(run) for run in runs]
    rows, columns, places = grid_rows([list(spread) for spread in spreads])
    figure = Figure(figsize=(0.6 + 3.1 * columns, 0.9 + 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    bins = _shared_bins(spreads)
    for axes in grid.flat:
        axes.set_visible(False)
    for run, spread, group in zip(runs, spreads, places, strict=True):
        for (category, values), place in zip(spread.items(), group, strict=True):
            grid[place].set_visible(True)
            _draw_panel(grid[place], values, bins)
            grid[place].set_title(f"{category}\n{run.label}", fontsize="small")
            if place[1] == 0:
                grid[place].set_ylabel("share of channels, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    names = [label.partition(":")[0] for label in labels]
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return figure


def spreads_of(run: LoggedRun) -> dict[str, Spread]:
    """Return both standard deviations (channels of all seeds,) of each category.

    Raises:
        RunError: the run logged none.
    """
    found: dict[str, dict[str, list[float]]] = {}
    by_pair: dict[Pair, list] = run.of_event("diagnostics")
    for (category, _), records in by_pair.items():
        if all(side in records[-1] for side in SIDES):
            pooled = found.setdefault(category, {side: [] for side in SIDES})
            for side in SIDES:
                pooled[side] += records[-1][side]
    if not found:
        raise RunError(
            f"{run.run.folder}: no standard deviations were logged; simplenet and nc_disc do so at "
            "the end of a fit"
        )
    return {
        category: {side: np.asarray(values, dtype=np.float64) for side, values in sides.items()}
        for category, sides in found.items()
    }


def _shared_bins(spreads: Sequence[dict[str, Spread]]) -> np.ndarray:
    """Return bin edges over everything that is drawn, evenly spaced in the logarithm."""
    every = np.concatenate([v for run in spreads for sides in run.values() for v in sides.values()])
    positive = every[every > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.5, 2.0)
    return np.geomspace(low / 1.05, high * 1.05, _NUM_BINS + 1)


def _draw_panel(axes: Axes, spread: Spread, bins: np.ndarray) -> None:
    """Draw both histograms; each sums to 100 %."""
    medians = []
    for (side, values), colour in zip(spread.items(), COLOURS, strict=False):
        axes.hist(
            values.clip(min=bins[0]),  # a channel that never varies falls into the lowest bin
            bins=bins.tolist(),
            weights=np.full(len(values), 100 / len(values)),
            histtype="stepfilled",
            facecolor=(colour, 0.4),
            edgecolor=colour,
            label=SIDES[side],
        )
        medians.append(f"{SIDES[side].split()[0]} {np.median(values):.3g}")
    axes.set_xscale("log")
    wide = bins[-1] > 100 * bins[0]
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelbottom=True)
    axes.set_xlabel(
        f"standard deviation of a channel\nmedian: {', '.join(medians)}", fontsize="small"
    )
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
