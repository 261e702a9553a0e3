"""Accuracy and time of `noco_cf` against the number of centres.

python -m figures.centres_sweep RUN [RUN ...] --out FILE

Takes runs of `noco_cf` that differ in --method.prototypes: a column for each data set, accuracy
above, and below what a category's fit and the scoring of one of its test images take, the backbone
not included. Numbers are means over categories and seeds; times are those of the machine that made
the runs. Where features are few, stages have fewer centres than asked for. Writes FILE.png,
FILE.pdf, FILE.csv and FILE.md.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.shared.drawing import COLOURS, parser, save_with_table
from figures.shared.option_curves import METRICS, Curve, Sweep, option_value, read_curves
from figures.shared.option_tables import table_of
from figures.shared.own_results import data_of
from utils.cli import exits_cleanly
from utils.runs.run import Run

AXIS = "centres of a stage, at most"
TIMES = {"fit_seconds": "fit, s", "score_seconds": "scoring, ms an image"}
Times = dict[float, dict[str, float]]
"""Number of centres -> column of results.csv -> as it is drawn."""


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    sweep = sweep_of_centres()
    arguments = parser(sweep.module, __doc__).parse_args(argv)
    curves = read_curves(arguments.runs, sweep)
    figure = draw(curves, read_times(arguments.runs, sweep))
    return save_with_table(figure, arguments.out, table_of(curves, sweep))


def sweep_of_centres() -> Sweep:
    """Return what is swept."""
    return Sweep(
        module="figures.centres_sweep",
        option="method.prototypes",
        symbol="centres",
        axis=AXIS,
        scale="log2",
        source="Ours only: no paper has these numbers.",
        family=lambda config: str(config["method_name"]),
    )


def read_times(folders: Sequence[Path], sweep: Sweep) -> dict[str, Times]:
    """Return the mean times of each data set and number of centres."""
    rows: dict[tuple[str, float], list[dict[str, float]]] = {}
    for folder in folders:
        run = Run.read(folder)
        key = (data_of(run.config), option_value(run, sweep))
        rows.setdefault(key, []).extend(
            {
                "fit_seconds": float(row["fit_seconds"]),
                "score_seconds": 1000 * float(row["score_seconds"]) / float(row["num_test"]),
            }
            for row in run.rows()
        )
    found: dict[str, Times] = {}
    for (dataset, centres), times in sorted(rows.items()):
        means = {name: statistics.fmean(time[name] for time in times) for name in TIMES}
        found.setdefault(dataset, {})[centres] = means
    return found


def draw(curves: Sequence[Curve], times: dict[str, Times]) -> Figure:
    """Draw accuracy and times, a column for each data set."""
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    figure = Figure(figsize=(1.2 + 3.4 * len(datasets), 5.4), layout="constrained")
    grid = figure.subplots(2, len(datasets), squeeze=False)
    for column, dataset in enumerate(datasets):
        above, below = grid[:, column]
        above.set_title(dataset, fontsize="small")
        for curve in (c for c in curves if c.dataset == dataset):
            for colour, (metric, label) in zip(COLOURS, METRICS.items(), strict=False):
                means = [point.mean(metric) for point in curve.points]
                if not all(map(math.isnan, means)):
                    name = label if curve.select == "last" else f"{label}, {curve.name}"
                    above.plot([p.value for p in curve.points], means, "o-", color=colour,
                               markersize=4, label=name)  # fmt: skip
        above.set_ylabel("percent")
        for colour, (name, label) in zip(COLOURS[2:], TIMES.items(), strict=False):
            values = times[dataset]
            below.plot(list(values), [value[name] for value in values.values()], "s-",
                       color=colour, markersize=4, label=label)  # fmt: skip
        below.set_ylim(bottom=0)
        below.set_xlabel(AXIS)
        for axes in (above, below):
            _dress(axes, list(times[dataset]))
    return figure


def _dress(axes: Axes, centres: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(centres, [f"{value:g}" for value in centres])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


if __name__ == "__main__":
    main()
