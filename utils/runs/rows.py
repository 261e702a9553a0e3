"""The rows of a results.csv: numbers and words that read back unchanged."""

import csv
import io
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.runs.files import SELECTS, corrupt, write_text

LATER_COLUMNS = ("peak_bytes",)
"""Columns that earlier versions did not write."""
_INT = re.compile(r"-?[0-9]+")
_FLOAT = re.compile(r"-?(?:[0-9]+\.[0-9]+(?:e[+-]?[0-9]+)?|[0-9]+e[+-]?[0-9]+|inf)|nan")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results.csv, or raise RunError naming it and the record."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    if not text.endswith("\n"):
        raise corrupt(path, "the last line is cut")
    try:
        columns, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    except csv.Error as error:
        raise corrupt(path, str(error)) from None
    if columns[:3] != ["category", "seed", "select"]:
        raise corrupt(path, f"its columns are {columns}")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=2):
        if len(line) != len(columns) or not _INT.fullmatch(line[1]) or line[2] not in SELECTS:
            raise corrupt(path, f"record {number}: {','.join(line)!r}")
        try:
            row = {name: _decode(name, text) for name, text in zip(columns, line, strict=True)}
        except ValueError as error:  # an integer of thousands of digits
            raise corrupt(path, f"record {number}: {error}") from None
        if rows.setdefault(tuple(line[:3]), row) is not row:
            raise corrupt(path, f"record {number} is there twice: {','.join(line[:3])!r}")
    return list(rows.values())


def with_later_columns(*parts: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return parts of a results.csv with the later columns that any of them has; nan where not."""
    later = [name for name in LATER_COLUMNS if any(name in row for rows in parts for row in rows)]
    return [[{**row, **{n: row.get(n, math.nan) for n in later}} for row in rows] for rows in parts]


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows whose values are ints, floats or strings; `read_rows` returns them unchanged."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_encode(name, row[name]) for name in columns] for row in rows)
    write_text(path, text.getvalue())


def _decode(column: str, text: str) -> str | int | float:
    if column in ("category", "select"):
        return text
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _encode(column: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        raise TypeError(f"column {column!r}: {value!r} is not an int, a float or a string")
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if not isinstance(value, str):
        return repr(float(value))  # the shortest text that reads back to the same bits
    if _decode(column, value) is not value or "\r" in value:
        raise ValueError(f"column {column!r}: the string {value!r} would not be read back as it is")
    return value
