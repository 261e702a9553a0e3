"""What runs cost: the times and sizes that stand beside accuracy."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.tables.table import Cell, Column

SHOWN = {
    "fit_seconds": ("fit, s", ".3g"),
    "images_per_second": ("images/s", ".4g"),
    "memory_megabytes": ("memory, MB", ".0f"),
    "head_megabytes": ("head, MB", ".3g"),
}
"""Attribute of `Costs` -> heading, and the format of its numbers."""


@dataclass(frozen=True)
class Costs:
    """What fits and scoring cost; nan where no row says.

    Attributes:
        fit_seconds: mean of a fit, from stored features or images to a fitted head.
        images_per_second: test images from file to map, the backbone included.
        memory_megabytes: the most that a fit and its scoring took, 10^6 bytes: of a GPU what
            tensors take, else the resident memory of the process.
        head_megabytes: what is stored beside the backbone, 10^6 bytes; the mean of heads.
    """

    fit_seconds: float
    images_per_second: float
    memory_megabytes: float
    head_megabytes: float


def columns() -> list[Column]:
    """Return the columns of costs; `cells` fills them."""
    return [Column(name, heading, digits=digits) for name, (heading, digits) in SHOWN.items()]


def cells(costs: Costs) -> list[Cell]:
    """Return the cells of `columns`."""
    return [Cell(getattr(costs, name)) for name in SHOWN]


def costs_of(rows: Sequence[Mapping[str, Any]]) -> Costs:
    """Return the costs of rows of results.csv; columns that earlier versions lack may be absent."""
    # Where nothing is stored the pass takes no time of its own: it is a part of the scoring.
    names = ("num_test", "pass_test_seconds", "score_seconds")
    timed = [row for row in rows if all(is_known(row.get(name)) for name in names)]
    images, passes, scoring = (sum(float(row[name]) for row in timed) for name in names)
    memory = _known(rows, "peak_bytes")
    return Costs(
        _mean(_known(rows, "fit_seconds")),
        images / (passes + scoring) if passes + scoring else math.nan,
        max(memory) / 1e6 if memory else math.nan,
        _mean(_known(rows, "head_bytes")) / 1e6,
    )


def is_known(value: Any) -> bool:
    """Whether a value of a row is a number, and not nan."""
    return isinstance(value, int | float) and not math.isnan(value)


def _known(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if is_known(row.get(name))]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
