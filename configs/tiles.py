"""Windows of an image: where they lie, and how large the image is that they are cut from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OVERLAP = 0.125
"""Share of their side that windows have in common, by default: an eighth."""


@dataclass(frozen=True)
class Tiling:
    """Overlapping square windows of a square image, evenly spread from edge to edge.

    Attributes:
        image_size: side of the image in pixels.
        tile_size: side of a window in pixels, at most that.
        per_side: windows in a row, and in a column.
    """

    image_size: int
    tile_size: int
    per_side: int

    @property
    def starts(self) -> tuple[int, ...]:
        """Return where the windows of a row begin, in pixels, ascending from 0."""
        steps = max(1, self.per_side - 1)
        room = self.image_size - self.tile_size
        return tuple(round(place * room / steps) for place in range(self.per_side))

    @property
    def count(self) -> int:
        """Return the number of windows."""
        return self.per_side**2

    @property
    def windows(self) -> list[tuple[slice, slice]]:
        """Return rows and columns of each window, a row of windows after the other."""
        sides = [slice(start, start + self.tile_size) for start in self.starts]
        return [(rows, columns) for rows in sides for columns in sides]


def tiling_of(
    input_size: int, tiles: int | None, tile_size: int | None, overlap: float
) -> Tiling | None:
    """Return the windows that the options ask for; None for none.

    Args:
        input_size: side in pixels of what is left of an image after resize and crop.
        tiles: windows in a row, each of `input_size`; the image becomes as large as they need.
        tile_size: side of windows of an image of `input_size`, as many as cover it.
        overlap: share of its side, below 1, that a window shares at least with the next one.

    Raises:
        ValueError: both are given, windows are larger than the image, or one alone is asked for.
    """
    if tiles is None and tile_size is None:
        return None
    if tiles is not None and tile_size is not None:
        raise ValueError("--tiles and --tile-size both say how images are cut: leave one out")
    if tiles is not None:
        if tiles < 2:
            raise ValueError("--tiles 1 is the whole image: leave it out, or cut into 2 or more")
        step = max(1, math.floor(input_size * (1 - overlap)))
        return Tiling(input_size + (tiles - 1) * step, input_size, tiles)
    assert tile_size is not None
    if tile_size >= input_size:
        raise ValueError(
            f"--tile-size {tile_size} must be smaller than the images of {input_size} pixels that "
            "tiles are cut from: raise --image-size (with --crop-size none) to that of your files"
        )
    step = max(1, math.floor(tile_size * (1 - overlap)))
    return Tiling(input_size, tile_size, 1 + math.ceil((input_size - tile_size) / step))


def resized_for(
    tiling: Tiling | None, image_size: int, crop_size: int | None
) -> tuple[int, int | None]:
    """Return the sides in pixels that images are resized and cropped to, before they are cut."""
    if tiling is None:
        return image_size, crop_size
    if crop_size is None:
        return tiling.image_size, None
    return round(image_size * tiling.image_size / crop_size), tiling.image_size


def resized_in(config: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return what `resized_for` does, of a run's config.json."""
    image_size, crop_size = config["image_size"], config.get("crop_size")
    tiling = tiling_of(
        crop_size or image_size,
        config.get("tiles"),
        config.get("tile_size"),
        config.get("tile_overlap", OVERLAP),
    )
    return resized_for(tiling, image_size, crop_size)
