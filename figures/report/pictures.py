"""Pictures of a run report, small enough to stand inside the page."""

import base64
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from figures.report.scores import Ranked
from utils.pictures.overlays import GAP, HEADER, SHEET_NAMES, TITLE
from utils.runs.files import corrupt

MAX_BYTES = 9_000_000
"""Of all pictures of a report; as text, which is a third longer, 12 MB."""
THUMBNAIL = 128  # greatest side, pixels
SHEET_WIDTH = 760  # of strips, and of a sheet that is shown whole
TWINS = "twins.png"
"""The picture of near-duplicates, which stands among the leaks."""
MAX_PIXELS = 100_000_000  # of an image that is opened for its thumbnail
_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """A picture as the text of a data URL, with its size in pixels."""

    url: str
    width: int
    height: int


Shown = tuple[Picture | None, str]
"""A picture, or None and why there is none."""


@dataclass(frozen=True)
class Strip:
    """The panels of one image, cut from an overlay sheet, and how wrong the image is."""

    picture: Picture
    image: Ranked


@dataclass(frozen=True)
class Overlays:
    """What the overlay sheets of a category give.

    Attributes:
        strips: of the highest normals and the lowest anomalies.
        scale: the sheets' colour bar and panel names; None without strips.
        sheets: title and picture of what is shown whole.
    """

    strips: list[Strip]
    scale: Picture | None
    sheets: list[tuple[str, Picture]]


class Budget:
    """How many bytes the pictures of a part of the page may take; what does not fit is counted.

    Args:
        num_bytes: of the encoded pictures.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self.spent = 0
        self.num_refused = 0

    def encode(self, image: Image.Image, max_side: int, kind: str = "webp") -> Picture | None:
        """Return the picture with neither side above `max_side`; None where it does not fit."""
        image = image.convert("RGB")
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        buffer = io.BytesIO()
        image.save(buffer, format=kind, quality=_QUALITY)
        if len(buffer.getvalue()) > self._left:
            self.num_refused += 1
            return None
        self._left -= len(buffer.getvalue())
        self.spent += len(buffer.getvalue())
        text = base64.b64encode(buffer.getvalue()).decode("ascii")
        return Picture(f"data:image/{kind};base64,{text}", *image.size)


def overlays_of(folder: Path, images: Sequence[Ranked], num_worst: int, budget: Budget) -> Overlays:
    """Read the pictures of a category: the sheets of the worst as strips, the others whole.

    A sheet that does not have the size it should have for `num_worst` images is shown whole. The
    picture of near-duplicates is left to the leaks.

    Args:
        folder: overlays/<category>-seed<k> of the run.
        images: all test images, ranked by the scores the pictures were made of.
        num_worst: lines of the sheets of highest normals and lowest defects, at most.
        budget: of the category.

    Raises:
        RunError: a picture cannot be read.
    """
    strips: list[Strip] = []
    scale = None
    whole: list[tuple[str, Image.Image]] = []
    by_rank = sorted(images, key=lambda image: image.rank)
    worst = {
        name: [image for image in by_rank if image.anomalous is anomalous]
        for name, anomalous in zip(SHEET_NAMES[:2], (False, True), strict=True)
    }
    for path in sorted(path for path in folder.glob("*.png") if path.name != TWINS):
        sheet = _opened(path)
        drawn = worst.get(path.name, [])[:num_worst]
        lines = _cut(sheet, len(drawn))
        if lines is None:
            whole.append((path.stem.replace("_", " "), sheet))
            continue
        if scale is None:
            scale = budget.encode(_scale_of(sheet), SHEET_WIDTH)
        for line, ranked in zip(lines, drawn, strict=True):
            picture = budget.encode(line, SHEET_WIDTH)
            if picture is not None:
                strips.append(Strip(picture, ranked))
    sheets = []
    for title, sheet in whole:
        picture = _no_wider(sheet, SHEET_WIDTH, budget)
        if picture is not None:
            sheets.append((title, picture))
    return Overlays(sorted(strips, key=lambda strip: strip.image.urgency), scale, sheets)


def drawing(path: Path, width: int, budget: Budget) -> Shown:
    """Return a drawing of the run folder, no wider than `width`, or None and why there is none.

    Raises:
        RunError: it is there and cannot be read.
    """
    if not path.is_file():
        return None, f"{path.name} is missing"
    picture = _no_wider(_opened(path), width, budget)
    return picture, "" if picture else f"{path.name} is left out for size"


def thumbnail(path: Path, budget: Budget) -> Shown:
    """Return a small picture of an image file, or None and why there is none."""
    if not path.is_file():
        return None, "image not found"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None, "image too large"
                image.draft("RGB", (THUMBNAIL, THUMBNAIL))
                picture = budget.encode(_visible(ImageOps.exif_transpose(image)), THUMBNAIL, "jpeg")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning) as error:
        return None, f"image cannot be read ({type(error).__name__})"
    except Image.DecompressionBombError:
        return None, "image too large"
    return picture, "" if picture else "left out for size"


def _visible(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits: deeper ones are stretched from their least to greatest value."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    return Image.fromarray((255 * (values - low) / ((high - low) or 1.0)).astype(np.uint8))


def _no_wider(image: Image.Image, width: int, budget: Budget) -> Picture | None:
    """Return the picture with its width, and not its height, bounded."""
    ratio = min(1.0, width / image.width)
    return budget.encode(image, math.ceil(ratio * max(image.size)))


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise corrupt(path, str(error)) from None


def _scale_of(sheet: Image.Image) -> Image.Image:
    """Return the colour bar and the panels' names of a sheet, without the words about its ranks."""
    scale = sheet.crop((0, 28, sheet.width, HEADER))
    middle = GAP + (sheet.width - GAP) // 2
    scale.paste((255, 255, 255), (0, 0, middle - 2, HEADER - 28 - 20))
    return scale


def _cut(sheet: Image.Image, count: int) -> list[Image.Image] | None:
    """Return the panels of each line of a sheet of `utils.pictures.overlays`; None of others."""
    if count < 1 or (sheet.width - GAP) % 4 or (sheet.height - HEADER) % count:
        return None
    pitch = (sheet.height - HEADER) // count
    height = pitch - TITLE - GAP
    if height < 1:
        return None
    tops = [HEADER + TITLE + line * pitch for line in range(count)]
    return [sheet.crop((GAP, top, sheet.width - GAP, top + height)) for top in tops]
