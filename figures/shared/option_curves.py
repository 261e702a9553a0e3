"""AUROC against one option of the method, from run folders.

A curve is one method with one set of other options, on one data set, with one way of selecting;
its points are the values of the swept option. Numbers are means over categories of each seed, then
the mean and the sample standard deviation over seeds, in percent.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from figures.shared.own_results import OF_SERIES, data_of
from figures.shared.run_log import options_without_effect
from utils.errors import RunError
from utils.runs.files import flat
from utils.runs.run import Run
from utils.tables.results import SELECT_LABELS

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}
ORDER = ("last", "synthetic", "best_test")
_TOLERANCE = 1e-6
"""Two runs of one pair agree up to this; more apart, they are two results."""


@dataclass(frozen=True)
class Sweep:
    """Which option is swept, and how its figure reads.

    Attributes:
        module: of the figure, e.g. "figures.norm_sweep".
        option: its dotted name in config.json.
        symbol: short name for tables and messages.
        axis: label of the x axis.
        scale: of the x axis.
        source: which published figure this is, a sentence.
        family: config -> what the runs of a colour are called, before their other options.
        claim: a value of which the tables say whether it is in the shared range.
    """

    module: str
    option: str
    symbol: str
    axis: str
    scale: Literal["log2", "log10", "linear"]
    source: str
    family: Callable[[dict[str, Any]], str]
    claim: float | None = None


@dataclass
class Point:
    """All results at one value of the option.

    Attributes:
        value: of the option.
        results: (category, seed) -> metric -> AUROC in [0, 1] or nan.
    """

    value: float
    results: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    @property
    def categories(self) -> set[str]:
        """Categories of the results."""
        return {category for category, _ in self.results}

    @property
    def seeds(self) -> list[int]:
        """Seeds of the results, ascending."""
        return sorted({seed for _, seed in self.results})

    def per_seed(self, metric: str) -> list[float]:
        """Return the mean over categories of each seed, in percent; nan where undefined."""
        return [
            100 * statistics.fmean(r[metric] for (_, s), r in self.results.items() if s == seed)
            for seed in self.seeds
        ]

    def mean(self, metric: str) -> float:
        """Return the mean over seeds, in percent."""
        return statistics.fmean(self.per_seed(metric))

    def std(self, metric: str) -> float:
        """Return the sample standard deviation over seeds, in percent; nan for one seed."""
        values = self.per_seed(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


@dataclass
class Curve:
    """A curve of the figure; `points` ascend.

    `unlike` says in which options outside the method the families on its data set differ, if any.
    """

    dataset: str
    label: str
    select: str
    points: list[Point]
    unlike: str = ""

    @property
    def name(self) -> str:
        """Label and way of selecting, as legends and tables have it."""
        return f"{self.label}, {SELECT_LABELS[self.select]}"


def read_curves(folders: Sequence[Path], sweep: Sweep) -> list[Curve]:
    """Read runs and join those that differ only in the swept option, their seeds or categories.

    Raises:
        RunError: one is no run folder, lacks the option or has nothing finished; two give one
            result differently; or the points of a data set are over different categories.
    """
    runs = [Run.read(folder) for folder in folders]
    labels = _labels([run.config for run in runs], sweep)
    unlike = {data_of(r.config): _unlike([r.config for r in runs], r.config, sweep) for r in runs}
    found: dict[tuple[str, str, str], dict[float, Point]] = {}
    for run, label in zip(runs, labels, strict=True):
        value, rows = option_value(run, sweep), run.rows()
        if not rows:
            raise RunError(f"{run.folder}: no category is finished")
        for row in rows:
            key = (data_of(run.config), label, str(row["select"]))
            point = found.setdefault(key, {}).setdefault(value, Point(value))
            _add(point, row, run.folder)
    curves = [
        Curve(*key, sorted(points.values(), key=lambda p: p.value), unlike[key[0]])
        for key, points in found.items()
    ]
    curves.sort(key=lambda c: (c.dataset, c.label, ORDER.index(c.select)))
    _check_categories(curves, sweep)
    return curves


def option_value(run: Run, sweep: Sweep) -> float:
    """Return the swept option of a run.

    Raises:
        RunError: the run has no such option, or it is not a number the axis can show.
    """
    text = flat(run.config).get(sweep.option)
    value = None if text is None else json.loads(text)
    if not isinstance(value, int | float):
        raise RunError(
            f"{run.folder}: {run.config.get('method_name')} has no {sweep.symbol} "
            f"({sweep.option} is {text or 'absent'}); leave this run out"
        )
    if sweep.scale != "linear" and value <= 0:
        raise RunError(f"{run.folder}: {sweep.symbol} {value} has no place on a logarithmic axis")
    return float(value)


def _labels(configs: Sequence[dict[str, Any]], sweep: Sweep) -> list[str]:
    """Name each run by its family and the options in which runs of it on its data set differ."""
    leaves = [_important(config, sweep) for config in configs]
    groups = [(data_of(config), sweep.family(config)) for config in configs]
    labels = []
    for own, group in zip(leaves, groups, strict=True):
        same = [other for other, theirs in zip(leaves, groups, strict=True) if theirs == group]
        differing = [
            f"{key.removeprefix('method.').replace('_', ' ')} {value}".replace('"', "")
            for key, value in own.items()
            if len({other.get(key) for other in same}) > 1
        ]
        labels.append(", ".join([group[1], *differing]))
    return labels


def _unlike(configs: Sequence[dict[str, Any]], one: dict[str, Any], sweep: Sweep) -> str:
    """Say what differs outside the method between the families on the data set of `one`."""
    found: dict[str, dict[str, set[str]]] = {}
    for config in configs:
        if data_of(config) == data_of(one):
            for key, value in _important(config, sweep).items():
                if not key.startswith("method."):
                    found.setdefault(key, {}).setdefault(sweep.family(config), set()).add(value)
    texts = []
    for key, by_family in found.items():
        if len({frozenset(values) for values in by_family.values()}) > 1:
            values = (f"{', '.join(sorted(v))} {name}" for name, v in sorted(by_family.items()))
            texts.append(f"{key.replace('_', ' ')}: {'; '.join(values)}".replace('"', ""))
    return ". ".join(texts)


def _important(config: dict[str, Any], sweep: Sweep) -> dict[str, str]:
    """Return the options, as JSON, that can change a number, without the swept one.

    An option that only some of the runs have counts: one added later is absent at its default.
    """
    left_out = {*options_without_effect(), *OF_SERIES, "grid", sweep.option} - {"backbone"}
    return {
        key: value
        for key, value in flat(config).items()
        if key not in left_out and key.partition(".")[0] not in left_out
    }


def _add(point: Point, row: dict[str, Any], folder: Path) -> None:
    pair = (row["category"], row["seed"])
    result = {metric: float(row[metric]) for metric in METRICS}
    known = point.results.setdefault(pair, result)
    if not np.allclose([*known.values()], [*result.values()], atol=_TOLERANCE, equal_nan=True):
        raise RunError(
            f"{folder}: {pair[0]}, seed {pair[1]} differs from another run of the same options; "
            "give only one of them"
        )


def _check_categories(curves: Sequence[Curve], sweep: Sweep) -> None:
    """Refuse points over different categories: their difference would not be the option's."""
    for dataset in dict.fromkeys(curve.dataset for curve in curves):
        points = [(c, p) for c in curves if c.dataset == dataset for p in c.points]
        everything = set().union(*(point.categories for _, point in points))
        for curve, point in points:
            missing = {(c, s) for c in everything for s in point.seeds} - set(point.results)
            if missing:
                category, seed = min(missing)
                raise RunError(
                    f"{dataset}, {curve.name}: {sweep.symbol} {point.value:g} has no {category}, "
                    f"seed {seed}, which other points have; finish that run or leave it out"
                )
