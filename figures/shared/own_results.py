"""Our results for the papers' tables: run folders pooled by method, options, protocol and data."""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.structured import JOINT
from datasets.data_set import StructuredSet, find_data_sets, num_categories
from figures.shared.run_log import images_of, options_without_effect
from utils.errors import RunError
from utils.runs.files import flat
from utils.runs.run import Run
from utils.tables.published import published_table
from utils.tables.results import SELECT_LABELS
from utils.tables.table import Cell

Pair = tuple[str, int]
"""Category and seed."""

PAPER_BACKBONES = {True: "wide_resnet50_2.tv_in1k", False: "resnet152.tv_in1k"}
"""NoCo's backbone of structured (True) and of semantic data: together one row of a table."""

OF_SERIES = frozenset({"dataset", "method_name", "select", "backbone", "protocol"})
"""Options with a field of their own in `Series`."""

_COMPARED = ("image_auroc", "pixel_auroc", "trainable")


@dataclass(frozen=True)
class Series:
    """One method, with one set of options and one way of selecting, on one data set.

    Attributes:
        data: the data set; a folder with its name, a protocol the papers do not have in brackets.
        is_structured: defects on images, or images of other classes.
        method: on the command line.
        options: those that set it apart from other runs of the method on the same data.
        backbone: its name; "" where the table has a row for each backbone.
        select: "last", "synthetic" or "best_test".
        factor: what a table has a row for, as "2+3"; "" where it has none.
        num_categories: that a mean has to be over.
        has_random_weights: the backbone had no pretrained weights.
        rows: the rows of results.csv, by category and seed.
    """

    data: str
    is_structured: bool
    method: str
    options: str
    backbone: str
    select: str
    factor: str
    num_categories: int
    has_random_weights: bool
    rows: dict[Pair, dict[str, Any]] = field(default_factory=dict)

    @property
    def setting(self) -> tuple[str, str, str, str]:
        """Method, options, backbone and way of selecting: what a table has one line for.

        The papers' two backbones count as one: NoCo's rows have one for each kind of data.
        """
        is_papers = self.backbone == PAPER_BACKBONES[self.is_structured]
        return (
            self.method,
            self.options,
            "the paper's" if is_papers else self.backbone,
            self.select,
        )

    @property
    def seeds(self) -> list[int]:
        """The seeds with at least one category."""
        return sorted({seed for _, seed in self.rows})


def pool(
    folders: Sequence[Path],
    *,
    factor: Callable[[dict[str, Any]], str | None] | None = None,
    factor_options: Collection[str] = (),
) -> list[Series]:
    """Read run folders; those that differ in categories and seeds alone are put together.

    Runs without a finished category give nothing: `unfinished_notes` tells of them.

    Args:
        folders: of the runs; one given twice counts once.
        factor: from a run's configuration what a table has rows for; None leaves the run out.
        factor_options: dotted options that `factor` speaks for.

    Raises:
        RunError: one is no run folder or is corrupt, or two hold different results for the same
            thing.
    """
    runs = []
    for folder in {path.resolve(): path for path in folders}.values():
        run = Run.read(folder)
        factor_value = "" if factor is None else factor(run.config)
        if factor_value is not None and run.rows():
            runs.append((run, factor_value))
    texts = _option_texts([run.config for run, _ in runs], factor_options)
    numbers = _num_categories([run for run, _ in runs])
    series: dict[tuple[Any, ...], Series] = {}
    origin: dict[tuple[Any, ...], Path] = {}
    for (run, factor_value), options in zip(runs, texts, strict=True):
        data = data_of(run.config)
        backbone = "" if "backbone" in factor_options else run.config["backbone"]
        for row in run.rows():
            key = (data, run.config["method_name"], options, backbone, row["select"], factor_value)
            one = series.setdefault(
                key,
                Series(
                    data,
                    is_structured(run.config),
                    *key[1:],
                    num_categories=numbers[data],
                    has_random_weights=run.config["weights"] == "random",
                ),
            )
            pair = (row["category"], row["seed"])
            first = origin.setdefault((*key, *pair), run.folder)
            if _differ(one.rows.setdefault(pair, row), row):
                raise RunError(
                    f"{first} and {run.folder} hold different results of {key[1]} on {data}, "
                    f"{pair[0]}, seed {pair[1]}: name only one of them"
                )
    return list(series.values())


def unfinished_notes(folders: Sequence[Path]) -> list[str]:
    """Name the runs that have no result yet."""
    empty = [str(folder) for folder in folders if not Run.read(folder).rows()]
    if not empty:
        return []
    return [f"Not in the table, since no category is finished: {', '.join(empty)}."]


def papers_data(*, structured: bool) -> tuple[str, ...]:
    """Return the data sets of NoCo's Table II with defects, or those of classes, in its order."""
    names = dict.fromkeys(data for _, data, _, _ in published_table("NoCo Table II"))
    with_defects = find_data_sets(StructuredSet)
    return tuple(n for n in names if n != "-" and (n in with_defects) == structured)


def is_structured(config: Mapping[str, Any]) -> bool:
    """Tell a structured experiment from a semantic one, which always names its protocol."""
    return config.get("protocol", JOINT) == JOINT


def data_of(config: Mapping[str, Any]) -> str:
    """Name the images and tasks of a run: folders of one's own by their last part.

    A head that is for some categories only is measured on other tasks than one for all.
    """
    name = images_of(config)
    protocol = config.get("protocol", "one-vs-rest")
    if protocol == "one-vs-rest":
        return name
    some = config.get("categories") if protocol == JOINT else None
    return f"{name} ({protocol}{' of ' + ', '.join(some) if some else ''})"


def by_setting(series: Sequence[Series]) -> dict[tuple[str, ...], dict[str, Series]]:
    """Return, for each setting, its series by data set: the lines of a table."""
    lines: dict[tuple[str, ...], dict[str, Series]] = {}
    for one in series:
        lines.setdefault(one.setting, {})[one.data] = one
    return lines


def describe(series: Collection[Series]) -> str:
    """Say what a line of a table is: method, options, protocol, backbones and number of seeds."""
    first = next(iter(series))
    counts = sorted({len(one.seeds) for one in series})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    ordered = sorted(series, key=lambda one: not one.is_structured)
    backbones = " / ".join(dict.fromkeys(one.backbone.partition(".")[0] for one in ordered))
    method = ", ".join(filter(None, [first.method, first.options]))
    return "; ".join(filter(None, [method, SELECT_LABELS[first.select], backbones, n]))


def summarise(
    series: Series, metric: str, categories: Collection[str] | None = None, total: int | None = None
) -> Cell:
    """Return the mean over categories of each seed, then mean and deviation over seeds.

    The sample standard deviation (ddof = 1) is that of the seeds' means. Only seeds that have every
    category count. Where none does, the mean is over what there is, and the cell says so; an
    undefined value (nan) counts as missing.

    Args:
        series: the results.
        metric: a column of results.csv, fractions.
        categories: to average over; all by default.
        total: how many there should be; by default the data set's.
    """
    total = series.num_categories if total is None else total
    values: dict[int, dict[str, float]] = {}
    for (category, seed), row in series.rows.items():
        value = 100 * float(row.get(metric, math.nan))
        if (categories is None or category in categories) and not math.isnan(value):
            values.setdefault(seed, {})[category] = value
    means = [statistics.fmean(v.values()) for v in values.values() if len(v) == total]
    if means:
        std = statistics.stdev(means) if len(means) > 1 else None
        return Cell(statistics.fmean(means), std, len(means))
    found = {category for by_category in values.values() for category in by_category}
    if not found:
        return Cell(None)
    per_category = [
        statistics.fmean(v[category] for v in values.values() if category in v)
        for category in found
    ]
    return Cell(statistics.fmean(per_category), None, len(values), len(found), total)


def incomplete_seeds(series: Series) -> list[int]:
    """Return the seeds a complete mean leaves out because they lack a category."""
    counts = {s: sum(seed == s for _, seed in series.rows) for s in series.seeds}
    lacking = [seed for seed, count in counts.items() if count < series.num_categories]
    return [] if len(lacking) == len(counts) else lacking


def trainable(series: Collection[Series]) -> float:
    """Return trainable parameters in millions: the mean of the structured and the semantic head.

    So the paper gets its 3.7 from 3.2 (1792 channels) and 4.2 (2048 channels).
    """
    by_kind: dict[bool, list[float]] = {}
    for one in series:
        counts = [row["trainable"] for row in one.rows.values()]
        by_kind.setdefault(one.is_structured, []).append(statistics.fmean(counts))
    return statistics.fmean(map(statistics.fmean, by_kind.values())) / 1e6


def _option_texts(configs: Sequence[dict[str, Any]], spoken_for: Collection[str]) -> list[str]:
    """Name, for each run, the options that vary among runs of its method on one data set."""
    same = OF_SERIES | options_without_effect() | set(spoken_for)
    leaves = [
        {key: value for key, value in flat(config).items() if key not in same} for config in configs
    ]
    alike: dict[tuple[str, str], list[dict[str, str]]] = {}
    for config, own in zip(configs, leaves, strict=True):
        alike.setdefault((config["method_name"], data_of(config)), []).append(own)
    # An option that only some of them have counts: one added later is absent at its default.
    varied = {
        (method, key)
        for (method, _), group in alike.items()
        for key in set().union(*group)
        if len({own.get(key) for own in group}) > 1
    }
    return [
        ", ".join(
            f"{key.removeprefix('method.').replace('_', ' ')} {value}".replace('"', "")
            for key, value in own.items()
            if (config["method_name"], key) in varied
        )
        for config, own in zip(configs, leaves, strict=True)
    ]


def _num_categories(runs: Sequence[Run]) -> dict[str, int]:
    """Return how many categories each data set has; of a folder, those that any run names."""
    names: dict[str, set[str]] = {}
    known: dict[str, int] = {}
    for run in runs:
        data = data_of(run.config)
        found = names.setdefault(data, set())
        found |= {row["category"] for row in run.rows()} | set(run.config.get("categories", ()))
        known[data] = num_categories(run.config["dataset"])
    return {data: max(known[data], len(found)) for data, found in names.items()}


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare two rows in what tables show; nan equals nan."""
    return any(str(one.get(name)) != str(other.get(name)) for name in _COMPARED)
