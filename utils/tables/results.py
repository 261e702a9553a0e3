"""Builds the results table: a line per category, then the means, ours beside the papers'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from einops import rearrange

from utils.errors import RunError
from utils.metrics.metrics import heading_of, metric_names
from utils.runs.files import SELECTS
from utils.tables.published import published_by_paper, published_values
from utils.tables.table import Cell, Column, Row, Table

SELECT_LABELS = {"last": "last", "best_test": "best on test (optimistic)", "synthetic": "synthetic"}
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


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a table is about.

    Attributes:
        title: First sentence of the caption, without its full stop.
        categories: The lines, in order.
        seeds: The seeds each number is over.
        metrics: Names of metrics, in order.
        labels: Printed names of categories, where they differ.
        groups: All categories of each group, as {"mean_textures": [...], "mean_objects": [...]}; a
            group gets a mean line over those of its categories that are in the table.
        dataset: Whose published values to show; None for a protocol the papers do not have.
        num_categories: Of the data set: a published mean is over all of them.
        published_as: The method in figures/published.csv; what papers print of it stands beside it,
            a column for each paper, since each ran it itself. "" where none does.
        is_joint: One head is for all categories: only numbers published for such are compared,
            those of "METHOD (multi-class)".
    """

    title: str
    categories: Sequence[str]
    seeds: Sequence[int]
    metrics: Sequence[str]
    labels: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dataset: str | None = None
    num_categories: int = 0
    published_as: str = ""
    is_joint: bool = False

    def printed(self, method: str) -> str:
        """Return what figures/published.csv calls a method under this protocol."""
        return f"{method} (multi-class)" if method and self.is_joint else method

    def __post_init__(self) -> None:
        if not (self.categories and self.seeds and self.metrics):
            raise ValueError("a table needs a category, a seed and a metric")
        if unknown := sorted(set(self.metrics) - set(metric_names())):
            raise ValueError(f"unknown metrics {', '.join(unknown)}")


def build_table(
    rows: Sequence[Mapping[str, Any]],
    about: Benchmark,
    *,
    notes: Sequence[str] = (),
    nan_reasons: Sequence[str] = (),
) -> Table:
    """Build the table of a run.

    A number is the mean over seeds in percent, with the sample standard deviation (ddof = 1) when
    there are several. A mean line averages the categories within each seed first: its deviation is
    that of the benchmark's number, not the mean of the categories' deviations. A mean over a
    category whose value is NaN is NaN. Each `select` found in the rows has columns of its own.

    Args:
        rows: As `Run.rows` returns them; metrics are fractions. Other categories and seeds than
            those asked for are left out.
        about: What the table is about.
        notes: Printed below: random weights, skipped images, empty masks.
        nan_reasons: Why values are undefined, for the footnote of the dash.

    Raises:
        RunError: A (category, seed) has no row, or a metric no column; it names what is missing.
    """
    values = _values(rows, about)
    averages = [
        *(
            _Average(name, about.labels.get(name, name), [k])
            for k, name in enumerate(about.categories)
        ),
        *_means(about),
    ]
    columns, cells, remarks = [], [], []
    for select in values:
        for metric, array in zip(about.metrics, values[select], strict=True):
            key, group = f"{select}_{metric}", SELECT_LABELS[select]
            columns.append(Column(key, heading_of(metric), group, metric))
            cells.append([_cell(array[average.places]) for average in averages])
    # The two papers whose method this is have columns of their own.
    compared = about.printed(about.published_as) if about.published_as not in _PAPERS else ""
    for paper in _papers_with(compared, about, averages) if compared else ():
        said = f"{paper} paper" if paper in _PAPERS else paper
        for metric in about.metrics:
            numbers = [_compared(about, average, metric, paper) for average in averages]
            if any(cell.mean is not None for cell in numbers):
                key, group = f"{compared} in {said} {metric}", f"{compared} ({said})"
                key = key.lower().replace(" ", "_")
                columns.append(Column(key, heading_of(metric), group, metric, is_own=True))
                cells.append(numbers)
    for paper, remark in _PAPERS.items():
        for metric in about.metrics:
            numbers = [_published(about, average, metric, paper) for average in averages]
            if any(cell.mean is not None for cell in numbers):
                name = about.printed(paper)
                key, group = f"{paper.lower()}_paper_{metric}", f"{name} (paper)"
                is_own = paper == about.published_as
                columns.append(Column(key, heading_of(metric), group, metric, is_own=is_own))
                cells.append(numbers)
                remarks += [remark] if remark not in remarks else []
    lines = tuple(
        Row(average.key, average.label, line, block="means" if average.is_mean else "")
        for average, line in zip(averages, zip(*cells, strict=True), strict=True)
    )
    table = Table("category", _caption(about, averages, remarks), tuple(columns), lines)
    below = (*_dash_note(table, nan_reasons), *_subset_note(about, averages), *notes)
    return replace(table, notes=below)


def row_notes(rows: Sequence[Mapping[str, Any]], *, shared_images: bool = False) -> list[str]:
    """Say what the numbers leave out: images unreadable or unused, defects no map can find.

    Args:
        rows: of a run.
        shared_images: the tasks share one set of images, so an unreadable one is in every row.
    """
    count = max if shared_images else sum
    notes = []
    per_category = {row["category"]: row for row in rows}
    if skipped := count(row["skipped"] for row in per_category.values()):
        notes.append(
            f"{skipped} unreadable images were left out (--skip-unreadable); metrics.jsonl names "
            "them."
        )
    if empty := sum(row["empty_masks"] for row in per_category.values()):
        notes.append(
            f"{empty} anomalous test images have an empty mask at this size (defect cropped away "
            "or thinner than a pixel): they count as anomalous, but no map can find them; "
            "metrics.jsonl names them."
        )
    if lacking := sum(row.get("without_mask", 0) for row in per_category.values()):
        notes.append(
            f"{lacking} anomalous test images have no mask (--data.partial-masks): the pixel "
            "metrics leave them out."
        )
    found = {row["category"]: row.get("unused", "") for row in rows}  # not in earlier runs
    if left := [(category, what) for category, what in found.items() if what]:
        said = left[0][1] if shared_images else "; ".join(f"{name}: {what}" for name, what in left)
        notes.append(f"Not used, though it looks like an image: {said}; metrics.jsonl names them.")
    twins = {row["category"]: row.get("twins", "") for row in rows}
    if leaking := [f"{category}: {what}" for category, what in twins.items() if what]:
        said = f"LEAKS, near-duplicate images: {'; '.join(leaking)}."
        if " in training" in said:
            said += " With twins in training, numbers are too good."
        if " among defects" in said:
            said += " A twin of a defect has a wrong label, or shows the object without it."
        notes.append(f"{said} metrics.jsonl has the pairs, overlays/ a picture.")
    return notes


def undefined_reasons(rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Collect why metrics of a table are nan, from the rows' `undefined` column."""
    reasons: dict[str, str] = {}
    for row in rows:
        for item in str(row.get("undefined", "")).split("; "):
            name, _, reason = item.partition(": ")
            if name in metric_names() and reason:
                reasons[name] = reason
    return reasons


def _values(rows: Sequence[Mapping[str, Any]], about: Benchmark) -> dict[str, np.ndarray]:
    """Return {select: percent (metrics, categories, seeds)}, or refuse rows with a hole."""
    categories, seeds, metrics = about.categories, about.seeds, about.metrics
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


def _means(about: Benchmark) -> list[_Average]:
    means, categories = [], about.categories
    for key, members in about.groups.items():
        places = [place for place, category in enumerate(categories) if category in members]
        label, is_whole = key.replace("_", " "), len(places) == len(members)
        if not is_whole:
            label += f" ({len(places)} of {len(members)})"
        if places:
            means.append(_Average(key, label, places, is_mean=True, is_comparable=is_whole))
    if len(categories) > 1:
        is_whole = about.num_categories == len(categories)
        places = list(range(len(categories)))
        means.append(_Average("mean", "mean", places, is_mean=True, is_comparable=is_whole))
    return means


def _cell(values: np.ndarray) -> Cell:
    """Return the cell of the percentages (categories, seeds) of one line."""
    per_seed = values.mean(axis=0)  # (seeds,)
    std = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None
    return Cell(float(per_seed.mean()), std)


def _published(about: Benchmark, average: _Average, metric: str, method: str) -> Cell:
    if about.dataset is None or not average.is_comparable:
        return Cell(None)
    name = about.printed(method)
    return Cell(published_values(about.dataset, average.key, metric, [name]).get(name))


def _compared(about: Benchmark, average: _Average, metric: str, paper: str) -> Cell:
    if about.dataset is None or not average.is_comparable:
        return Cell(None)
    name = about.printed(about.published_as)
    return Cell(published_by_paper(about.dataset, average.key, metric, name).get(paper))


def _papers_with(method: str, about: Benchmark, averages: Sequence[_Average]) -> list[str]:
    """Return who prints numbers of a method on a data set: the two papers, then the others."""
    if about.dataset is None:
        return []
    keys = [(average.key, metric) for average in averages for metric in about.metrics]
    found = {paper for key in keys for paper in published_by_paper(about.dataset, *key, method)}
    return [*(paper for paper in _PAPERS if paper in found), *sorted(found - set(_PAPERS))]


def _caption(about: Benchmark, averages: Sequence[_Average], remarks: Sequence[str]) -> str:
    title, seeds = about.title, about.seeds
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


def _dash_note(table: Table, reasons: Sequence[str]) -> list[str]:
    if not any("–" in texts for texts in table.texts()):
        return []
    return [f"–: undefined ({'; '.join(dict.fromkeys(reasons)) or 'NaN, no reason was given'})."]


def _subset_note(about: Benchmark, averages: Sequence[_Average]) -> list[str]:
    """Say why a published mean is missing beside ours."""
    left_out = [
        average.label
        for average in averages
        if about.dataset is not None
        and not average.is_comparable
        and any(
            published_values(about.dataset, average.key, metric, list(map(about.printed, _PAPERS)))
            for metric in about.metrics
        )
    ]
    if not left_out:
        return []
    return [
        f"The papers' {', '.join(left_out)}: left out, being over other categories than this table."
    ]
