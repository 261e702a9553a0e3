"""Charts of a run report as plain numbers, which the page draws as inline SVG.

Colours are left to the page's style sheet, so that charts follow its light or dark scheme.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from figures.report.scores import Scored, image_auroc, roc

SIDE = 200.0  # of the plot, in SVG units
NUM_COLOURS = 6
MAX_BINS = 40
MAX_KEYS = 8  # lines of a legend


@dataclass(frozen=True)
class Key:
    """A line of a legend: the style sheet's class of its mark, and its text."""

    mark: str
    text: str


@dataclass
class Chart:
    """A chart in a square plot of SIDE units, whose y axis points down.

    Attributes:
        title: what is drawn.
        x_label: of the axis, with its unit.
        y_label: of the axis, with its unit.
        x_ticks: places and texts.
        y_ticks: places and texts.
        paths: style sheet's classes and SVG path data, the first drawn first.
        stars: style sheet's classes and places of the marked points.
        keys: of the legend.
        note: a sentence below it, or "".
        seed: whose scores a histogram shows; None for other charts.
        span: of a histogram, the scores at the ends of the x axis.
        threshold: place of the line on the x axis, or None.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, str]] = field(default_factory=list)
    stars: list[tuple[str, float, float]] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    note: str = ""
    seed: int | None = None
    span: tuple[float, float] | None = None
    threshold: float | None = None

    def add_key(self, mark: str, text: str) -> None:
        """Add a line to the legend unless it is there."""
        if (key := Key(mark, text)) not in self.keys:
            self.keys.append(key)


def roc_chart(seeds: Sequence[Scored], last: Sequence[Scored]) -> Chart | None:
    """Draw the ROC curve of each seed; None where a class has no image.

    Args:
        seeds: reported scores of a category.
        last: scores of the last state, dashed, of runs that report the best on the test set.
    """
    chart = _roc_axes("ROC")
    for dashed, group in ((" dashed", last), ("", seeds)):
        values = []
        for number, one in enumerate(group):
            path = _roc_path(one)
            if path is None:
                return None
            mark = f"line c{number % NUM_COLOURS}{dashed}"
            chart.paths.append((mark, path))
            values.append(100 * image_auroc(one))
            if len(seeds) + len(last) <= MAX_KEYS:
                state = " (last epoch)" if dashed else " (best on test)" if last else ""
                chart.add_key(mark, f"seed {one.seed}{state}: AUROC {values[-1]:.1f} %")
        if values and len(seeds) + len(last) > MAX_KEYS:
            what = "last epoch" if dashed else f"{len(values)} seeds"
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            chart.add_key(
                f"line c0{dashed}", f"{what}: AUROC {statistics.fmean(values):.1f}{spread} %"
            )
    return chart


def roc_overlay(title: str, runs: Sequence[tuple[str, Scored]]) -> Chart | None:
    """Draw the ROC curves of several runs; None where a class has no image.

    Args:
        title: of the chart.
        runs: the label of each and its scores of the same images.
    """
    chart = _roc_axes(title)
    for number, (label, one) in enumerate(runs):
        path = _roc_path(one)
        if path is None:
            return None
        mark = run_mark(number)
        chart.paths.append((mark, path))
        chart.add_key(mark, f"{label}: AUROC {100 * image_auroc(one):.1f} %")
    return chart


def run_mark(number: int) -> str:
    """Return the style sheet's classes of the line of a run; colours come again dashed."""
    dashed = " dashed" if number // NUM_COLOURS % 2 else ""
    return f"line c{number % NUM_COLOURS}{dashed}"


def _roc_axes(title: str) -> Chart:
    shares = [(0.0, "0"), (0.25, "25"), (0.5, "50"), (0.75, "75"), (1.0, "100")]
    return Chart(
        title, "normals called anomalous, %", "anomalies found, %",
        [(SIDE * share, text) for share, text in shares],
        [(SIDE * (1 - share), text) for share, text in shares],
        [("chance", f"M0 {SIDE:g}L{SIDE:g} 0")],
    )  # fmt: skip


def _roc_path(one: Scored) -> str | None:
    false, true = roc(one.labels, one.scores)
    if not (false[-1] and true[-1]):
        return None
    return _path(false / false[-1], 1 - true / true[-1])


def histogram_chart(one: Scored, threshold: float) -> Chart:
    """Draw the shares of normal and of anomalous images over the score.

    Args:
        one: the scores.
        threshold: where to draw a line; one that is off the axis stands at its end.
    """
    num_bins = min(MAX_BINS, max(10, round(2 * len(one.scores) ** 0.5)))
    edges = np.histogram_bin_edges(one.scores, num_bins)
    shares = {
        name: np.histogram(one.scores[one.labels == label], edges)[0] / count
        for label, name in enumerate(("normal", "anomalous"))
        if (count := int((one.labels == label).sum()))
    }
    top = max(float(share.max()) for share in shares.values())
    x_ticks, across = _scale(float(edges[0]), float(edges[-1]))
    y_ticks, up = _scale(0.0, 100 * top)
    chart = Chart(
        f"Scores, seed {one.seed}", "anomaly score", "images of the class, %", x_ticks,
        [(SIDE - place, text) for place, text in y_ticks],
    )  # fmt: skip
    for name, share in shares.items():
        x = np.repeat([across(edge) for edge in edges.tolist()], 2)
        heights = [0.0, *np.repeat([up(value) for value in (100 * share).tolist()], 2), 0.0]
        path = _path(x / SIDE, 1 - np.array(heights) / SIDE)
        chart.paths.append((f"area {name}", path + "Z"))
        count = int((one.labels == (name == "anomalous")).sum())
        chart.add_key(f"area {name}", f"{name} ({count})")
    first, last = float(edges[0]), float(edges[-1])
    unit = (last - first) / (across(last) - across(first))  # of the score, per SVG unit
    low = first - across(first) * unit
    chart.seed, chart.span = one.seed, (low, low + SIDE * unit)
    chart.threshold = min(SIDE, max(0.0, across(threshold)))
    chart.add_key("threshold", "threshold")
    return chart


def selection_chart(
    fits: Mapping[int, Sequence[Mapping[str, Any]]], chosen: Mapping[int, Mapping[str, Any]]
) -> Chart | None:
    """Draw the AUROC on synthetic anomalies over time or epochs; None where none is logged.

    Args:
        fits: the records of event "selection", by seed.
        chosen: the record of event "chosen", by seed.
    """
    unit = "time" if any("time" in r for records in fits.values() for r in records) else "step"
    series: list[_Series] = []
    names = list(dict.fromkeys(_name(r["options"]) for rs in fits.values() for r in rs))
    for number, name in enumerate(names):
        for place, (seed, records) in enumerate(fits.items()):
            fit = [r for r in records if _name(r["options"]) == name]
            colour = f"c{number % NUM_COLOURS}" + (" faint" if place else "")
            what = f"synthetic anomalies{name and f', {name}'}"
            points = _points(fit, unit, "synthetic_auroc", 100)
            series.append(_Series(f"line {colour}", what, points))
            tested = _points(fit, unit, "test_image_auroc", 100)
            what = "test images (shown afterwards, chose nothing)"
            series.append(_Series(f"line {colour} dashed", what, tested))
            picked = [r for r in fit if _is_choice(r, chosen.get(seed))]
            series.append(_Series("star", "chosen", _points(picked, unit, "synthetic_auroc", 100)))
    label = "time t" if unit == "time" else "epoch"
    chart = _curves("Selection", label, "AUROC, %", series, logarithmic=unit == "time")
    if chart and len(fits) > 1:
        chart.note = f"Strong: seed {next(iter(fits))}; faint: the other seeds."
    return chart


def step_chart(
    fits: Mapping[int, Sequence[Mapping[str, Any]]], name: str, title: str, *, percent: bool
) -> Chart | None:
    """Draw what was logged after each epoch, a colour for each seed; None below two epochs.

    Args:
        fits: the records of event "step", by seed.
        name: of the value.
        title: of the chart and its y axis.
        percent: show a share of 1 as percent.
    """
    series = [
        _Series(
            f"line c{number % NUM_COLOURS}",
            f"seed {seed}" if len(fits) <= MAX_KEYS else "one line for each seed",
            _points(records, "step", name, 100 if percent else 1),
        )
        for number, (seed, records) in enumerate(fits.items())
    ]
    if max((len(one.points) for one in series), default=0) < 2:
        return None
    return _curves(title, "epoch", title + (", %" if percent else ""), series)


@dataclass(frozen=True)
class _Series:
    """A curve in data units, or stars at its points."""

    mark: str
    text: str
    points: list[tuple[float, float]]


def _curves(
    title: str, x_label: str, y_label: str, series: Sequence[_Series], *, logarithmic: bool = False
) -> Chart | None:
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    xs, ys = zip(*(point for one in drawn for point in one.points), strict=True)
    logarithmic = logarithmic and min(xs) > 0
    x_ticks, across = _scale(min(xs), max(xs), logarithmic=logarithmic, whole=not logarithmic)
    y_ticks, up = _scale(min(ys), max(ys))
    chart = Chart(
        title, x_label, y_label, x_ticks, [(SIDE - place, text) for place, text in y_ticks]
    )
    for one in drawn:
        places = [(across(x), SIDE - up(y)) for x, y in one.points]
        if one.mark == "star":
            chart.stars += [("star", x, y) for x, y in places]
            chart.add_key("star", one.text)
            continue
        columns = np.array(places).T / SIDE  # (2, K)
        chart.paths.append((one.mark, _path(columns[0], columns[1])))
        if "faint" not in one.mark:
            chart.add_key(one.mark, one.text)
    if len(chart.keys) > MAX_KEYS:
        left = len(chart.keys) - MAX_KEYS
        chart.keys[MAX_KEYS:] = [Key("", f"and {left} more")]
    return chart


def _points(
    records: Sequence[Mapping[str, Any]], unit: str, name: str, factor: float
) -> list[tuple[float, float]]:
    """Return the finite points; what is undefined or infinite was logged as null or text."""
    found = [(r.get(unit), r.get(name)) for r in records]
    return [
        (float(x), factor * float(y))
        for x, y in found
        if isinstance(x, (int, float)) and isinstance(y, (int, float)) and math.isfinite(x + y)
    ]


def _scale(low: float, high: float, *, logarithmic: bool = False, whole: bool = False) -> Any:
    """Return ticks, and the function from a value to its place, both in SVG units from the low end.

    The axis reaches from tick to tick or, where it is logarithmic or whole, from value to value.
    """
    if logarithmic:
        first, last = math.log10(low), math.log10(high)
        ticks = [
            10.0**power for power in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
        ]
        span = last - first or 1.0

        def place(value: float) -> float:
            return SIDE * (math.log10(value) - first) / span

    else:
        if high <= low:
            low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
        candidates = np.asarray(MaxNLocator(nbins=5, integer=whole).tick_values(low, high)).tolist()
        if not whole:
            low, high = min(low, candidates[0]), max(high, candidates[-1])
        ticks = [tick for tick in candidates if low - 1e-12 <= tick <= high + 1e-12]

        def place(value: float) -> float:
            return SIDE * (value - low) / (high - low)

    thousands = max(map(abs, ticks), default=0.0) >= 10_000
    return [(place(tick), _number(tick, thousands=thousands)) for tick in ticks], place


def _number(tick: float, *, thousands: bool) -> str:
    return f"{tick / 1000:.6g}k" if thousands and abs(tick) >= 1000 else f"{tick:.6g}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Return path data of points in [0, 1], thinned to what a screen can show.

    Coordinates are rounded to a tenth of an SVG unit, and points without effect left out.
    """
    points: list[tuple[int, int]] = []
    for point in zip(
        np.rint(10 * SIDE * x).astype(int).tolist(),
        np.rint(10 * SIDE * y).astype(int).tolist(),
        strict=True,
    ):
        if points and point == points[-1]:
            continue
        if (
            len(points) > 1
            and (points[-2][0] == points[-1][0] == point[0])
            and ((points[-2][1] <= points[-1][1]) == (points[-1][1] <= point[1]))
        ):
            points[-1] = point  # further along one vertical line
        else:
            points.append(point)
    return "M" + "L".join(f"{px / 10:g} {py / 10:g}" for px, py in points)


def _name(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in options.items())


def _is_choice(record: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> bool:
    if chosen is None:
        return False
    step = {"time": [record["time"]]} if "time" in record else {"epochs": record.get("step")}
    return bool(dict(record["options"]) | step == chosen["options"])
