"""What `--select synthetic` saw: the AUROC on synthetic anomalies over time or epochs.

python -m figures.selection_curve RUN --out FILE

A panel for each category (of the first seed), a colour for each point of the grid; the star is what
was chosen. Runs with --monitor-test also show the test set, dashed: it was looked at afterwards and
chose nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.shared.drawing import COLOURS, grid_rows, parser, save_figure
from figures.shared.run_log import LoggedRun, read_runs
from utils.cli import exits_cleanly
from utils.errors import RunError

TEST_STYLES = {"test_image_auroc": (0, (5, 2)), "test_pixel_auroc": (0, (2, 2))}
AFTERWARDS = "test (shown afterwards, chose nothing)"
GRID_COLOURS = (*COLOURS, "0.2", "0.6")


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    arguments = parser("figures.selection_curve", __doc__).parse_args(argv)
    paths = save_figure(draw(read_runs(arguments.runs)), arguments.out)
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return paths


def draw(runs: Sequence[LoggedRun]) -> Figure:
    """Draw a row of panels for each run.

    Raises:
        RunError: a run selected nothing on synthetic anomalies, or its grid has too many points.
    """
    selections = [_selections(run) for run in runs]
    rows, columns, places = grid_rows([list(selection) for selection in selections])
    width = max(0.8 + 3.0 * columns, 7.0)
    figure = Figure(figsize=(width, 1.4 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    entries: dict[str, Any] = {}
    for run, selection, group in zip(runs, selections, places, strict=True):
        for (category, records), place in zip(selection.items(), group, strict=True):
            axes = grid[place]
            axes.set_visible(True)
            _draw_panel(axes, records, _chosen(run, category))
            axes.set_title(f"{category}\n{run.label}", fontsize="small")
            if place[1] == 0:
                axes.set_ylabel("AUROC, %")
            handles, labels = axes.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize="small",
    )
    return figure


def _selections(run: LoggedRun) -> dict[str, list[dict[str, Any]]]:
    """Return the records of the selection by category, of the first seed that logged one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for (category, _), records in sorted(run.of_event("selection").items(), key=lambda p: p[0][1]):
        found.setdefault(category, records)
    if not found:
        raise RunError(
            f"{run.run.folder}: nothing was selected; was it run with --select synthetic?"
        )
    for category, records in found.items():
        count = len({_name(record["options"]) for record in records})
        if count > len(GRID_COLOURS):
            raise RunError(
                f"{run.run.folder}: the grid of {category} has {count} points; "
                f"at most {len(GRID_COLOURS)} can be told apart"
            )
    return found


def _chosen(run: LoggedRun, category: str) -> dict[str, Any] | None:
    """Return the record of what was chosen; None while the run is still selecting."""
    pairs = [pair for pair in run.of_event("chosen") if pair[0] == category]
    return run.of_event("chosen")[min(pairs)][-1] if pairs else None


def _draw_panel(
    axes: Axes, records: Sequence[dict[str, Any]], chosen: dict[str, Any] | None
) -> None:
    fits: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        fits.setdefault(_name(record["options"]), []).append(record)
    unit = "time" if "time" in records[0] else "step"
    for colour, (name, fit) in zip(GRID_COLOURS, fits.items(), strict=False):
        places = [record[unit] for record in fit]
        values = [100 * float(record["synthetic_auroc"]) for record in fit]
        label = f"synthetic anomalies{name and f', {name}'}"
        axes.plot(places, values, "o-", markersize=3, color=colour, label=label)
        for key, dashes in TEST_STYLES.items():
            # A metric that is undefined is logged as null.
            test = [np.nan if record.get(key) is None else 100 * record[key] for record in fit]
            if np.isfinite(test).any():
                label = f"{key.split('_')[1]} AUROC, {AFTERWARDS}{name and f', {name}'}"
                axes.plot(places, test, color=colour, linestyle=dashes, label=label)
        for place, value, record in zip(places, values, fit, strict=True):
            if chosen is not None and _is_choice(record, chosen):
                (star,) = axes.plot([place], [value], "*", color=colour, markersize=14, zorder=3)
                star.set(markeredgecolor="black", label="chosen")
    if unit == "time":
        axes.set_xscale("log")
    axes.set_xlabel("time t" if unit == "time" else "epoch")
    axes.spines[["top", "right"]].set_visible(False)


def _is_choice(record: dict[str, Any], chosen: dict[str, Any]) -> bool:
    """Say whether a step is the one whose options were chosen."""
    step = {"time": [record["time"]]} if "time" in record else {"epochs": record["step"]}
    return bool(record["options"] | step == chosen["options"])


def _name(options: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in options.items())


if __name__ == "__main__":
    main()
