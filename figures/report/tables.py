"""The tables of a run report, read back from a run folder."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from figures.shared.run_log import Pair
from utils.metrics.metrics import METRIC_NAMES
from utils.runs.files import corrupt
from utils.tables.table import Cell, Column, Line, Table
from utils.tables.results import METRIC_LABELS, build_table

_KEYS = ("category", "seed", "select")
_ALARMS = re.compile("false_alarm|calibration_images|test_normals")
"""Found in the names of columns about alarms on normal images."""


@dataclass(frozen=True)
class Facts:
    """A plain table: names of columns, and rows of texts with the category they are about."""

    names: list[str]
    rows: list[tuple[str, list[str]]]


def results_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return the table a run wrote, or one of what is finished; None where nothing is.

    Numbers come from table.csv, in full; headings, caption and notes from table.md.

    Raises:
        RunError: table.csv is corrupt.
    """
    path = folder / "table.csv"
    if not path.is_file():
        return _partial(rows)
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    try:
        names, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        numbers = [
            {n: float(f) for n, f in zip(names[1:], line[1:], strict=True) if f} for line in lines
        ]
    except (csv.Error, ValueError) as error:
        raise corrupt(path, str(error)) from None
    stds = {name for name in names if name.endswith("_std") and name[:-4] in names}
    keys = [name for name in names[1:] if name not in stds]
    categories = {row["category"] for row in rows}
    table = Table(
        caption="",
        header=tuple(Column(key, "", key, f"{key}_std" in stds) for key in keys),
        lines=tuple(
            Line(
                line[0],
                line[0],
                tuple(Cell(found.get(key), found.get(f"{key}_std")) for key in keys),
                is_mean=line[0] not in categories,
            )
            for line, found in zip(lines, numbers, strict=True)
        ),
        notes=(),
    )
    if missing := categories - {line.key for line in table.lines}:
        note = f"Older than results.csv: without {', '.join(sorted(missing))}."
        table = replace(table, notes=(note,))
    markdown = folder / "table.md"
    if not markdown.is_file():
        return table
    return _worded(table, markdown.read_bytes().decode("utf-8", "surrogateescape"))


def _worded(table: Table, markdown: str) -> Table:
    """Return the table with caption, headings, labels and notes of its Markdown."""
    lines = markdown.splitlines()
    fields = [_fields(line) for line in lines if line.startswith("|")]
    notes = [_plain(line[2:]) for line in lines if line.startswith("- ")]
    table = replace(table, caption=_plain(lines[0]) if lines else "", notes=(*table.notes, *notes))
    heads, body = fields[0] if fields else [], fields[2:]
    if len(heads) != len(table.header) + 1 or len(body) != len(table.lines):
        return table  # edited by hand: the numbers count
    header = []
    for column, head in zip(table.header, heads[1:], strict=True):
        name, _, group = head.partition("<br>")
        header.append(replace(column, name=name, group=group))
    return replace(
        table,
        header=tuple(header),
        lines=tuple(replace(a, label=b[0]) for a, b in zip(table.lines, body, strict=True)),
    )


def _fields(line: str) -> list[str]:
    return [_plain(text) for text in re.findall(r"((?:\\.|[^|\\])*)\|", line)[1:]]


def _plain(text: str) -> str:
    return re.sub(r"\\([\\`*\[\]<>|_])", r"\1", text.strip())


def _partial(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return the table over the categories that are finished for the seeds of the first one."""
    if not rows:
        return None
    selects = {row["select"] for row in rows}
    done = {(row["category"], row["seed"]) for row in rows}
    seeds = [seed for category, seed in sorted(done) if category == rows[0]["category"]]
    names = list(dict.fromkeys(row["category"] for row in rows))
    categories = [name for name in names if all((name, seed) in done for seed in seeds)]
    shown = [row for row in rows if row["category"] in categories and row["seed"] in seeds]
    metrics = [
        name
        for name in METRIC_LABELS
        if all(isinstance(row.get(name), (int, float)) for row in shown)
        and any(not math.isnan(row[name]) for row in shown)
    ]
    if not metrics or len(shown) != len(categories) * len(seeds) * len(selects):
        return None
    return build_table(
        shown,
        title="What is finished",
        categories=categories,
        seeds=seeds,
        metrics=metrics,
        dataset=None,
    )


def unfinished_pairs(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], seen: Sequence[Pair]
) -> list[str]:
    """Name what was asked for or begun and has no result yet."""
    wanted = {key: config.get(key) for key in ("categories", "seeds")}
    listed = {key: value if isinstance(value, list) else [] for key, value in wanted.items()}
    categories = listed["categories"] or list(dict.fromkeys(name for name, _ in seen))
    asked = [(str(name), seed) for name in categories for seed in listed["seeds"]]
    finished = {(row["category"], row["seed"]) for row in rows}
    return [f"{c}, seed {s}" for c, s in dict.fromkeys([*asked, *seen]) if (c, s) not in finished]


def false_alarms(rows: Sequence[Mapping[str, Any]]) -> Facts | None:
    """Return the columns about false alarms; None where the run recorded none."""
    return _facts(rows, [name for name in _columns(rows) if _ALARMS.search(name)])


def other_facts(rows: Sequence[Mapping[str, Any]]) -> Facts | None:
    """Return every column that is neither a metric nor about false alarms, known or not."""
    return _facts(
        rows, [n for n in _columns(rows) if n not in METRIC_NAMES and not _ALARMS.search(n)]
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (rows[0] if rows else ()) if name not in _KEYS]


def _facts(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Facts | None:
    kept = [name for name in names if any(row.get(name) not in ("", None) for row in rows)]
    if not kept:
        return None
    return Facts(
        [name.replace("_", " ") for name in (*_KEYS, *kept)],
        [
            (row["category"], [_shown(row.get(name, "")) for name in (*_KEYS, *kept)])
            for row in rows
        ],
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
