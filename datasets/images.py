"""Reads image and mask files into arrays; a file that cannot be read in full is an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from datasets.samples import DataError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_QUARTER_TURNS = frozenset({5, 6, 7, 8})


def is_image_file(path: Path) -> bool:
    """Whether `path` is a visible file with an image's suffix (in any case)."""
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def read_image(path: Path) -> np.ndarray:
    """Reads an image as RGB, turned upright as its EXIF orientation says.

    Grey is repeated, palette and CMYK are converted, alpha is dropped, and of 16-bit values the
    high byte is kept: a fixed scale, so that brightness stays comparable between images.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: The file is missing, no image, truncated, too large or of a floating-point type.
    """
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F":
            raise ValueError("it holds floating-point values, save it with 8 or 16 bits")
        if upright.mode in _DEEP_MODES:
            return np.repeat(_high_byte(upright)[:, :, None], 3, axis=2)  # (H, W, 3)
        return np.array(upright.convert("RGB"))  # (H, W, 3)


def read_mask(path: Path) -> np.ndarray:
    """Reads a mask; a pixel belongs to the defect where any of its colour values is above 0.

    Of a palette image the index counts. JPEG surrounds each defect by small values that nobody
    drew, so there a value counts from half of the file's largest.

    Returns:
        (H, W) bool.

    Raises:
        DataError: As for `read_image`.
    """
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in {"LA", "RGBA", "PA"}:
            upright = upright.convert("RGB")
        values = np.array(upright)
        if values.ndim == 3:
            values = values.max(axis=2)  # (H, W)
        threshold = values.max() // 2 if image.format == "JPEG" else 0
        return values > threshold


def read_size(path: Path) -> tuple[int, int]:
    """Reads (H, W) of the upright image, from the header alone unless EXIF turns the image.

    Raises:
        DataError: The file is missing, no image or too large.
    """
    with _opened(path) as image:
        if image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS:
            # Whether the header's size is the turned one depends on format and Pillow's version.
            upright = ImageOps.exif_transpose(image)
            return upright.height, upright.width
        return image.height, image.width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(f"image file not found: {path}") from error
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"image too large to be read safely: {path} ({error})") from error
    # Pillow's decoders raise almost any exception on a damaged file.
    except Exception as error:
        raise DataError(f"cannot read the image {path}: {error}") from error


def _high_byte(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("it holds values outside of 16 bits, save it with 8 or 16 bits")
    return (values >> 8).astype(np.uint8)
