"""The folder that discover.py writes of a category, and how its tables are read again.

images.csv        image, kind, confidence, ...: what is said of each image
assignments.csv   image, region, kind, confidence, and where the region is: of each region
images/, masks/   the regions as PNG, by the column `piece`
names.csv         kind, name: how the user calls the kinds; edit it, and the names stay
kinds/            a sheet of pictures of each kind
map.png           the regions in two dimensions, coloured by kind
confusion.csv     kinds against the names of the test set's folders, where it has any
state.safetensors, state.json    how new images get the same kinds
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import RunError
from utils.runs.files import corrupt, write_text

IMAGES, ASSIGNMENTS, NAMES = "images.csv", "assignments.csv", "names.csv"
TENSORS, FACTS = "state.safetensors", "state.json"
GOOD = "good"
"""The kind of an image without a mask, and the name of a normal image."""


@dataclass(frozen=True)
class ImageRow:
    """What is said of an image.

    Attributes:
        image: its path.
        kind: what its kind is called, "good" where nothing is inside.
        confidence: 0 to 1; None where nothing is inside.
        number: of the kind, from 1; 0 for good.
        score: of the image.
        name: what the folders of the test set call it; empty where they say nothing.
    """

    image: str
    kind: str
    confidence: float | None
    number: int
    score: float
    name: str


@dataclass(frozen=True)
class RegionRow:
    """What is said of a region; see `ImageRow`.

    Attributes:
        region: number in the image, from 0.
        score: highest value of the map in it.
        area: pixels inside its mask.
        left: first column of its box, in pixels of the image, beyond which a box may reach.
        top: first row.
        right: end of the columns.
        bottom: end of the rows.
        piece: name of its files.
    """

    image: str
    region: int
    kind: str
    confidence: float | None
    number: int
    score: float
    area: int
    left: float
    top: float
    right: float
    bottom: float
    piece: str

    def file(self, what: str) -> Path:
        """Return its file in the folder: of "images" or of "masks"."""
        return Path(what) / f"{self.piece}.png"


Row = TypeVar("Row", ImageRow, RegionRow)


def write_images(folder: Path, rows: Sequence[ImageRow]) -> None:
    """Write images.csv."""
    _write(folder / IMAGES, ImageRow, rows)


def write_assignments(folder: Path, rows: Sequence[RegionRow]) -> None:
    """Write assignments.csv."""
    _write(folder / ASSIGNMENTS, RegionRow, rows)


def read_images(folder: Path) -> list[ImageRow]:
    """Read images.csv.

    Raises:
        RunError: it is not there, or not one that `write_images` wrote.
    """
    return _read(folder / IMAGES, ImageRow)


def read_assignments(folder: Path) -> list[RegionRow]:
    """Read assignments.csv; see `read_images`."""
    return _read(folder / ASSIGNMENTS, RegionRow)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a csv; None is an empty cell, and fractions keep four digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[name]) for name in columns] for row in rows)
    write_text(path, text.getvalue())


def _write(path: Path, kind: type, rows: Sequence[Any]) -> None:
    write_table(path, [entry.name for entry in fields(kind)], [asdict(row) for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _read(path: Path, kind: type[Row]) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); run discover.py") from error
    types = {entry.name: entry.type for entry in fields(kind)}
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if list(reader.fieldnames or ()) != list(types):
        raise corrupt(path, f"its columns are {reader.fieldnames}")
    rows = []
    for number, line in enumerate(reader, start=2):
        try:
            rows.append(kind(**{name: _value(line[name], types[name]) for name in types}))
        except (TypeError, ValueError) as error:
            raise corrupt(path, f"record {number}: {error}") from None
    return rows


def _value(text: str, kind: Any) -> Any:
    if kind in {str, "str"}:
        return text
    if kind in {int, "int"}:
        return int(text)
    return None if text == "" else float(text)
