"""The folder of a finding, and the table over its categories."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.discovery import DiscoverOptions
from utils.discovery.files import FACTS, write_table
from utils.discovery.measures import METRICS, kinds_table
from utils.errors import RunError
from utils.runs.files import read_object, write_text
from utils.tables.formats import to_markdown, to_text

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


def write_summary(
    options: DiscoverOptions, rows: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Write metrics.csv and table.md, and print what a reader asks first."""
    write_table(folder / "metrics.csv", COLUMNS, rows)
    for row in rows:
        known = f" ({row['names']} names)" if row["names"] else ""
        sys.stdout.write(
            f"{row['category']}: {row['kinds']} kinds{known} in {row['regions']} regions of "
            f"{row['images']} images, {row['seconds']:.1f} s; {folder / row['category']}\n"
        )
    if any(row["names"] for row in rows):
        dataset = ""
        if options.run is not None:
            dataset = str(read_object(options.run / "config.json").get("dataset", ""))
        title = f"Kinds of defects by {options.method_name}, masks by {options.masks_by}"
        table = kinds_table(dataset, title, [row for row in rows if row["names"]])
        write_text(folder / "table.md", to_markdown(table))
        sys.stdout.write(f"\n{to_text(table)}\n")
