"""Mean ranks of methods over data sets, and which of them a test tells apart.

Source: Demšar, "Statistical comparisons of classifiers over multiple data sets", JMLR 7 (2006):
Friedman's test, Nemenyi's critical difference, and the diagram of its Fig. 1.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from utils.tables.table import Cell, Column, Row, Table

ALPHA = 0.05


@dataclass(frozen=True)
class Ranks:
    """Ranks of k methods on N data sets; 1 is the best, equal values share a mean rank.

    Attributes:
        methods: (k,), the best mean rank first.
        mean: (k,) mean ranks.
        data_sets: (N,) those that were ranked.
        left_out: methods that some of the data sets lack.
        p_value: of Friedman's test that all methods are alike; nan for fewer than three methods or
            two data sets.
        critical_difference: of mean ranks, at `ALPHA`; nan likewise.
        few_methods: data sets that are not ranked, because most methods lack them.
    """

    methods: tuple[str, ...]
    mean: tuple[float, ...]
    data_sets: tuple[str, ...]
    left_out: tuple[str, ...]
    p_value: float
    critical_difference: float
    few_methods: tuple[str, ...] = ()

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Return first and last of the methods that are not told apart, of each longest run."""
        found: list[tuple[int, int]] = []
        for first, rank in enumerate(self.mean):
            near = [i for i, r in enumerate(self.mean) if r - rank <= self.critical_difference]
            last = max([i for i in near if i >= first], default=first)
            if last > first and (not found or last > found[-1][1]):
                found.append((first, last))
        return found


def rank_methods(values: Mapping[str, Mapping[str, float]]) -> Ranks | None:
    """Rank methods by values of which the largest is the best.

    Args:
        values: method -> data set -> value; nan counts as missing.

    Returns:
        The ranks of the methods that all data sets have, but for sets that most methods
        lack, which would leave few or none; None for fewer than two methods.
    """
    known = {
        method: {name: value for name, value in of_sets.items() if not math.isnan(value)}
        for method, of_sets in values.items()
    }
    times = Counter(name for of_sets in known.values() for name in of_sets)
    most = max(times.values(), default=0)
    data_sets = tuple(name for name, count in times.items() if count > 1 and 2 * count >= most)
    methods = [method for method, of_sets in known.items() if of_sets.keys() >= set(data_sets)]
    if not data_sets or len(methods) < 2:
        return None
    table = np.array([[known[m][d] for m in methods] for d in data_sets])  # (N, k)
    mean = rankdata(-table, axis=1).mean(axis=0)  # (k,)
    order = np.argsort(mean, kind="stable")
    p_value = critical = math.nan
    count, number = len(methods), len(data_sets)
    if count > 2 and number > 1:
        p_value = float(friedmanchisquare(*table.T).pvalue)
        quantile = float(studentized_range.ppf(1 - ALPHA, count, np.inf)) / math.sqrt(2)
        critical = quantile * math.sqrt(count * (count + 1) / (6 * number))
    return Ranks(
        tuple(methods[i] for i in order),
        tuple(float(mean[i]) for i in order),
        data_sets,
        tuple(method for method in known if method not in methods),
        p_value,
        critical,
        tuple(name for name in times if name not in data_sets),
    )


def in_words(ranks: Ranks) -> list[str]:
    """Say what the ranks rest on, and what they do not show."""
    names = ", ".join(ranks.data_sets)
    means = ", ".join(f"{m} {rank:.2f}" for m, rank in zip(ranks.methods, ranks.mean, strict=True))
    said = [f"Mean ranks over {len(ranks.data_sets)} data sets ({names}), 1 is best: {means}."]
    if not math.isnan(ranks.p_value):
        alike = "are told apart" if ranks.p_value < ALPHA else "may all be alike"
        said.append(
            f"Friedman's test: p = {ranks.p_value:.2g}, the methods {alike} at {ALPHA:g}. "
            f"Nemenyi's critical difference of mean ranks is {ranks.critical_difference:.2f}."
        )
    if ranks.left_out:
        said.append(f"Not ranked, for want of a data set: {', '.join(ranks.left_out)}.")
    if ranks.few_methods:
        said.append(f"Left out, for few methods are on it: {', '.join(ranks.few_methods)}.")
    return said


def table_of_ranks(values: Mapping[str, Mapping[str, Sequence[float]]], ranks: Ranks) -> Table:
    """Return methods by data sets: those that are ranked first, the best mean rank on top.

    Args:
        values: data set -> method -> a value for each seed.
        ranks: of these.
    """
    columns = [Column(name, name) for name in ranks.data_sets]
    columns.append(Column("mean_rank", "mean rank", digits=".2f", is_ranked=False))
    means = dict(zip(ranks.methods, ranks.mean, strict=True))
    rows = []
    for method in (*ranks.methods, *ranks.left_out):
        found = [values[name].get(method, ()) for name in ranks.data_sets]
        cells = [
            Cell(float(np.mean(seeds)), float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None)
            if seeds
            else Cell()
            for seeds in found
        ]
        is_known = any(cell.mean is not None and not math.isnan(cell.mean) for cell in cells)
        if is_known:
            rows.append(Row(method, method, (*cells, Cell(means.get(method)))))
    return Table("method", "", tuple(columns), tuple(rows), rank_along="column")


def draw_ranks(ranks: Ranks) -> Figure:
    """Draw the critical-difference diagram: a line over methods that are not told apart."""
    count = len(ranks.methods)
    half = -(-count // 2)
    bars = ranks.groups
    top = 0.6 + 0.25 * len(bars)
    figure = Figure(figsize=(9, 1.2 + 0.25 * len(bars) + 0.28 * half), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(count + 0.15, 0.85)  # the best on the right, as Demšar draws it
    axes.set_ylim(-top - half - 0.3, 1.6)
    axes.axis("off")
    axes.hlines(0, 1, count, color="black", linewidth=1)
    for place in range(1, count + 1):
        axes.vlines(place, 0, 0.2, color="black", linewidth=1)
        axes.text(place, 0.3, str(place), ha="center", va="bottom", fontsize="small")
    for number, (name, rank) in enumerate(zip(ranks.methods, ranks.mean, strict=True)):
        is_right = number < half
        depth = -top - (number if is_right else count - 1 - number) - 0.4
        edge = 0.85 if is_right else count + 0.15
        axes.plot([rank, rank, edge], [0, depth, depth], color="0.4", linewidth=0.8)
        axes.text(
            edge, depth, f" {name} ({rank:.2f}) ", va="center", fontsize="small",
            ha="left" if is_right else "right", parse_math=False,
        )  # fmt: skip
    for number, (first, last) in enumerate(bars):
        at = -0.3 - 0.25 * number
        ends = ranks.mean[first] - 0.04, ranks.mean[last] + 0.04
        axes.hlines(at, *ends, color="#D55E00", linewidth=3)
    if not math.isnan(ranks.critical_difference):
        length = min(ranks.critical_difference, count - 1)
        axes.hlines(1.2, 1, 1 + length, color="#0072B2", linewidth=2)
        axes.text(
            1 + length, 1.2, f"critical difference {ranks.critical_difference:.2f} ",
            ha="right", va="center", fontsize="small",
        )  # fmt: skip
    return figure


def draw_bars(
    values: Mapping[str, Mapping[str, Sequence[float]]], label: str, colours: Sequence[str]
) -> Figure:
    """Draw a panel for each data set: a bar for each method, with ± the deviation over seeds.

    Args:
        values: data set -> method -> a value for each seed.
        label: of the values.
        colours: of the methods, in the order in which they first appear.
    """
    names = list(dict.fromkeys(name for of_methods in values.values() for name in of_methods))
    figure = Figure(figsize=(8, 0.9 + sum(0.45 + 0.24 * len(v) for v in values.values())))
    figure.set_layout_engine("constrained")
    sizes = [0.6 + len(of_methods) for of_methods in values.values()]
    panels = figure.subplots(len(values), 1, squeeze=False, height_ratios=sizes)
    for axes, (data_set, of_methods) in zip(panels.flat, values.items(), strict=True):
        shown = [
            (name, float(np.mean(seeds)), float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0)
            for name, seeds in of_methods.items()
            if seeds and not math.isnan(float(np.mean(seeds)))
        ]
        shown.sort(key=lambda one: one[1])
        for place, (name, mean, deviation) in enumerate(shown):
            colour = colours[names.index(name) % len(colours)]
            axes.barh(place, mean, xerr=deviation or None, color=colour, capsize=2, height=0.7)
            axes.text(mean, place, f" {mean:.1f}", va="center", fontsize="x-small")
        axes.set_yticks(range(len(shown)), [name for name, *_ in shown], fontsize="small")
        lowest = min((mean - deviation for _, mean, deviation in shown), default=0.0)
        axes.set_xlim(max(0.0, 10 * math.floor((lowest - 2) / 10)), 104)
        axes.set_title(data_set, fontsize="small", loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels.flat[-1].set_xlabel(label)
    return figure
