"""What is measured of kinds against names, and the table of it beside published values."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.discovery.agreement import agreement
from utils.discovery.files import GOOD
from utils.tables.published import published_values
from utils.tables.table import Cell, Column, Row, Table

MEASURES = ("nmi", "ari", "f1")
LEVELS = ("", "_without_good", "_regions", "_regions_without_good")
"""Images, images with a defect alone, and the same of regions."""
METRICS = tuple(f"{measure}{level}" for level in LEVELS for measure in MEASURES)
PUBLISHED = ("MuSc + AnomalyNCD", "PatchCore + AnomalyNCD", "CPR + AnomalyNCD", "UniFormaly")
MEAN = "mean"


def measured(
    kinds: np.ndarray, names: Sequence[str], region_kinds: np.ndarray, owners: Sequence[int]
) -> dict[str, float]:
    """Measure how kinds agree with names, of images and of regions, with "good" and without.

    Args:
        kinds: (N,) of the images, below 0 for those that were called good, which are a kind too.
        names: (N,) of the images, "good" among them.
        region_kinds: (R,).
        owners: (R,) the images that regions are of; a region's name is its image's.

    Returns:
        `METRICS`, 0 to 1; nan where there is nothing to compare.
    """
    values: dict[str, float] = {}
    region_names = [names[i] for i in owners]
    for level, found, known in (("", kinds, names), ("_regions", region_kinds, region_names)):
        for suffix, rows in (
            ("", list(range(len(known)))),
            ("_without_good", [i for i, name in enumerate(known) if name != GOOD]),
        ):
            here = f"{level}{suffix}"
            if not rows:
                values |= {f"{measure}{here}": float("nan") for measure in MEASURES}
                continue
            agreed = agreement([int(found[i]) for i in rows], [known[i] for i in rows])
            values |= {f"{one}{here}": getattr(agreed, one) for one in MEASURES}
    return values


def confusion(
    labels: Sequence[str], names: Sequence[str]
) -> tuple[list[str], list[str], np.ndarray]:
    """Count images by what was found and by name.

    Args:
        labels: (N,) what each image's kind is called.
        names: (N,) what the folders call it.

    Returns:
        Kinds and names, those that go best together at the same place, and counts (kinds, names).
    """
    kinds, known = sorted(set(labels), key=_place), sorted(set(names), key=_place)
    matched = agreement([kinds.index(one) for one in labels], names).name_of
    first = [matched[i] for i in range(len(kinds)) if i in matched]
    columns = first + [name for name in known if name not in first]
    rows = [kinds[i] for i in range(len(kinds)) if i in matched]
    rows += [kind for kind in kinds if kind not in rows]
    table = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for label, name in zip(labels, names, strict=True):
        table[rows.index(label), columns.index(name)] += 1
    return rows, columns, table


def kinds_table(dataset: str, title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out what was measured in percent, a category a line, beside published values.

    Args:
        dataset: as on the command line; published values are of MVTec AD.
        title: what was run.
        rows: of metrics.csv.
    """
    groups = {"this run": rows}
    columns = [
        Column(f"ours_{measure}", measure.upper(), group="this run", metric=measure, is_ours=True)
        for measure in MEASURES
    ]
    lines = [*(row["category"] for row in rows), *([MEAN] if len(rows) > 1 else [])]
    published = {
        method: {
            (line, measure): value
            for line in (*lines, MEAN)
            for measure in MEASURES
            if (value := published_values(dataset, line, measure, [method]).get(method)) is not None
        }
        for method in PUBLISHED
    }
    shown = [method for method in PUBLISHED if published[method]]
    columns += [
        Column(f"{method}_{measure}", measure.upper(), group=method, metric=measure)
        for method in shown
        for measure in MEASURES
    ]
    body = []
    for line in lines:
        own = [row for row in groups["this run"] if line in (row["category"], MEAN)]
        cells = [Cell(100 * float(np.mean([row[one] for row in own]))) for one in MEASURES]
        cells += [
            Cell(published[method].get((line, measure))) for method in shown for measure in MEASURES
        ]
        body.append(Row(line, line, tuple(cells), block="mean" if line == MEAN else ""))
    notes = [
        "NMI, ARI and F1 (the share that agrees after the best matching) of images in percent, "
        '"good" as one of the names.'
    ]
    if shown:
        notes.append(
            "Published values: all know the number of kinds; figures/published.csv has the sources."
        )
    if any(row["was_estimated"] for row in rows):
        notes.append("The number of kinds was estimated here (--kinds known gives it).")
    if any(row["masks"] == "true" for row in rows):
        notes.append("UPPER BOUND: masks are the data set's own, no detector's.")
    return Table("category", title, tuple(columns), tuple(body), tuple(notes))


def _place(label: str) -> tuple[bool, int, str]:
    """Sort good first, then kinds by number, then by name."""
    number = label.removeprefix("kind ")
    return label != GOOD, int(number) if number.isdecimal() else 0, label
