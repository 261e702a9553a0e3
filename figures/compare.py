"""Methods against one another: a table, and accuracy against the time a fit takes.

python -m figures.compare RUN [RUN ...] --out FILE

Writes FILE.md, FILE.csv, FILE.png, FILE.pdf, and FILE.html, a page of its own with the table, mean
ranks over the data sets (which of them Nemenyi's test tells apart), and bars for each set. Where
two methods share two data sets or more, FILE_ranks_METRIC.md has methods by data sets. Numbers
are means over categories, with the standard deviation over seeds where there are several; what a
paper prints of a method stands beside them where the run is comparable. "fit" is the time from
stored features (or stored images, for methods that train a network) to a fitted head, the mean of a
category; "images/s" are test images from file to anomaly map, the backbone included; "memory" is
the most that tensors took on a GPU, and without one the most memory of the process; "head" is what
has to be stored beside the backbone. Times and memory are those of the machines the runs were made
on: compare runs of one machine.
"""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.shared import costs
from figures.shared.compare_page import write_page
from figures.shared.costs import Costs
from figures.shared.drawing import COLOURS, MARKERS, parser, save_with_table
from figures.shared.run_log import (
    LoggedRun,
    beside_the_method,
    check_named_once,
    read_named_run,
    read_runs,
)
from figures.shared.same_images import group_by_images
from utils.cli import exits_cleanly
from utils.errors import RunError
from utils.metrics.metrics import heading_of, is_of_all_data, metric_names
from utils.runs.files import corrupt
from utils.runs.run import Run
from utils.tables.results import SELECT_LABELS
from utils.tables.table import Cell, Column, Row, Table

CAPTION = "Metrics in percent: means over categories, ± sample standard deviation over seeds."
RANKED_BY = ("image_auroc", "pixel_auroc", "aupro")
PANELS_ACROSS = 3
NOT_IN_LINE = (
    *("image_ap", "image_f1_max", "pixel_ap", "pixel_f1_max"),
    *("spro_0.01", "spro_0.1", "spro_0.3"),
)
"""Metrics that a comparison does not show."""


@dataclass(frozen=True)
class Line:
    """A method in the comparison.

    Attributes:
        dataset: what the images of the run are called.
        label: method, and what sets it apart from other runs of it.
        select: how the epoch was chosen.
        metrics: name -> mean over categories for each seed, in percent; nan where undefined.
        costs: time and memory.
        num_seeds: seeds the means are over.
        published: image AUROC that is printed of it, in percent; nan where none is comparable.
    """

    dataset: str
    label: str
    select: str
    metrics: dict[str, list[float]]
    costs: Costs
    num_seeds: int
    published: float = math.nan


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Compare the runs named on the command line; return the files written."""
    options = parser("figures.compare", __doc__)
    options.add_argument(
        "--metric", choices=shown_metrics(), default="image_auroc", help="drawn upwards"
    )
    arguments = options.parse_args(argv)
    by_data = read_runs_by_data(arguments.runs)
    lines = [line for name, runs in by_data.items() for run in runs for line in lines_of(run, name)]
    table, figure = table_of(lines), draw(lines, metric=arguments.metric)
    paths = save_with_table(figure, arguments.out, table)
    page = paths[0].with_suffix(".html")
    values = {metric: values_of(lines, metric) for metric in RANKED_BY}
    pages = write_page(page, table, values, figure)
    sys.stdout.write("".join(f"{path}\n" for path in pages))
    return [*paths, *pages]


def values_of(lines: Sequence[Line], metric: str) -> dict[str, dict[str, list[float]]]:
    """Return data set -> method -> the metric of each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, line in zip(names_of(lines), lines, strict=True):
        found.setdefault(line.dataset, {})[name] = line.metrics[metric]
    return found


def names_of(lines: Sequence[Line]) -> list[str]:
    """Return what each line is called: its label, with the selection where runs report several.

    A method that selects in another way on other data is one method still.
    """
    times = Counter((line.dataset, line.label) for line in lines)
    several = {label for (_, label), count in times.items() if count > 1}
    return [
        f"{line.label}, {SELECT_LABELS[line.select]}"
        if line.label in several and line.select != "last"
        else line.label
        for line in lines
    ]


def published_of(run: LoggedRun) -> float:
    """Return what a paper prints of the run's own method on all its data; nan where none does.

    The run's table has it where the numbers are comparable: all categories, the same protocol.
    Where several papers ran the method, it is the mean of theirs.
    """
    path = run.run.folder / "table.json"
    if not path.is_file():
        return math.nan
    try:
        table = Table.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise corrupt(path, str(error)) from error
    printed = [
        row.cells[place].mean
        for row in table.rows
        if row.key == "mean"
        for place, column in enumerate(table.columns)
        if column.metric == "image_auroc" and column.is_own
    ]
    known = [value for value in printed if value is not None]
    return statistics.fmean(known) if known else math.nan


def shown_metrics() -> tuple[str, ...]:
    """Return the metrics of a line, in order."""
    return tuple(name for name in metric_names() if name not in NOT_IN_LINE)


def read_runs_by_data(folders: Sequence[Path]) -> dict[str, list[LoggedRun]]:
    """Read runs, by the images they are on.

    Labels tell those on one set of images apart, by what changes the method.

    Raises:
        RunError: one is no run folder, is named twice, or a file of it is corrupt.
    """
    check_named_once(folders)
    return {
        group.name: read_runs([run.folder for run in group.runs], same_but=beside_the_method())
        for group in group_by_images([read_named_run(folder) for folder in folders])
    }


def lines_of(run: LoggedRun, dataset: str) -> list[Line]:
    """Return a line for each way of selecting that a run reports.

    Args:
        run: finished.
        dataset: what its images are called.

    Raises:
        RunError: the run has no finished category, or not the same ones for each seed.
    """
    rows = run.run.rows()
    if not rows:
        raise RunError(f"{run.run.folder}: no category is finished")
    return [
        _line(run, dataset, select, [row for row in rows if row["select"] == select])
        for select in dict.fromkeys(row["select"] for row in rows)
    ]


def _line(run: LoggedRun, dataset: str, select: str, rows: Sequence[dict[str, Any]]) -> Line:
    seeds = sorted({row["seed"] for row in rows})
    categories = {seed: {r["category"] for r in rows if r["seed"] == seed} for seed in seeds}
    if len({frozenset(names) for names in categories.values()}) > 1:
        raise RunError(f"{run.run.folder}: the seeds have different categories; finish the run")
    _check_numbers(run.run, rows)
    metrics = {
        name: [
            100 * statistics.fmean(float(r.get(name, math.nan)) for r in rows if r["seed"] == seed)
            for seed in seeds
        ]
        for name in shown_metrics()
    }
    return Line(
        dataset,
        run.label,
        select,
        metrics,
        costs.costs_of(rows),
        len(seeds),
        published_of(run),
    )


def _check_numbers(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse a results.csv, which anyone may have written, without the numbers needed here."""
    optional = {"score_seconds", "pass_test_seconds", "head_bytes", "peak_bytes", "num_test"}
    optional |= {name for name in shown_metrics() if not is_of_all_data(name)}
    needed = [name for name in shown_metrics() if name not in optional]
    for row in rows:
        for name in (*needed, "fit_seconds", *(optional & set(row))):
            value = row.get(name)
            if not isinstance(value, int | float) or math.isinf(value):
                what = f"{row['category']}, seed {row['seed']}: {name} is {value!r}"
                raise corrupt(run.folder / "results.csv", what)


def draw(lines: Sequence[Line], *, metric: str) -> Figure:
    """Draw accuracy against fit time, a panel for each data set, a mark for each line."""
    datasets = list(dict.fromkeys(line.dataset for line in lines))
    called = names_of(lines)
    names = list(dict.fromkeys(called))  # a mark means the same everywhere
    across = min(len(datasets), PANELS_ACROSS)
    down = -(-len(datasets) // across)
    # The legend, with a line for each method, stands beside all panels.
    height = max(0.6 + 4.0 * down, 0.6 + 0.2 * len(names))
    figure = Figure(figsize=(2.5 + 4.2 * across, height), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    marks: dict[str, Any] = {}
    for axes, dataset in zip(grid.flat, datasets, strict=False):
        for name, line in zip(called, lines, strict=True):
            mean = statistics.fmean(line.metrics[metric])
            if line.dataset != dataset or math.isnan(mean):
                continue
            number = names.index(name)
            marks[name] = axes.errorbar(
                max(line.costs.fit_seconds, 1e-3), mean, yerr=_std(line.metrics[metric]),
                marker=MARKERS[number // len(COLOURS) % len(MARKERS)], markersize=8,
                color=COLOURS[number % len(COLOURS)], linestyle="none", markeredgecolor="black",
                markeredgewidth=0.6, capsize=2,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("fit, seconds (after the images are read)")
        axes.set_ylabel(f"{heading_of(metric)}, %")
        axes.set_title(dataset)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(datasets) :]:
        axes.remove()
    if marks:
        shown = [name for name in names if name in marks]
        figure.legend(
            [marks[name] for name in shown], shown,
            loc="outside right upper", frameon=False, fontsize="small",
        )  # fmt: skip
    return figure


def table_of(lines: Sequence[Line]) -> Table:
    """Return the table, the best image AUROC of a data set first.

    Metrics that only some data sets have are left out where no line has one.
    """
    shown = [
        name
        for name in shown_metrics()
        if is_of_all_data(name)
        or any(not math.isnan(seed) for line in lines for seed in line.metrics[name])
    ]
    has_published = any(not math.isnan(line.published) for line in lines)
    columns = (
        Column("method", "method"),
        Column("select", "selection"),
        *(Column(name, heading_of(name), "", name) for name in shown),
        *([Column("published", "published image AUROC")] if has_published else []),
        *costs.columns(),
        Column("num_seeds", "seeds", digits="d"),
    )
    rows = [
        Row(
            line.dataset,
            line.dataset,
            (
                Cell(text=line.label),
                Cell(text=SELECT_LABELS[line.select]),
                *(
                    Cell(statistics.fmean(seeds), _std(seeds) if len(seeds) > 1 else None)
                    for seeds in (line.metrics[name] for name in shown)
                ),
                *([Cell(line.published)] if has_published else []),
                *costs.cells(line.costs),
                Cell(line.num_seeds),
            ),
            block=line.dataset,
        )
        for line in sorted(lines, key=_rank)
    ]
    return Table("data set", CAPTION, columns, tuple(rows))


def _rank(line: Line) -> tuple[str, float]:
    return line.dataset, -statistics.fmean(line.metrics["image_auroc"])


def _std(seeds: Sequence[float]) -> float:
    return float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0  # nan stays nan


if __name__ == "__main__":
    main()
