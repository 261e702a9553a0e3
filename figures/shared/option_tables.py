"""The numbers of a swept option as a table, and where each curve is near its best."""

import math
from collections.abc import Sequence

from figures.shared.option_curves import METRICS, Curve, Point, Sweep
from utils.tables.results import SELECT_LABELS
from utils.tables.table import Cell, Column, Row, Table

NEAR = 1.0
"""Points of AUROC below the best that count as near it."""


def table_of(curves: Sequence[Curve], sweep: Sweep) -> Table:
    """Return the numbers, and below the values near each curve's best and those that are shared."""
    metrics = [m for m in METRICS if any(near_best(curve, m) for curve in curves)]
    columns = (
        Column("curve", "curve"),
        Column("select", "selection"),
        Column(sweep.symbol.replace(" ", "_"), sweep.symbol, digits="g"),
        *(Column(metric, METRICS[metric], "", metric) for metric in metrics),
        Column("seeds", "seeds", digits="d"),
        Column("categories", "categories", digits="d"),
    )
    rows = tuple(
        Row(
            curve.dataset,
            curve.dataset,
            (
                Cell(text=curve.label),
                Cell(text=SELECT_LABELS[curve.select]),
                Cell(point.value),
                *(_cell(point, metric) for metric in metrics),
                Cell(len(point.seeds)),
                Cell(len(point.categories)),
            ),
            block=curve.dataset,
        )
        for curve in curves
        for point in curve.points
    )
    caption = (
        f"AUROC against {sweep.symbol}, percent: mean over categories, ± standard deviation over "
        f"seeds. {sweep.source}"
    )
    unlike = dict.fromkeys(f"{curve.dataset}: {curve.unlike}" for curve in curves if curve.unlike)
    notes = [f"Beside the method, these differ: {text}" for text in unlike]
    for metric in metrics:
        near = f"{sweep.symbol} within {NEAR:g} point of the best {METRICS[metric]}"
        notes.append(f"{near}{_spread(curves, metric)}:")
        notes += [
            f"{curve.dataset}, {curve.name}: {_near_text(curve, metric)}"
            for curve in curves
            if near_best(curve, metric)
        ]
        notes += shared_lines(curves, metric, sweep)
    return Table("data set", caption, columns, rows, tuple(notes))


def near_best(curve: Curve, metric: str) -> list[float]:
    """Return the values whose mean AUROC is within `NEAR` of the best; none if undefined."""
    means = {point.value: point.mean(metric) for point in curve.points}
    defined = [mean for mean in means.values() if not math.isnan(mean)]
    return [value for value, mean in means.items() if defined and mean >= max(defined) - NEAR]


def shared_lines(curves: Sequence[Curve], metric: str, sweep: Sweep) -> list[str]:
    """Say which values are near the best on every data set: by curve, then for all curves.

    A curve that only one data set has shares nothing and gets no line.
    """
    defined = [curve for curve in curves if near_best(curve, metric)]
    lines = []
    for select in dict.fromkeys(curve.select for curve in defined):
        of_select = [curve for curve in defined if curve.select == select]
        labels = list(dict.fromkeys(curve.label for curve in of_select))
        groups = {label: [c for c in of_select if c.label == label] for label in labels}
        if len(labels) > 1:
            groups["all curves"] = of_select
        for label, group in groups.items():
            datasets = list(dict.fromkeys(curve.dataset for curve in group))
            if len(datasets) > 1:
                text = _shared_text(group, metric, sweep)
                lines.append(
                    f"shared by {', '.join(datasets)}; {label}, {SELECT_LABELS[select]}: {text}"
                )
    return lines


def _shared_text(group: Sequence[Curve], metric: str, sweep: Sweep) -> str:
    tested = sorted(set.intersection(*({p.value for p in curve.points} for curve in group)))
    near = [v for v in tested if all(v in near_best(curve, metric) for curve in group)]
    if not tested:
        return f"nothing, since no {sweep.symbol} was tested on all of them"
    text = _range(near, tested) if near else f"nothing (tested on all of them: {_listed(tested)})"
    if sweep.claim is None:
        return text
    if sweep.claim not in tested:
        return f"{text}; {sweep.claim:g} was not tested on all of them"
    verdict = "is in it" if sweep.claim in near else "is not in it"
    return f"{text}; {sweep.symbol} {sweep.claim:g} {verdict}"


def _spread(curves: Sequence[Curve], metric: str) -> str:
    """Say how large the spread over seeds gets, beside which a point may be nothing."""
    found = [point.std(metric) for curve in curves for point in curve.points]
    known = [std for std in found if not math.isnan(std)]
    return f" (standard deviation over seeds: up to {max(known):.1f})" if known else ""


def _near_text(curve: Curve, metric: str) -> str:
    best = max(curve.points, key=lambda point: _or_least(point.mean(metric)))
    tested = [point.value for point in curve.points]
    text = _range(near_best(curve, metric), tested)
    return f"{text}; best {best.mean(metric):.1f} at {best.value:g}"


def _range(near: Sequence[float], tested: Sequence[float]) -> str:
    """Write values as runs of neighbours among those tested: "0.5 to 4, 32 (5 of 8 tested)"."""
    runs: list[list[float]] = []
    for value in tested:
        if value not in near:
            runs.append([])
        elif runs:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = [f"{r[0]:g} to {r[-1]:g}" if len(r) > 1 else f"{r[0]:g}" for r in runs if r]
    count = f"all {len(tested)}" if len(near) == len(tested) else f"{len(near)} of {len(tested)}"
    return f"{', '.join(texts)} ({count} tested)"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _or_least(mean: float) -> float:
    return -math.inf if math.isnan(mean) else mean


def _cell(point: Point, metric: str) -> Cell:
    std = point.std(metric)
    return Cell(point.mean(metric), None if math.isnan(std) else std)
