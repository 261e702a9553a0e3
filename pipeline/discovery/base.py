"""Pieces of defects that have names, which AnomalyNCD learns new kinds beside."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.reading.finding import find_copies
from datasets.reading.images import read_image, read_mask
from datasets.reading.labelled_defects import LabelledDefect, read_labelled_defects
from datasets.samples import DataError
from models.discovery.pieces import Piece
from utils.discovery.files import ASSIGNMENTS, read_assignments
from utils.discovery.regions import boxes_of, crop, save_png
from utils.errors import UsageError

MOST = 2
"""Pieces of a labelled image at most (released)."""


def labelled_pieces(
    base: Path, images: Sequence[Path], folder: Path
) -> tuple[list[tuple[Piece, int]], list[str]]:
    """Return pieces with the number of their kind, and the kinds' names.

    Args:
        base: labelled defects, see `datasets.reading.labelled_defects`; or a folder that
            discover.py wrote of another product.
        images: that new kinds are looked for in; none may be among the labelled ones.
        folder: for the pieces that are cut out here.

    Raises:
        DataError: the folder is neither, or has no defects.
        UsageError: an image is among both.
    """
    if (found := _found_before(base)) is not None:
        pieces, names = _of_discovery(found)
    else:
        defects = read_labelled_defects(base)
        _require_others([defect.image for defect in defects], images, base)
        names = sorted({defect.kind for defect in defects})
        pieces = [
            (piece, names.index(defect.kind))
            for number, defect in enumerate(defects)
            for piece in _pieces(defect, folder / f"{number:05d}")
        ]
    if len(names) < 2:
        raise UsageError(f"--base {base} has one kind of defect; AnomalyNCD learns from several")
    return pieces, names


def _found_before(base: Path) -> Path | None:
    """Return the one folder of kinds that were found, in or below a folder; None without one."""
    if (base / ASSIGNMENTS).is_file():
        return base
    found = sorted((base / "discovery").glob(f"*/*/{ASSIGNMENTS}"))
    if len(found) > 1:
        raise UsageError(
            f"--base {base} has several findings; name one of them: "
            + ", ".join(str(path.parent) for path in found)
        )
    return found[0].parent if found else None


def _of_discovery(folder: Path) -> tuple[list[tuple[Piece, int]], list[str]]:
    rows = [row for row in read_assignments(folder) if row.kind]
    names = sorted({row.kind for row in rows})
    pieces = [
        (
            Piece(folder / row.file("images"), folder / row.file("masks"), 1.0, row.area),
            names.index(row.kind),
        )
        for row in rows
    ]
    return pieces, names


def _require_others(labelled: Sequence[Path], images: Sequence[Path], base: Path) -> None:
    copies = find_copies(labelled, images)
    if copies:
        raise UsageError(
            f"{len(copies)} images of --base {base} are among those whose kinds are looked for "
            f"(first: {copies[0]}): their labels would be known; take defects of other products"
        )


def _pieces(defect: LabelledDefect, stem: Path) -> list[Piece]:
    """Cut a labelled defect out, or take it as it is."""
    mask = read_mask(defect.mask)
    if defect.is_cropped:
        return [Piece(defect.image, defect.mask, 1.0, int(mask.sum()))]
    image = read_image(defect.image)
    if not mask.any():
        raise DataError(f"the mask {defect.mask} marks no pixel; correct or remove it")
    found = []
    for place, box in enumerate(boxes_of(mask, MOST)):
        shown = crop(mask.astype(np.uint8) * 255, box)
        files = [stem.with_name(f"{stem.name}_{place}_{what}.png") for what in ("image", "mask")]
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, pixels in zip(files, (crop(image, box), shown), strict=True):
            save_png(path, pixels)
        found.append(Piece(files[0], files[1], 1.0, int((shown > 0).sum())))
    return found
