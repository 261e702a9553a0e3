"""Kinds of defects that discover.py found in a run: what it measured, and its pictures."""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from figures.report.pictures import Budget, Shown, drawing
from utils.discovery.files import (
    ASSIGNMENTS,
    FACTS,
    IMAGES,
    NAMES,
    TENSORS,
    ImageRow,
    RegionRow,
    read_assignments,
    read_images,
)
from utils.discovery.measures import MEASURES
from utils.discovery.naming import kind_label, read_names
from utils.errors import RunError, UsageError
from utils.runs.files import corrupt

METRICS = "metrics.csv"
GOOD_IS_A_KIND = {"anomalyncd", "whole_image"}
"""Methods that sort good images too, so that these are among the kinds they count."""
SHEET_BYTES = 60_000  # of a full sheet, WIDEST pixels wide
WIDEST, NARROWEST = 960, 400
DRAWING_WIDTH = 760  # of maps and confusions, whose letters are to stay readable
_COUNTS = ("kinds", "was_estimated", "names", "images", "regions")
_COLUMNS = (*MEASURES, "category", "method", "masks", *_COUNTS)


@dataclass(frozen=True)
class Measured:
    """A line of metrics.csv.

    Attributes:
        category: its name, which is a folder beside the file.
        method: by which kinds were found.
        masks: how maps became masks; "true" for the data set's own.
        kinds: how many.
        was_estimated: whether nobody gave that number.
        names: of defects, known from the folders of the test set.
        images: that were looked at.
        regions: in all of them.
        agreement: NMI, ARI and F1 of images in [-1, 1]; nan where no name is known.
    """

    category: str
    method: str
    masks: str
    kinds: int
    was_estimated: bool
    names: int
    images: int
    regions: int
    agreement: tuple[float, ...]

    @property
    def has_names(self) -> bool:
        """Whether kinds were compared with names."""
        return not all(map(math.isnan, self.agreement))


@dataclass(frozen=True)
class Finding:
    """A folder below RUN/discovery.

    Attributes:
        name: of the folder.
        path: of the folder.
        lines: of its metrics.csv; empty where it has none yet.
        left_out: folders of categories without a line.
    """

    name: str
    path: Path
    lines: list[Measured]
    left_out: list[str]

    @property
    def methods(self) -> list[str]:
        """By which kinds were found, each once."""
        return list(dict.fromkeys(line.method for line in self.lines))

    @property
    def masks(self) -> list[str]:
        """How maps became masks, each way once."""
        return list(dict.fromkeys(line.masks for line in self.lines))

    @property
    def counts_good(self) -> bool:
        """Whether a method counts good images as a kind."""
        return not GOOD_IS_A_KIND.isdisjoint(self.methods)

    @property
    def mean(self) -> list[float] | None:
        """NMI, ARI and F1 over the categories with names; None below two of them."""
        known = [line.agreement for line in self.lines if line.has_names]
        if len(known) < 2:
            return None
        return [statistics.fmean(values) for values in zip(*known, strict=True)]


@dataclass(frozen=True)
class Kind:
    """One kind of a category.

    Attributes:
        label: what it is called.
        drawn_as: what the pictures call it, where names.csv was changed since; else empty.
        images: that are of it.
        regions: likewise.
        sheet: of its regions.
    """

    label: str
    drawn_as: str
    images: int
    regions: int
    sheet: Shown


@dataclass(frozen=True)
class CategoryKinds:
    """What the page shows of the kinds of one category.

    Attributes:
        line: of metrics.csv.
        kinds: those that an image or a region has.
        num_good: images in which nothing was found.
        map: the regions in two dimensions.
        confusion: kinds against names; None where no names are known.
        warnings: sentences about files that do not fit each other, or are missing.
    """

    line: Measured
    kinds: list[Kind]
    num_good: int
    map: Shown
    confusion: Shown | None
    warnings: list[str]


def read_findings(folder: Path) -> list[Finding]:
    """Return what lies in RUN/discovery by name, finished or not; nothing where there is none.

    Args:
        folder: RUN/discovery.

    Raises:
        RunError: a metrics.csv is corrupt.
    """
    findings = []
    places = folder.iterdir() if folder.is_dir() else ()
    for path in sorted(place for place in places if place.is_dir()):
        table = path / METRICS
        lines = read_metrics(table) if table.is_file() else []
        shown = {PurePath(line.category).parts[0] for line in lines}
        others = sorted(one.name for one in path.iterdir() if one.is_dir())
        left_out = [name for name in others if lines and name not in shown]
        findings.append(Finding(path.name, path, lines, left_out))
    return findings


def read_metrics(path: Path) -> list[Measured]:
    """Read a metrics.csv of discover.py.

    Raises:
        RunError: it is cut, a column is missing, or a value is none of its column.
    """
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    if not text.endswith("\n"):
        raise corrupt(path, "the last line is cut")
    lines: dict[str, Measured] = {}
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
            raise corrupt(path, f"no column {', '.join(missing)}")
        for number, cells in enumerate(reader, start=2):
            try:
                line = _measured(cells)
            except (TypeError, ValueError) as error:  # a short line has None for text
                raise corrupt(path, f"record {number}: {error}") from None
            if lines.setdefault(line.category, line) is not line:
                raise corrupt(path, f"record {number}: {line.category} is there twice")
    except csv.Error as error:
        raise corrupt(path, str(error)) from None
    if not lines:
        raise corrupt(path, "no category in it")
    return list(lines.values())


def _measured(cells: dict[str, str]) -> Measured:
    counts = {name: int(cells[name]) for name in _COUNTS}
    agreement = tuple(float(cells[name]) for name in MEASURES)
    category = cells["category"]
    if min(counts.values()) < 0:
        raise ValueError("a count is below 0")
    if any(abs(value) > 1 for value in agreement):  # false for nan
        raise ValueError("a measure is not a share of 1")
    # The category is a path below this folder: the page must not show what lies elsewhere.
    if not (parts := PurePath(category).parts) or ".." in parts or PurePath(category).is_absolute():
        raise ValueError(f"{category!r} is no category")
    return Measured(
        category,
        cells["method"],
        cells["masks"],
        counts["kinds"],
        bool(counts["was_estimated"]),
        counts["names"],
        counts["images"],
        counts["regions"],
        agreement,
    )


def sheet_width(findings: Sequence[Finding], num_bytes: int) -> int:
    """Return how wide sheets may be so that about all of them fit.

    Args:
        findings: whose sheets are shown.
        num_bytes: of all their pictures.
    """
    expected = SHEET_BYTES * sum(line.kinds + 1 for one in findings for line in one.lines)
    ratio = math.sqrt(num_bytes / expected) if expected else 1.0
    return max(NARROWEST, min(WIDEST, int(WIDEST * ratio)))


def kinds_of(finding: Finding, width: int, budget: Budget) -> list[CategoryKinds]:
    """Gather what the page shows of each category of a finding.

    Args:
        finding: one of `read_findings`.
        width: greatest of sheets.
        budget: of the pictures.

    Raises:
        RunError: a file of it is corrupt, or images.csv or assignments.csv is missing.
    """
    return [_category(finding.path / line.category, line, width, budget) for line in finding.lines]


def _category(folder: Path, line: Measured, width: int, budget: Budget) -> CategoryKinds:
    images, regions = _rows(folder)
    narrow = min(width, DRAWING_WIDTH)
    overview = drawing(folder / "map.png", narrow, budget)
    # A confusion.png beside images without names is left of a finding before.
    confusion = drawing(folder / "confusion.png", narrow, budget) if line.has_names else None
    return CategoryKinds(
        line,
        _kinds(folder, images, regions, width, budget),
        sum(row.number == 0 for row in images),
        overview,
        confusion,
        _warnings(folder, line, images, regions),
    )


def _rows(folder: Path) -> tuple[list[ImageRow], list[RegionRow]]:
    try:
        images, regions = read_images(folder), read_assignments(folder)
    except csv.Error as error:
        raise corrupt(folder, str(error)) from None
    for path in (folder / IMAGES, folder / ASSIGNMENTS):
        if not path.read_bytes().endswith(b"\n"):
            raise corrupt(path, "the last line is cut")
    return images, regions


def _kinds(
    folder: Path,
    images: Sequence[ImageRow],
    regions: Sequence[RegionRow],
    width: int,
    budget: Budget,
) -> list[Kind]:
    of_images = Counter(row.number for row in images if row.number > 0)
    of_regions = Counter(row.number for row in regions if row.number > 0)
    drawn = {row.number: row.kind for row in regions} | {row.number: row.kind for row in images}
    names = _names(folder)
    kinds = []
    for number in sorted({*of_images, *of_regions}):
        label = drawn[number] if names is None else kind_label(number - 1, names)
        sheet: Shown = (None, "no region, so no sheet")
        if of_regions[number]:
            sheet = drawing(folder / "kinds" / f"{number:02d}.png", width, budget)
        drawn_as = "" if label == drawn[number] else drawn[number]
        kinds.append(Kind(label, drawn_as, of_images[number], of_regions[number], sheet))
    return kinds


def _names(folder: Path) -> dict[int, str] | None:
    """Return the user's names as they are now, which may be after the pictures were drawn."""
    if not (folder / NAMES).is_file():
        return None
    try:
        return read_names(folder / NAMES)
    except UsageError as error:
        raise RunError(str(error)) from error


def _warnings(
    folder: Path, line: Measured, images: Sequence[ImageRow], regions: Sequence[RegionRow]
) -> list[str]:
    warnings = []
    numbers = [row.number for row in images] + [row.number for row in regions]
    greatest = max(numbers, default=0)
    counted, written = (line.images, line.regions), (len(images), len(regions))
    if counted != written or greatest > line.kinds:
        warnings.append(
            f"metrics.csv counts {counted[0]} images, {counted[1]} regions and {line.kinds} kinds; "
            f"images.csv and assignments.csv have {written[0]} and {written[1]}, and kinds up to "
            f"number {greatest}. They are not of the same finding: run discover.py again."
        )
    if absent := [name for name in (NAMES, FACTS, TENSORS) if not (folder / name).is_file()]:
        lost = "" if absent == [NAMES] else " Without its state, new images cannot get these kinds."
        warnings.append(f"Missing: {', '.join(absent)}.{lost}")
    return warnings
