"""Several runs on the same images side by side: numbers, ROC curves, and where they disagree."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from scipy.stats import rankdata

from figures.report.charts import Chart, roc_overlay, run_mark
from figures.report.pictures import Budget, Picture, thumbnail
from figures.report.scores import Scored, read_scores
from figures.shared import costs
from figures.shared.costs import is_known
from figures.shared.run_log import LoggedRun, images_of
from figures.shared.same_images import are_same, digests_of, finished_categories
from utils.errors import RunError
from utils.metrics.metrics import heading_of, metric_names, table_metrics
from utils.tables.results import SELECT_LABELS
from utils.tables.table import Cell, Column

_PARTS = 3  # of a path, from its end, that name an image wherever the data set lies


@dataclass(frozen=True)
class Line:
    """A line of the table: one run under one way of selecting.

    Attributes:
        number: of the run, from 0.
        mark: the style sheet's classes of the run's line in charts.
        label: method, and what sets it apart.
        texts: what stands in the other columns.
    """

    number: int
    mark: str
    label: str
    texts: list[str]


@dataclass(frozen=True)
class Disputed:
    """An image on which runs disagree.

    Attributes:
        category: of the task.
        path: as in the first run's scores.
        kind: of defect, or class.
        anomalous: its label.
        ranks: in each run, among all test images of the category; 1 is the highest score, equal
            scores share a mean rank.
        of: test images of the category.
        picture: a small one, or None.
        remark: why there is none.
    """

    category: str
    path: str
    kind: str
    anomalous: bool
    ranks: list[float]
    of: int
    picture: Picture | None
    remark: str

    @property
    def spread(self) -> float:
        """How far apart the ranks are, as a share of the images in [0, 1)."""
        return (max(self.ranks) - min(self.ranks)) / self.of


@dataclass(frozen=True)
class Together:
    """What the page shows of several runs together.

    Attributes:
        images: name of the data set.
        categories: that all runs have finished.
        left_out: label of a run and the categories that only some of the runs have.
        columns: of the table, after the label.
        lines: of the table.
        charts: ROC curves, by category.
        disputed: images on which the runs disagree most, the most first.
    """

    images: str
    categories: list[str]
    left_out: list[tuple[str, list[str]]]
    columns: list[str]
    lines: list[Line]
    charts: list[tuple[str, Chart]]
    disputed: list[Disputed]


def side_by_side(
    runs: Sequence[LoggedRun], budget: Budget, *, num_images: int, thumbnails: bool
) -> Together:
    """Set runs on the same images side by side.

    Args:
        runs: two or more.
        budget: of the pictures.
        num_images: how many images of each category to list.
        thumbnails: whether they get a small picture.

    Raises:
        RunError: the runs are on other data sets, have no finished category in common, or have
            other test images in one; or a scores file is missing or corrupt.
    """
    categories = _common_categories(runs)
    charts, disputed = [], []
    for name in categories:
        scored = [_first_scores(run, name) for run in runs]
        aligned = _aligned(name, runs, scored)
        labelled = list(zip([run.label for run in runs], aligned, strict=True))
        if chart := roc_overlay(f"ROC, {name}", labelled):
            charts.append((name, chart))
        for image in _disputed(name, aligned)[:num_images]:
            shown = thumbnail(Path(image.path), budget) if thumbnails else (None, "")
            disputed.append(Disputed(**{**vars(image), "picture": shown[0], "remark": shown[1]}))
    columns, lines = _lines(runs, categories)
    left_out = [
        (run.label, others)
        for run in runs
        if (others := [name for name in finished_categories(run.run) if name not in categories])
    ]
    return Together(
        images=images_of(runs[0].run.config),
        categories=categories,
        left_out=left_out,
        columns=columns,
        lines=lines,
        charts=charts,
        disputed=sorted(disputed, key=lambda image: -image.spread),
    )


def _common_categories(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the finished categories that all have, or say what differs."""
    sets = [images_of(run.run.config) for run in runs]
    if len(set(sets)) > 1:
        named = "; ".join(f"{run.run.folder}: {name}" for run, name in zip(runs, sets, strict=True))
        raise RunError(f"runs side by side must be on one data set ({named})")
    first, *rest = [digests_of(run.run) for run in runs]
    others = [run for run, its in zip(runs[1:], rest, strict=True) if not are_same(first, its)]
    if others:
        raise RunError(
            f"runs side by side must be on the same test images; those of {others[0].run.folder} "
            f"are others than those of {runs[0].run.folder}"
        )
    finished = [finished_categories(run.run) for run in runs]
    common = [name for name in finished[0] if all(name in names for names in finished)]
    if not common:
        named = "; ".join(
            f"{run.run.folder}: {', '.join(names) or 'none finished'}"
            for run, names in zip(runs, finished, strict=True)
        )
        raise RunError(f"runs side by side must have a finished category in common ({named})")
    return common


def _first_scores(run: LoggedRun, category: str) -> Scored:
    seed = next(row["seed"] for row in run.run.rows() if row["category"] == category)
    scored = read_scores(run.run, category, seed)
    if scored is None:
        path = run.run.scores_path(category, seed)
        raise RunError(f"{path}: missing, so this run cannot stand beside others")
    return scored


def _aligned(category: str, runs: Sequence[LoggedRun], scored: Sequence[Scored]) -> list[Scored]:
    """Return the scores in the order of the first run's images, or say what differs."""
    first = _keys(scored[0].paths)
    labels = dict(zip(first, scored[0].labels.tolist(), strict=True))
    aligned = [scored[0]]
    for run, one in zip(runs[1:], scored[1:], strict=True):
        keys = _keys(one.paths)
        here = f"{category}: {run.run.folder} and {runs[0].run.folder}"
        if other := sorted(set(first) ^ set(keys)):
            raise RunError(
                f"{here} were tested on other images: {len(other)} are in one only, as {other[0]}"
            )
        place_of = {key: place for place, key in enumerate(keys)}
        order = [place_of[key] for key in first]
        if wrong := [key for key in first if one.labels[place_of[key]] != labels[key]]:
            raise RunError(
                f"{here} do not agree what is anomalous: {len(wrong)} test images have another "
                f"label, as {wrong[0]}"
            )
        aligned.append(
            Scored(
                one.category,
                one.seed,
                [one.paths[place] for place in order],
                one.labels[order],
                one.scores[order],
                [one.kinds[place] for place in order],
            )
        )
    return aligned


def _keys(paths: Sequence[str]) -> list[str]:
    """Return names of images that stay the same where the data set was moved; each once."""
    short = ["/".join(PurePath(path).parts[-_PARTS:]) for path in paths]
    times = Counter(short)
    seen: Counter[str] = Counter()
    keys = []
    for path, name in zip(paths, short, strict=True):
        key = name if times[name] == 1 else path
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key} ({seen[key]})")
    return keys


def _disputed(category: str, aligned: Sequence[Scored]) -> list[Disputed]:
    """Return the images with unequal ranks, those furthest apart first."""
    ranks = np.stack([rankdata(-one.scores) for one in aligned], axis=1)  # (N, runs)
    first = aligned[0]
    images = [
        Disputed(category, path, kind, bool(label), row.tolist(), len(ranks), None, "")
        for path, kind, label, row in zip(
            first.paths, first.kinds, first.labels, ranks, strict=True
        )
        if row.min() < row.max()
    ]
    return sorted(images, key=lambda image: -image.spread)


def _lines(runs: Sequence[LoggedRun], categories: Sequence[str]) -> tuple[list[str], list[Line]]:
    """Return the columns of the table and its lines."""
    groups = [
        (number, run, select, rows)
        for number, run in enumerate(runs)
        for select, rows in _by_select(run, categories).items()
    ]
    metrics = [
        metric.name
        for metric in table_metrics(metric_names(), has_maps=True)
        if any(is_known(row.get(metric.name)) for *_, rows in groups for row in rows)
    ]
    shown = costs.columns()
    columns = [
        *("selection", "seeds"),
        *map(heading_of, metrics),
        *(column.name for column in shown),
    ]
    lines = []
    for number, run, select, rows in groups:
        found = costs.costs_of(rows)
        means = [_mean(rows, name, categories) for name in metrics]
        texts = [
            SELECT_LABELS.get(select, select),
            ", ".join(map(str, sorted({row["seed"] for row in rows}))),
            *(Column("", "").text_of(cell, "–") for cell in means),
            *(
                column.text_of(cell, "–")
                for column, cell in zip(shown, costs.cells(found), strict=True)
            ),
        ]
        lines.append(Line(number, run_mark(number), run.label, texts))
    return columns, lines


def _by_select(run: LoggedRun, categories: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in run.run.rows():
        if row["category"] in categories:
            groups.setdefault(row["select"], []).append(row)
    return groups


def _mean(rows: Sequence[Mapping[str, Any]], name: str, categories: Sequence[str]) -> Cell:
    """Return the mean over categories within each seed that has all, in percent, ± over seeds."""
    values: dict[int, dict[str, float]] = {}
    for row in rows:
        if is_known(row.get(name)):
            values.setdefault(row["seed"], {})[row["category"]] = 100 * float(row[name])
    whole = [one.values() for one in values.values() if len(one) == len(categories)]
    means = [statistics.fmean(one) for one in whole]
    if not means:
        return Cell(None)
    return Cell(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None)
