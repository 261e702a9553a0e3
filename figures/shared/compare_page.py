"""A page that compares methods: the table, ranks over the data sets, accuracy against time."""

import base64
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from figures.shared.drawing import COLOURS
from figures.shared.ranks import draw_bars, draw_ranks, in_words, rank_methods, table_of_ranks
from utils.metrics.metrics import heading_of
from utils.pictures.words import without_formulas
from utils.runs.files import write_text
from utils.tables.formats import write
from utils.tables.table import Table

Seeds = Mapping[str, Mapping[str, Sequence[float]]]
"""Data set -> method -> a value for each seed, in percent; nan where undefined."""
CSS = Path(__file__).parents[1] / "report" / "page.css"
_DPI = 110


@dataclass
class Part:
    """A section of the page.

    Attributes:
        key: its anchor.
        title: its heading.
        words: sentences above the pictures.
        pictures: data URL, and what is seen.
        table: above the pictures.
    """

    key: str
    title: str
    words: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    table: Table | None = None


def write_page(
    path: Path, table: Table, values: Mapping[str, Seeds], against_time: Figure
) -> list[Path]:
    """Write a page that needs no other file, and each table of ranks by itself; return the paths.

    Args:
        path: of the page.
        table: of all lines.
        values: by name of the metric.
        against_time: accuracy against the seconds of a fit.
    """
    parts = [part for metric, of_sets in values.items() if (part := ranks_part(metric, of_sets))]
    time = Part("time", "Accuracy against time", ["Upper left is good and fast."])
    time.pictures.append((_url(against_time), "accuracy against the seconds of a fit"))
    bars = Part("bars", "Each data set")
    for metric, of_sets in values.items():
        known = {name: v for name, v in of_sets.items() if _is_known(v)}
        if known:
            drawn = draw_bars(known, f"{heading_of(metric)}, %, ± deviation over seeds", COLOURS)
            bars.pictures.append((_url(drawn), f"{heading_of(metric)} on each data set"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = zip
    page = environment.get_template("compare.html.jinja").render(
        table=table, parts=[*parts, time, bars], css=CSS.read_text(encoding="utf-8")
    )
    write_text(path, page)
    paths = [path]
    for part in parts:
        if part.table is not None:
            stem = path.with_name(f"{path.stem}_{part.key}")
            paths += write(replace(part.table, caption=" ".join(part.words)), stem, (".md",))
    return paths


def ranks_part(metric: str, of_sets: Seeds) -> Part | None:
    """Return the ranks of methods by a metric; None where no two share two data sets or more."""
    methods = dict.fromkeys(name for of_methods in of_sets.values() for name in of_methods)
    known = {name: v for name, v in of_sets.items() if _is_known(v)}
    ranks = rank_methods(
        {
            method: {
                name: statistics.fmean(of_methods[method])
                for name, of_methods in known.items()
                if method in of_methods
            }
            for method in methods
        }
    )
    if ranks is None or len(ranks.data_sets) < 2:
        return None
    heading = heading_of(metric)
    part = Part(f"ranks_{metric}", f"Ranks by {heading}", in_words(ranks))
    part.table = table_of_ranks(known, ranks)
    part.pictures.append((_url(draw_ranks(ranks)), f"mean ranks by {heading}"))
    return part


def _is_known(of_methods: Mapping[str, Sequence[float]]) -> bool:
    """Whether a data set has the metric at all."""
    return any(not math.isnan(statistics.fmean(seeds)) for seeds in of_methods.values())


def _url(figure: Figure) -> str:
    buffer = io.BytesIO()
    without_formulas(figure).savefig(buffer, format="png", dpi=_DPI)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
