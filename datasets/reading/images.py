"""Reads image and mask files into arrays; a file that cannot be read in full is an error.

Damage inside of a file is noticed as far as its format lets a reader notice: PNG has checksums,
which Pillow leaves unchecked for the pixels; JPEG has none, but its markers must be in order and
its data must reach the last pixel. BMP, PNM, TIFF and WebP show damage only where decoding fails.
"""

import contextlib
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from datasets.samples import DataError

IMAGE_SUFFIXES = frozenset(
    {
        *(".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png"),
        *(".ppm", ".tif", ".tiff", ".webp"),
    }
)
MAX_PIXELS = 178_956_970
"""Larger images are refused before any memory is taken: a damaged or hostile header of a few bytes
may claim terabytes. 0.5 GB as RGB, of which each worker process holds a few copies while it reads;
Pillow refuses the same number by itself unless another library has lifted its limit.
"""
# By content, whatever the suffix says. Others stay closed: of EPS, Pillow would run Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Frames, tables, scans, application data, comments.
_JPEG_SEGMENTS = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}) - {
    0xC8
}
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_QUARTER_TURNS = frozenset({5, 6, 7, 8})


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        bit_depth: Bits of 16-bit files that are used, 9 to 16; the highest eight of them are kept.
        max_pixels: Larger images are refused.
    """

    bit_depth: int = 16
    max_pixels: int = field(default=MAX_PIXELS, repr=False)


PLAIN = Reading()


def is_image_file(path: Path) -> bool:
    """Whether `path` is a visible file with an image's suffix (in any case)."""
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def read_image(path: Path, reading: Reading = PLAIN) -> np.ndarray:
    """Reads an image as RGB, turned upright as its EXIF orientation says.

    Grey is repeated, palette and CMYK are converted, alpha is dropped, and of 16-bit values the
    highest eight of the bits in use are kept: a fixed scale, so that brightness stays comparable
    between images. Of several frames or pages the first is read.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: The file is missing, no image, truncated, damaged (see above), too large, of a
            floating-point type, or has values of more bits than are in use.
    """
    with _opened(path, reading.max_pixels) as image:
        _refuse_damage(image, path)
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F":
            raise ValueError("it holds floating-point values, save it with 8 or 16 bits")
        if upright.mode in _DEEP_MODES:
            grey = _highest_bits(upright, reading.bit_depth)
            return np.repeat(grey[:, :, None], 3, axis=2)  # (H, W, 3)
        return np.array(upright.convert("RGB"))  # (H, W, 3)


def read_mask(path: Path, reading: Reading = PLAIN) -> np.ndarray:
    """Reads a mask; a pixel belongs to the defect where any of its colour values is above 0.

    Of a palette image the index counts, and alpha only where all colours are equal and it alone
    varies: then the mask was drawn in it. Lossy compression surrounds each defect by small
    values that nobody drew, so there a value counts from half of the file's largest.

    Returns:
        (H, W) bool.

    Raises:
        DataError: As for `read_image`, but floating-point values are read if they are numbers, and
            16-bit colours are refused: small values would be lost.
    """
    with _opened(path, reading.max_pixels) as image:
        values = _mask_values(image, path)
        threshold = values.max() // 2 if _is_lossy(image, path) else 0
        return values > threshold


def read_mask_values(path: Path, reading: Reading = PLAIN) -> np.ndarray:
    """Reads the values of a mask, of colours the largest; see `read_mask`.

    Returns:
        (H, W), of the file's own type.

    Raises:
        DataError: As for `read_mask`.
    """
    with _opened(path, reading.max_pixels) as image:
        return _mask_values(image, path)


def _mask_values(image: ImageFile.ImageFile, path: Path) -> np.ndarray:
    # Pillow keeps the high byte of 16-bit colours; before loading, the tile still tells.
    if image.mode not in _DEEP_MODES and any(";16" in str(tile[3]) for tile in image.tile):
        raise ValueError("a mask in 16-bit colours, save it in grey or with 8 bits")
    _refuse_damage(image, path)
    upright = ImageOps.exif_transpose(image)
    alpha = None
    if upright.mode in {"LA", "La", "PA", "RGBA", "RGBa"}:
        alpha = np.array(upright.getchannel("A"))  # (H, W)
    if upright.mode not in {"1", "L", "P", "F", *_DEEP_MODES}:
        upright = upright.convert("RGB")
    values = np.array(upright)
    if upright.mode == "F" and np.isnan(values).any():
        raise ValueError("it holds values that are not numbers (nan)")
    if values.ndim == 3:
        values = values.max(axis=2)  # (H, W)
    if alpha is not None and np.ptp(values) == 0 and np.ptp(alpha) > 0:
        return alpha
    return values


def read_size(path: Path, reading: Reading = PLAIN) -> tuple[int, int]:
    """Reads (H, W) of the upright image, from the header alone unless EXIF turns the image.

    Raises:
        DataError: The file is missing, no image or too large.
    """
    with _opened(path, reading.max_pixels) as image:
        if image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS:
            # Whether the header's size is the turned one depends on format and Pillow's version.
            upright = ImageOps.exif_transpose(image)
            return upright.height, upright.width
        return image.height, image.width


def largest_of_16_bits(paths: Sequence[Path]) -> int | None:
    """Return the largest value in those files that have 16 bits; None where none has.

    Files that cannot be read are left to who reads them.
    """
    largest = None
    for path in paths:
        with contextlib.suppress(DataError), _opened(path, MAX_PIXELS) as image:
            if image.mode in _DEEP_MODES:
                largest = max(largest or 0, int(np.asarray(image).max()))
    return largest


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    if max_pixels > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = None  # the user has set another limit, which is looked at below
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels, the limit is {max_pixels}: "
                    "--max-pixels raises it"
                )
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


def _highest_bits(image: Image.Image, bit_depth: int) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("it holds values outside of 16 bits, save it with 8 or 16 bits")
    if values.max() >= 1 << bit_depth:
        raise ValueError(f"it holds {values.max()}, more than the {bit_depth} bits of --bit-depth")
    return (values >> (bit_depth - 8)).astype(np.uint8)


def _is_lossy(image: ImageFile.ImageFile, path: Path) -> bool:
    if image.format == "WEBP":
        return b"VP8 " in path.read_bytes()[:4096]  # the name of its lossy data
    return image.format in {"JPEG", "MPO"} or image.info.get("compression") == "jpeg"


def _refuse_damage(image: Image.Image, path: Path) -> None:
    """Raises ValueError at damage that Pillow passes over; the rest is left to Pillow."""
    if image.format == "PNG":
        _check_png(path.read_bytes())
    elif image.format in {"JPEG", "MPO"}:  # MPO: a JPEG followed by others
        _check_jpeg(image, path.read_bytes())


def _check_png(data: bytes) -> None:
    """Compares the checksums of the chunks that make the pixels."""
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        stop = start + 8 + int.from_bytes(view[start : start + 4], "big")
        name = bytes(view[start + 4 : start + 8])
        is_critical = not name[0] & 0x20
        if is_critical and stop + 4 <= len(data):
            stored = int.from_bytes(view[stop : stop + 4], "big")
            if zlib.crc32(view[start + 4 : stop]) != stored:
                raise ValueError(f"damaged: a wrong checksum in its {name!r} data")
        start = stop + 4


def _check_jpeg(image: Image.Image, data: bytes) -> None:
    """Checks that markers are in order and that the data of the only scan reach the last pixel."""
    values = np.frombuffer(data, dtype=np.uint8)
    places = np.flatnonzero(values[:-1] == 0xFF)
    codes = values[places + 1]
    is_marker = (codes != 0) & (codes != 0xFF)  # 0 is a stuffed byte, 0xFF a fill byte
    places, codes = places[is_marker], codes[is_marker]
    position, scan_ends = 2, []
    while position + 4 <= len(data):
        index = int(np.searchsorted(places, position))
        if index == len(places):
            break
        place, code = int(places[index]), int(codes[index])
        if code == 0xD9:  # end of image
            break
        if code not in _JPEG_SEGMENTS:
            raise ValueError(f"damaged: a marker {code:#04x} where JPEG has none")
        position = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if code == 0xDA:  # start of scan: entropy-coded data up to a marker that is no restart
            first = int(np.searchsorted(places, position))
            others = np.flatnonzero((codes[first:] & 0xF8) != 0xD0)
            last = first + int(others[0]) if len(others) else len(places)
            if (codes[first:last] != 0xD0 + np.arange(last - first) % 8).any():
                raise ValueError("damaged: its restart markers are out of order")
            position = int(places[last]) if last < len(places) else len(data)
            scan_ends.append(position)
    if len(scan_ends) == 1:
        _check_jpeg_end(image, data, scan_ends[0])


def _check_jpeg_end(image: Image.Image, data: bytes, stop: int) -> None:
    """Checks that a scan is no shorter than its pixels, which libjpeg would fill up with grey.

    Where the last pixel has that grey, more data are put in: a whole image ignores them.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    if not set(last if isinstance(last, tuple) else (last,)) <= {127, 128}:
        return
    longer = data[:stop] + b"\xaa" * 64 + data[stop:]
    with Image.open(io.BytesIO(longer), formats=["JPEG"]) as padded:
        if not np.array_equal(np.asarray(image), np.asarray(padded)):
            raise ValueError("truncated: its data end before its last pixel")
