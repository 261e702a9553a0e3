"""Builds the results table: a line per category, then the means, ours beside the papers'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from utils.tables.published import NAMES, NUM_CATEGORIES, published_by_paper, published_values
from utils.runs.files import SELECTS, RunError
from utils.tables.table import Cell, Column, Line, Table

METRIC_LABELS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
}
SELECT_LABELS = {
    "last": "last",
    "best_test": "best on test (optimistic)",
    "synthetic": "synthetic",
}
_PAPERS = {
    "NoCo": "NoCo's are the maximum over repeated evaluations on the test set.",
    "SimpleNet": "SimpleNet's released code keeps the best of its evaluations on the test set.",
}


@dataclass(frozen=True)
class _Average:
    """What one line averages over: the places of its categories (one, unless it is a mean)."""

    key: str
    label: str
    places: list[int]
    is_mean: bool = False
    is_comparable: bool = True  # a paper's number of this name is over the same categories


def build_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    categories: Sequence[str],
    seeds: Sequence[int],
    metrics: Sequence[str],
    dataset: str | None,
    groups: Mapping[str, Sequence[str]] | None = None,
    notes: Sequence[str] = (),
    display: Mapping[str, str] | None = None,
    nan_reasons: Sequence[str] = (),
    method: str = "",
) -> Table:
    """Build the table of a run.

    A number is the mean over seeds in percent, with the sample standard deviation (ddof = 1) when
    there are several. A mean line averages the categories within each seed first: its deviation is
    that of the benchmark's number, not the mean of the categories' deviations. A mean over a
    category whose value is NaN is NaN. Each `select` found in the rows has columns of its own.

    Args:
        rows: As `Run.rows` returns them; metrics are fractions. Other categories and seeds than
            those asked for are left out.
        title: First sentence of the caption, without its full stop.
        categories: The lines, in order.
        seeds: The seeds each number is over.
        metrics: Keys of METRIC_LABELS, in order.
        dataset: Whose published values to show; None for a protocol the papers do not have.
        groups: All categories of each group, as {"mean_textures": [...], "mean_objects": [...]}; a
            group gets a mean line over those of its categories that are in the table.
        notes: Printed below: random weights, skipped images, empty masks.
        display: Printed names of categories, where they differ.
        nan_reasons: Why values are undefined, for the footnote of the dash.
        method: On the command line; what papers print of it stands beside it, a column for each
            paper, since each ran it itself.

    Raises:
        RunError: A (category, seed) has no row, or a metric no column; it names what is missing.
    """
    if unknown := set(metrics) - set(METRIC_LABELS):
        raise ValueError(f"unknown metrics {sorted(unknown)}; there are {list(METRIC_LABELS)}")
    if not (categories and seeds and metrics):
        raise ValueError("a table needs a category, a seed and a metric")
    values = _values(rows, categories, seeds, metrics)
    averages = [
        *(
            _Average(name, (display or {}).get(name, name), [k])
            for k, name in enumerate(categories)
        ),
        *_means(categories, groups or {}, dataset),
    ]
    columns, cells, remarks = [], [], []
    for select in values:
        for metric, array in zip(metrics, values[select], strict=True):
            key, name = f"{select}_{metric}", METRIC_LABELS[metric]
            columns.append(Column(key, SELECT_LABELS[select], name, has_std=len(seeds) > 1))
            cells.append([_cell(array[average.places]) for average in averages])
    for paper in _PAPERS:
        for metric in metrics:
            numbers = [_compared(dataset, average, metric, method, paper) for average in averages]
            if any(cell.mean is not None for cell in numbers):
                name = NAMES[method.rpartition(":")[2]]
                key, group = f"{name}_in_{paper}_paper_{metric}".lower(), f"{name} ({paper} paper)"
                columns.append(Column(key, group, METRIC_LABELS[metric], has_std=False))
                cells.append(numbers)
    for paper, remark in _PAPERS.items():
        for metric in metrics:
            numbers = [_published(dataset, average, metric, paper) for average in averages]
            if any(cell.mean is not None for cell in numbers):
                key, name = f"{paper.lower()}_paper_{metric}", METRIC_LABELS[metric]
                columns.append(Column(key, f"{paper} (paper)", name, has_std=False))
                cells.append(numbers)
                remarks += [remark] if remark not in remarks else []
    lines = [
        Line(average.key, average.label, line, average.is_mean)
        for average, line in zip(averages, zip(*cells, strict=True), strict=True)
    ]
    return Table(
        caption=_caption(title, seeds, averages, remarks),
        header=tuple(columns),
        lines=tuple(lines),
        notes=(*_dash_note(lines, nan_reasons), *_subset_note(dataset, averages, metrics), *notes),
    )


def _values(
    rows: Sequence[Mapping[str, Any]],
    categories: Sequence[str],
    seeds: Sequence[int],
    metrics: Sequence[str],
) -> dict[str, np.ndarray]:
    """Return {select: percent (metrics, categories, seeds)}, or refuse rows with a hole."""
    pairs = [(category, seed) for category in categories for seed in seeds]
    found = {(row["category"], row["seed"], row["select"]): row for row in rows}
    present = {select for category, seed, select in found if (category, seed) in pairs}
    selects = [select for select in SELECTS if select in present] or ["any selection"]
    holes = [
        f"{category} seed {seed} ({select})"
        for category, seed in pairs
        for select in selects
        if (category, seed, select) not in found
    ]
    if holes:
        raise RunError(
            f"no table, since it would have holes; {len(holes)} results are missing: "
            f"{', '.join(holes)}. The same command again computes them"
        )
    used = [found[category, seed, select] for category, seed in pairs for select in selects]
    if absent := [metric for metric in metrics if any(metric not in row for row in used)]:
        raise RunError(f"no table: the results have no column {', '.join(absent)}")
    percent = 100 * np.array([[row[m] for row in used] for m in metrics], dtype=np.float64)
    by_select = rearrange(
        percent, "m (c k s) -> s m c k", c=len(categories), k=len(seeds)
    )  # (selects, metrics, categories, seeds)
    return dict(zip(selects, by_select, strict=True))


def _means(
    categories: Sequence[str], groups: Mapping[str, Sequence[str]], dataset: str | None
) -> list[_Average]:
    means = []
    for key, members in groups.items():
        places = [place for place, category in enumerate(categories) if category in members]
        label, is_whole = key.replace("_", " "), len(places) == len(members)
        if not is_whole:
            label += f" ({len(places)} of {len(members)})"
        if places:
            means.append(_Average(key, label, places, is_mean=True, is_comparable=is_whole))
    if len(categories) > 1:
        is_whole = NUM_CATEGORIES.get(dataset or "") == len(categories)
        places = list(range(len(categories)))
        means.append(_Average("mean", "mean", places, is_mean=True, is_comparable=is_whole))
    return means


def _cell(values: np.ndarray) -> Cell:
    """Return the cell of the percentages (categories, seeds) of one line."""
    per_seed = values.mean(axis=0)  # (seeds,)
    std = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None
    return Cell(float(per_seed.mean()), std)


def _published(dataset: str | None, average: _Average, metric: str, method: str) -> Cell:
    if dataset is None or not average.is_comparable:
        return Cell(None)
    return Cell(published_values(dataset, average.key, metric, [method]).get(method))


def _compared(dataset: str | None, average: _Average, metric: str, method: str, paper: str) -> Cell:
    if dataset is None or not average.is_comparable:
        return Cell(None)
    return Cell(published_by_paper(dataset, average.key, metric, method).get(paper))


def _caption(
    title: str, seeds: Sequence[int], averages: Sequence[_Average], remarks: Sequence[str]
) -> str:
    if len(seeds) == 1:
        sentences = [f"{title}.", f"Percent; a single run (n = 1, seed {seeds[0]})."]
    else:
        listed = ", ".join(map(str, seeds))
        sentences = [
            f"{title}.",
            f"Percent; mean ± sample standard deviation over n = {len(seeds)} seeds ({listed}).",
        ]
        if averages[-1].is_mean:
            sentences.append("Mean lines average the categories within each seed first.")
    if remarks:
        sentences += ["(paper): as published.", *remarks]
    return " ".join(sentences)


def _dash_note(lines: Sequence[Line], reasons: Sequence[str]) -> list[str]:
    cells = [str(cell) for line in lines for cell in line.cells]
    if "–" not in cells:
        return []
    return [f"–: undefined ({'; '.join(dict.fromkeys(reasons)) or 'NaN, no reason was given'})."]


def _subset_note(
    dataset: str | None, averages: Sequence[_Average], metrics: Sequence[str]
) -> list[str]:
    """Say why a published mean is missing beside ours."""
    left_out = [
        average.label
        for average in averages
        if dataset is not None
        and not average.is_comparable
        and any(published_values(dataset, average.key, metric) for metric in metrics)
    ]
    if not left_out:
        return []
    return [
        f"The papers' {', '.join(left_out)}: left out, being over other categories than this table."
    ]
