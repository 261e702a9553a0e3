"""The numbers the papers print, read from figures/published.csv."""

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from utils.errors import RunError

Key = tuple[str, str, str, str]
"""Method, data set, category, metric."""

PUBLISHED_FILE = Path(__file__).parents[2] / "figures" / "published.csv"


def published_by_paper(dataset: str, category: str, metric: str, method: str) -> dict[str, float]:
    """Return a compared method's value in percent, as each paper prints it.

    Args:
        dataset: As on the command line.
        category: A category, or a mean.
        metric: "image_auroc" or "pixel_auroc".
        method: As in the file's first column; one that no paper compares with gives an empty
            answer.

    Raises:
        RunError: The file is missing or unreadable, or a paper contradicts itself.
    """
    found = _read(PUBLISHED_FILE).get((method, dataset, category, metric), {})
    values: dict[str, float] = {}
    for source, value in found.items():
        paper = source.partition(" ")[0]
        if values.setdefault(paper, value) != value:
            raise RunError(
                f"{PUBLISHED_FILE}: {method} on {dataset} {category} {metric} is {found}"
            )
    return values


def published_values(
    dataset: str, category: str, metric: str, methods: Sequence[str] = ("NoCo", "SimpleNet")
) -> dict[str, float]:
    """Return each method's published value in percent; a method without one is left out.

    Args:
        dataset: As on the command line: "mvtec", "cifar10".
        category: A category, or "mean", "mean_textures", "mean_objects".
        metric: "image_auroc" or "pixel_auroc".
        methods: Names as in the file's first column.

    Raises:
        RunError: The file is missing or unreadable, or the papers disagree about a method (each
            printed its own run of it), so that no single value can be given.
    """
    values: dict[str, float] = {}
    table = _read(PUBLISHED_FILE)
    for method in methods:
        found = table.get((method, dataset, category, metric), {})
        if len(set(found.values())) > 1:
            raise RunError(
                f"{PUBLISHED_FILE}: {method} on {dataset} {category} {metric} is {found}"
            )
        if found:
            values[method] = next(iter(found.values()))
    return values


def published_table(source: str) -> dict[Key, float]:
    """Return one table of a paper, (method, dataset, category, metric) -> value, as printed.

    Args:
        source: As in the file's last column: "NoCo Table II".

    Raises:
        RunError: The file is missing or unreadable, or has no such table.
    """
    table = {key: value for key, value, found in _records(PUBLISHED_FILE) if found == source}
    if not table:
        raise RunError(f"{PUBLISHED_FILE}: no row has the source {source!r}")
    return table


@cache
def _read(path: Path) -> dict[Key, dict[str, float]]:
    """Return {(method, dataset, category, metric): {source: percent}}."""
    table: dict[Key, dict[str, float]] = {}
    for key, value, source in _records(path):
        table.setdefault(key, {})[source] = value
    return table


@cache
def _records(path: Path) -> list[tuple[Key, float, str]]:
    """Return (key, value, source) of each row, in the file's order, which is the papers'."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                (
                    (row["method"], row["dataset"], row["category"], row["metric"]),
                    float(row["value"]),
                    row["source"],
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path}: the published numbers cannot be read ({error!r}); "
            "restore the file from the repository"
        ) from None
