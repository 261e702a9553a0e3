"""A table: columns, rows of numbers, what is best of them, and how each is printed.

`utils.tables.formats` writes it; `figures.shared.table_picture` draws it.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

from configs.options import check_types

Mark = Literal["best", "second", ""]


@dataclass(frozen=True)
class Cell:
    """A number, or a text in its place.

    Attributes:
        mean: as it is printed, mostly in percent; None where there is none, nan where undefined.
        std: over seeds; None for one seed and for published numbers.
        num_seeds: 0 where it is not told.
        found: how many of `total` categories the mean is over, where it is not over all.
        total: categories of the data set.
        is_ranked: takes part where the best is marked.
        text: in place of a number; None for a number.
    """

    mean: float | None = None
    std: float | None = None
    num_seeds: int = 0
    found: int | None = None
    total: int | None = None
    is_ranked: bool = True
    text: str | None = None

    @property
    def is_complete(self) -> bool:
        """A number over all of its categories, which may be ranked."""
        return self.mean is not None and self.found is None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: in the csv.
        name: heading.
        group: heading over neighbouring columns; "" for none.
        metric: what it holds; where rows are ranked, only cells of one metric compete.
        digits: format of its numbers, as "{:.1f}" has it after the colon.
        is_ours: filled from run folders only.
        is_ranked: whether its best value means anything.
        is_own: holds what is published of the method that the table is of.
    """

    key: str
    name: str
    group: str = ""
    metric: str = "image_auroc"
    digits: str = ".1f"
    is_ours: bool = False
    is_ranked: bool = True
    is_own: bool = False

    def text_of(self, cell: Cell, hole: str) -> str:
        """Print a cell: `99.2`, `97.1 ± 0.2`, `97.1 (3 of 15)`, a dash where it is undefined."""
        if cell.text is not None:
            return cell.text
        if cell.mean is None:
            return hole
        if math.isnan(cell.mean):
            return "–"
        digits = self.digits
        if digits == ".1f" and self.metric == "trainable" and 0 < cell.mean < 0.1:
            digits = ".2g"
        text = f"{cell.mean:{digits}}"
        if cell.found is not None:
            is_all = cell.found == cell.total
            reason = "no seed complete" if is_all else f"{cell.found} of {cell.total}"
            return f"{text} ({reason})"
        return text if cell.std is None else f"{text} ± {cell.std:{digits}}"


@dataclass(frozen=True)
class Row:
    """A row of a table: `key` in the csv, `label` in print; a rule sets blocks apart."""

    key: str
    label: str
    cells: tuple[Cell, ...]
    block: str = ""
    is_ours: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        corner: heading of the first column.
        caption: above it.
        columns: in order.
        rows: in order.
        notes: below it.
        rank_along: which cells compete: those of a column, those of a row and one metric, or none.
        hole: what stands where there is no number.
    """

    corner: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    rank_along: Literal["column", "row", "nothing"] = "nothing"
    hole: str = ""

    def texts(self) -> list[list[str]]:
        """Return each cell as printed."""
        return [
            [c.text_of(cell, self.hole) for cell, c in zip(row.cells, self.columns, strict=True)]
            for row in self.rows
        ]

    def marks(self) -> list[list[Mark]]:
        """Mark the best and the second best of what competes, by the values as printed.

        Equal values share their mark; a number without a competitor has none.
        """
        competing: dict[tuple[int, str], list[tuple[int, int, float]]] = {}
        for r, row in enumerate(self.rows if self.rank_along != "nothing" else ()):
            for c, (cell, column) in enumerate(zip(row.cells, self.columns, strict=True)):
                is_in = column.is_ranked and cell.is_ranked and cell.is_complete
                if is_in and cell.mean is not None and not math.isnan(cell.mean):
                    place = (c, "") if self.rank_along == "column" else (r, column.metric)
                    value = float(f"{cell.mean:{column.digits}}")
                    competing.setdefault(place, []).append((r, c, value))
        marks: list[list[Mark]] = [["" for _ in self.columns] for _ in self.rows]
        for cells in competing.values():
            ranks = sorted({value for *_, value in cells}, reverse=True)
            for r, c, value in cells if len(cells) > 1 else []:
                marks[r][c] = "best" if value == ranks[0] else ""
                if len(ranks) > 1 and value == ranks[1]:
                    marks[r][c] = "second"
        return marks

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, which are read from the left."""
        return bool(self.rows) and all(row.cells[column].text is not None for row in self.rows)

    def groups(self) -> list[tuple[str, int, int]]:
        """Return (group, first column, end column) of neighbours with one heading."""
        return neighbours(column.group for column in self.columns)

    def blocks(self) -> list[list[int]]:
        """Return the rows between rules."""
        return [
            [place for place, _ in rows]
            for _, rows in groupby(enumerate(self.rows), key=lambda pair: pair[1].block)
        ]

    def to_json(self) -> str:
        """Return all of it as JSON; nan is written as it is, which Python reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Return the table of `to_json`.

        Raises:
            ValueError: the text is none.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            columns = tuple(Column(**column) for column in values.pop("columns"))
            rows = tuple(
                Row(**{**row, "cells": tuple(Cell(**cell) for cell in row["cells"])})
                for row in values.pop("rows")
            )
            table = cls(columns=columns, rows=rows, notes=tuple(values.pop("notes")), **values)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a table: {error!r}") from error
        for part in (table, *columns, *rows, *(cell for row in rows for cell in row.cells)):
            check_types(part)
        if unknown := [c.digits for c in columns if not re.fullmatch(r"(\.\d)?[dfg]", c.digits)]:
            raise ValueError(f"numbers cannot be printed as {unknown[0]!r}")
        if any(len(row.cells) != len(columns) for row in rows):
            raise ValueError("a row has not the columns' number of cells")
        table.texts()  # raises where a number cannot be printed as its column says
        return table


def neighbours(groups: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return (group, first column, end column) of each run of columns with one heading."""
    found = []
    for group, columns in groupby(enumerate(groups), key=lambda pair: pair[1]):
        places = [place for place, _ in columns]
        found.append((group, places[0], places[-1] + 1))
    return found
