"""A piece of an image: what is looked at to tell which kind of defect it shows."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from models.errors import ModelError

INSIDE = 255
"""Of a mask that was read."""


@dataclass(frozen=True)
class Piece:
    """A crop of an image with the mask of its defect, as files: any number takes no memory.

    Attributes:
        image: a PNG, RGB, at the crop's own size.
        mask: a PNG of the same size, of 1 or 8 bits; what is above 0 is inside.
        score: the crop's highest anomaly score, 0 to 1 over all images of the product; 1 where the
            defect has a label.
        area: pixels inside the mask.

    Raises:
        ValueError: the score or the area is out of range.
    """

    image: Path
    mask: Path
    score: float
    area: int

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"the score {self.score} of {self.image} is not in 0 to 1")
        if self.area < 0:
            raise ValueError(f"the area {self.area} of {self.mask} is below 0")


def read_piece(piece: Piece) -> tuple[Image.Image, Image.Image]:
    """Read a piece's image, RGB, and its mask, 8-bit grey with 0 outside and 255 inside.

    Raises:
        ModelError: a file cannot be read, or the two differ in size.
    """
    image = _read(piece.image, "RGB")
    mask = _read(piece.mask, "L").point(_full_inside)
    if image.size != mask.size:
        raise ModelError(
            f"the mask {piece.mask} is {mask.width} x {mask.height} pixels, its piece "
            f"{piece.image} is {image.width} x {image.height} (width x height)"
        )
    return image, mask


def _read(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow says damage of a PNG in all three
        raise ModelError(f"cannot read {path}, a piece of an image: {error}") from error


def _full_inside(value: int) -> int:
    return INSIDE if value > 0 else 0
