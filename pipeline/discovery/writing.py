"""Writes what was found of a category: tables, pictures, and what new images are told by."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.discovery import DiscoverOptions
from models.discovery.pieces import read_piece
from pipeline.discovery.collecting import Collected, Region
from pipeline.discovery.finding import Found, numbered
from pipeline.discovery.looking import Looked
from utils.discovery.files import (
    GOOD,
    IMAGES,
    NAMES,
    ImageRow,
    RegionRow,
    read_images,
    write_assignments,
    write_images,
    write_table,
)
from utils.discovery.measures import METRICS, confusion, measured
from utils.discovery.naming import carried_over, kind_label, read_names, write_names
from utils.pictures.kinds import Shown, save_confusion, save_map, save_sheet


def renumbered(found: Found, looked: Looked, folder: Path) -> Found:
    """Give kinds the numbers that they had when the folder was written before, if it was."""
    if not (folder / IMAGES).is_file():
        return found
    before = {row.image: row.number - 1 for row in read_images(folder)}
    now = {str(path): int(kind) for path, kind in zip(looked.paths, found.kinds, strict=True)}
    numbers = carried_over(now, before, found.num_kinds)
    return replace(
        found,
        kinds=numbered(found.kinds, numbers),
        region_kinds=numbered(found.region_kinds, numbers),
        state={**found.state, "numbers": torch.from_numpy(numbers)},
    )


def names_of(options: DiscoverOptions, folder: Path) -> dict[int, str]:
    """Return the user's names: those given now, or those in the folder."""
    if options.names is not None:
        return read_names(options.names)
    return read_names(folder / NAMES) if (folder / NAMES).is_file() else {}


def write_found(
    options: DiscoverOptions, looked: Looked, collected: Collected, found: Found, folder: Path
) -> dict[str, Any]:
    """Write all that a reader looks at, and return the category's row of metrics.csv."""
    names = names_of(options, folder)
    labels = [kind_label(int(kind), names) for kind in found.kinds]
    region_labels = [kind_label(int(kind), names) for kind in found.region_kinds]
    write_rows(folder, looked, collected, found, names)
    write_names(folder, names, found.num_kinds)
    title = f"{looked.category}: kinds found by {options.method_name}"
    _write_sheets(folder / "kinds", looked.category, collected, found, region_labels)
    save_map(
        folder / "map.png", title, found.points, region_labels, random_seed=options.random_seed
    )
    values = dict.fromkeys(METRICS, float("nan"))
    for name in ("confusion.png", "confusion.csv"):
        (folder / name).unlink(missing_ok=True)  # of images that had names
    if looked.names is not None:
        owners = [region.image for region in collected.regions]
        values = measured(found.kinds, looked.names, found.region_kinds, owners)
        rows, columns, counts = confusion(labels, looked.names)
        save_confusion(folder / "confusion.png", title, rows, columns, counts)
        table = [
            {"kind": row, **dict(zip(columns, map(int, line), strict=True))}
            for row, line in zip(rows, counts, strict=True)
        ]
        write_table(folder / "confusion.csv", ["kind", *columns], table)
    known = set(looked.names or ()) - {GOOD}
    return {
        **values,
        "category": looked.category,
        "method": options.method_name,
        "masks": options.masks_by,
        "kinds": found.num_kinds,
        "was_estimated": int(found.was_estimated),
        "names": len(known),
        "images": len(looked.paths),
        "regions": len(collected.regions),
    }


def write_rows(
    folder: Path,
    looked: Looked,
    collected: Collected,
    found: Found,
    names: Mapping[int, str],
) -> None:
    """Write images.csv and assignments.csv."""
    known = looked.names or [""] * len(looked.paths)
    images = [
        ImageRow(
            str(path),
            kind_label(int(kind), names),
            _or_none(confidence),
            int(kind) + 1,
            score,
            name,
        )
        for path, kind, confidence, score, name in zip(
            looked.paths, found.kinds, found.confidences, collected.scores, known, strict=True
        )
    ]
    write_images(folder, images)
    write_assignments(
        folder,
        [
            _region_row(region, images[region.image].image, int(kind), confidence, names)
            for region, kind, confidence in zip(
                collected.regions, found.region_kinds, found.region_confidences, strict=True
            )
        ],
    )


def _region_row(
    region: Region, image: str, kind: int, confidence: float, names: Mapping[int, str]
) -> RegionRow:
    box = region.box
    return RegionRow(
        image,
        region.number,
        kind_label(kind, names),
        _or_none(confidence),
        kind + 1,
        region.peak,
        region.piece.area,
        box.left,
        box.top,
        box.right,
        box.bottom,
        region.piece.image.stem,
    )


def _write_sheets(
    folder: Path,
    category: str,
    collected: Collected,
    found: Found,
    labels: Sequence[str],
) -> None:
    """Write a sheet of each kind, its surest regions first."""
    if folder.is_dir():
        for path in folder.glob("*.png"):
            path.unlink()  # of a kind that is no more
    for kind in range(found.num_kinds):
        (rows,) = (found.region_kinds == kind).nonzero()
        if not len(rows):
            continue
        sure = found.region_confidences[rows]
        rows = rows[np.argsort(-np.nan_to_num(sure), kind="stable")]
        save_sheet(
            folder / f"{kind + 1:02d}.png",
            f"{category}, {labels[rows[0]]}: {len(rows)} regions, the surest first",
            [f"{found.region_confidences[row]:.2f}" for row in rows],
            functools.partial(_shown, collected.regions, rows),
        )


def _shown(regions: Sequence[Region], rows: np.ndarray, place: int) -> Shown:
    image, mask = read_piece(regions[rows[place]].piece)
    return np.array(image), np.array(mask) > 0


def _or_none(confidence: float) -> float | None:
    return None if np.isnan(confidence) else float(confidence)
