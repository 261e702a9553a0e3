"""The folder of a finding, and the table over its categories."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.discovery import DiscoverOptions
from utils.discovery.files import FACTS, write_table
from utils.discovery.measures import METRICS, kinds_table
from utils.errors import RunError
from utils.runs.files import corrupt, read_object, write_text
from utils.tables.formats import to_markdown, to_text

METRICS_FILE = "metrics.csv"
TEXTS = ("category", "method", "masks")
COLUMNS = (
    *METRICS,
    *("category", "method", "masks", "kinds", "was_estimated", "names", "images", "regions"),
    "seconds",
)


def folder_of(options: DiscoverOptions) -> Path:
    """Return the folder that is written: below the run, or where the user says."""
    if options.out is not None:
        return options.out
    assert options.run is not None
    return options.run / "discovery" / options.folder_name


def require_found(folder: Path) -> None:
    """Refuse to give new images kinds before any were found.

    Raises:
        RunError: the folder has no finding.
    """
    if not any(folder.glob(f"*/{FACTS}")):
        raise RunError(f"{folder}: no kinds were found yet; run discover.py without --assign first")


def write_row(row: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Write a category's row into metrics.csv, beside those of other categories; return all."""
    path = folder / METRICS_FILE
    rows = [one for one in read_rows(path) if one["category"] != row["category"]]
    rows = sorted([*rows, dict(row)], key=lambda one: str(one["category"]))
    write_table(path, COLUMNS, rows)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read metrics.csv; nothing where there is none, or one of other columns.

    Raises:
        RunError: a number is none.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            return []
        try:
            return [{name: _value(name, text) for name, text in line.items()} for line in reader]
        except (TypeError, ValueError) as error:
            raise corrupt(path, str(error)) from None


def write_summary(
    options: DiscoverOptions, rows: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Write table.md, and print the table beside published values, where names are known."""
    known = [row for row in rows if row["names"]]
    if not known:
        return
    dataset = ""
    if options.run is not None:
        dataset = str(read_object(options.run / "config.json").get("dataset", ""))
    title = f"Kinds of defects by {options.method_name}, masks by {options.masks_by}"
    table = kinds_table(dataset, title, known)
    write_text(folder / "table.md", to_markdown(table))
    sys.stdout.write(f"\n{to_text(table)}\n")


def say(row: Mapping[str, Any], folder: Path) -> None:
    """Print what a reader asks first of a category."""
    names = f" ({row['names']} names)" if row["names"] else ""
    sys.stdout.write(
        f"{row['category']}: {row['kinds']} kinds{names} in {row['regions']} regions of "
        f"{row['images']} images, {row['seconds']:.1f} s; {folder / str(row['category'])}\n"
    )


def _value(name: str, text: str) -> Any:
    if name in TEXTS:
        return text
    return int(text) if text.isdecimal() else float(text)
