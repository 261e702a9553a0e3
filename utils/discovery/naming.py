"""Names of kinds that the user gives, and how they stay with the kinds when these change.

Kinds are numbered from 1, the largest first, and a new run of discover.py may number them anew. So
its kinds are first matched with those of the run before by the images that both have.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from utils.discovery.files import GOOD, NAMES
from utils.errors import UsageError
from utils.runs.files import write_text

COLUMNS = ["kind", "name"]


def kind_label(number: int, names: Mapping[int, str]) -> str:
    """Return what a kind is called: by its name, or "kind 1"; below 0, "good"."""
    if number < 0:
        return GOOD
    return names.get(number + 1, f"kind {number + 1}")


def read_names(path: Path) -> dict[int, str]:
    """Read a csv of the columns kind,name: the number of a kind, from 1, and what to call it.

    Raises:
        UsageError: it cannot be read, has other columns, a number twice or one name for two kinds.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a csv of names: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if list(reader.fieldnames or ()) != COLUMNS:
        raise UsageError(f"{path}: the first line must be {','.join(COLUMNS)}")
    names: dict[int, str] = {}
    for line, row in enumerate(reader, start=2):
        number, name = (row["kind"] or "").strip(), (row["name"] or "").strip()
        number = number.removeprefix("kind ")
        if not number.isdecimal() or int(number) < 1:
            raise UsageError(
                f"{path}, line {line}: {row['kind']!r} is no number of a kind, 1 or up"
            )
        if int(number) in names or name in names.values():
            raise UsageError(f"{path}, line {line}: {number},{name} is there twice")
        if name.casefold() == GOOD:
            raise UsageError(f"{path}, line {line}: {GOOD!r} is what images without a defect are")
        if name:
            names[int(number)] = name
    return names


def write_names(folder: Path, names: Mapping[int, str], num_kinds: int) -> None:
    """Write names.csv, a line for each kind, to be filled in."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((number, names.get(number, "")) for number in range(1, num_kinds + 1))
    write_text(folder / NAMES, text.getvalue())


def carried_over(kinds: Mapping[str, int], before: Mapping[str, int], num_kinds: int) -> np.ndarray:
    """Return a new number for each kind, so that kinds keep the number they had.

    Args:
        kinds: image -> kind, from 0; below 0 for good ones.
        before: the same of an earlier finding.
        num_kinds: K of now.

    Returns:
        (K,) a permutation of 0 .. K-1. Kinds are matched by most images in common; those that had
        a number that is now taken, or none, get those left over in their order.
    """
    size = max([num_kinds, *(kind + 1 for kind in before.values())])
    table = np.zeros((size, size), dtype=np.int64)
    for image, kind in kinds.items():
        if kind >= 0 and before.get(image, -1) >= 0:
            table[kind, before[image]] += 1
    matched = dict(zip(*linear_sum_assignment(table, maximize=True), strict=True))
    numbers = np.full(num_kinds, -1)
    for kind, number in matched.items():
        if kind < num_kinds and number < num_kinds and table[kind, number]:
            numbers[kind] = number
    left = [number for number in range(num_kinds) if number not in numbers]
    numbers[numbers < 0] = left
    return numbers
