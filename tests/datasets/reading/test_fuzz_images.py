"""Odd and damaged image files: each is read as it is, or refused by name, and nothing else."""

import io
import os
import struct
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from datasets.data_set import StructuredSet, find_data_sets
from datasets.reading.images import MAX_PIXELS, read_image, read_mask, read_size
from datasets.reading.loading import BatchLoader, ImageDataset, images_of
from datasets.reading.masks import read_masks
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError
from datasets.tasks.structured import list_categories, structured_tasks
from tests.datasets.trees import save, texture

SUFFIXES = (".png", ".jpg", ".bmp", ".tif", ".webp", ".ppm")
NUM_CASES = 1000


@dataclass
class Case:
    """The content of a file, and what a reader must make of it.

    Attributes:
        content: the bytes.
        expected: (H, W, 3) uint8; None where the file must be refused.
        tolerance: mean difference that a lossy format may make.
        damaged: being refused is right too.
        noticed: whether the format lets any reader notice the damage.
    """

    content: bytes
    expected: np.ndarray | None
    tolerance: float = 0
    damaged: bool = False
    noticed: bool = True


def encode(image, kind, **options):
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, kind, **options)
    return stream.getvalue()


def rgb(grey):
    return np.repeat(grey[:, :, None], 3, axis=2)


def turn(image, orientation):
    """What EXIF's orientations mean, by the standard's table."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90,
    }[orientation](image)


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def noise(rng, size, *channels, high=256, dtype=np.uint8):
    return rng.integers(0, high, (*size, *channels)).astype(dtype)


def palette_image(rng, size):
    indices, colours = noise(rng, size, high=7), noise(rng, (7,), 3)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    return image, colours[indices]


# Each writes one kind of whole image from a size, and knows its pixels without reading the file.
def one_bit(rng, size):
    bits = rng.random(size) > 0.5
    kind, options = (("PNG", {}), ("TIFF", {"compression": "group4"}), ("BMP", {}))[rng.integers(3)]
    return Case(encode(bits, kind, **options), rgb(bits.astype(np.uint8) * 255))


def grey(rng, size):
    values = noise(rng, size)
    return Case(encode(values, ("PNG", "BMP", "TIFF", "PPM")[rng.integers(4)]), rgb(values))


def grey_16(rng, size):
    values = noise(rng, size, high=65536, dtype=np.uint16)
    kind = ("PNG", "TIFF", "PPM")[rng.integers(3)]
    return Case(encode(values, kind), rgb((values >> 8).astype(np.uint8)))


def colour_16(rng, size):
    values = noise(rng, size, 3, high=65536, dtype=np.uint16)
    suffix = (".png", ".tif")[rng.integers(2)]
    content = cv2.imencode(suffix, values[:, :, ::-1])[1].tobytes()
    return Case(content, (values >> 8).astype(np.uint8))


def colour(rng, size):
    values = noise(rng, size, 3)
    kind, options = (
        *(("PNG", {}), ("BMP", {}), ("PPM", {}), ("WEBP", {"lossless": True})),
        *(("TIFF", {"compression": c}) for c in ("raw", "tiff_lzw", "tiff_deflate", "packbits")),
    )[rng.integers(8)]
    return Case(encode(values, kind, **options), values)


def alpha(rng, size):
    values = noise(rng, size, 4)
    if rng.integers(2):
        grey_alpha = Image.fromarray(values).convert("LA")
        return Case(encode(grey_alpha, "PNG"), rgb(np.asarray(grey_alpha)[:, :, 0]))
    kind = ("PNG", "TIFF")[rng.integers(2)]
    return Case(encode(values, kind), values[:, :, :3])


def palette(rng, size):
    image, pixels = palette_image(rng, size)
    kind = ("PNG", "BMP", "TIFF")[rng.integers(3)]
    see_through = kind == "PNG" and rng.integers(2)
    options = {"transparency": bytes(noise(rng, (7,)))} if see_through else {}
    return Case(encode(image, kind, **options), pixels)


def several_frames(rng, size):
    """The first frame of a GIF, the first page of a TIFF."""
    if rng.integers(2):
        image, pixels = palette_image(rng, size)
        others = [palette_image(rng, size)[0] for _ in range(2)]
        return Case(encode(image, "GIF", save_all=True, append_images=others), pixels)
    values = noise(rng, size, 3)
    others = [Image.fromarray(noise(rng, (5, 7)))]
    return Case(encode(values, "TIFF", save_all=True, append_images=others), values)


def turned(rng, size):
    values, orientation = noise(rng, size, 3), int(rng.integers(1, 9))
    kind, options = (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}))[rng.integers(3)]
    content = encode(values, kind, exif=exif_of(orientation), **options)
    return Case(content, turn(values, orientation))


def jpeg(rng, size):
    values, orientation = texture(rng, size[::-1]), int(rng.integers(1, 9))
    options = ({}, {"progressive": True}, {"restart_marker_blocks": 2})[rng.integers(3)]
    image = Image.fromarray(values).convert(("RGB", "L", "CMYK")[rng.integers(3)])
    content = encode(image, "JPEG", quality=92, exif=exif_of(orientation), **options)
    return Case(content, turn(np.asarray(image.convert("RGB")), orientation), tolerance=6)


WHOLE = (one_bit, grey, grey_16, colour_16, colour, alpha, palette, several_frames, turned, jpeg)
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([1, 1, 2, 7, 8, 9]))


# Damage to a whole image.
def cut(rng, whole):
    stop = rng.integers(len(whole.content))
    return Case(whole.content[:stop], whole.expected, whole.tolerance, damaged=True)


def garbled_png(rng, size):
    """Any byte after the signature: PNG has checksums, so nothing may pass as another image."""
    values = noise(rng, size, 3, high=3)
    content = bytearray(encode(values, "PNG"))
    place = int(rng.integers(8, len(content)))
    length = int(rng.integers(1, 9))
    content[place : place + length] = noise(rng, (length,)).tobytes()
    return Case(bytes(content), values, damaged=True)


def garbled_jpeg(rng, size):
    """Garbage in the middle: JPEG has no checksums."""
    values = texture(rng, (size[1] + 60, size[0] + 60))
    content = bytearray(encode(values, "JPEG"))
    start = content.index(b"\xff\xda") + 14
    place = int(rng.integers(start, len(content) - 2))
    length = int(rng.integers(1, 300))
    content[place : place + length] = noise(rng, (length,)).tobytes()
    return Case(bytes(content), values, tolerance=4, damaged=True, noticed=False)


def closed_short_jpeg(rng, size):
    """The upper half of a JPEG, closed as if it were whole: decoders fill up with grey."""
    values = texture(rng, (size[1] + 60, size[0] + 60))
    image = Image.fromarray(values).convert(("RGB", "L", "CMYK")[rng.integers(3)])
    content = encode(image, "JPEG")
    start = content.index(b"\xff\xda") + 14
    stop = start + int((len(content) - start) * rng.uniform(0.1, 0.8))
    return Case(content[:stop] + b"\xff\xd9", None)


# Files that nobody can read.
def floating(rng, size):
    values = rng.random(size).astype(np.float32)
    values[0, 0] = rng.choice([np.nan, np.inf, 0.5])
    return Case(encode(values, "TIFF"), None)


def too_deep(rng, size):
    values = noise(rng, size, high=2**31, dtype=np.int32) | 65536
    return Case(encode(values, "TIFF"), None)


def bomb(rng, size):
    """A PNG of a few bytes that claims up to 2 billion pixels a side."""
    width = int(rng.integers(20_000, 2**31 - 1))
    header = struct.pack(">IIBBBBB", width, width, 8, int(rng.choice([0, 2, 6])), 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(5000))), (b"IEND", b"")
    return Case(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks), None)


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


MAGIC = (
    *(b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"BM", b"II*\x00"),
    *(b"MM\x00*", b"RIFF\x40\x00\x00\x00WEBPVP8 ", b"GIF89a", b"P6 9 9 255 ", b"P5\n", b"MM\x00+"),
    *(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"\xc5\xd0\xd3\xc6", b"PK\x03\x04"),
)


def random_bytes(rng, size):
    """Noise behind the first bytes of a format, too short to be 9 x 9 pixels of any."""
    return Case(MAGIC[rng.integers(len(MAGIC))] + noise(rng, (rng.integers(120),)).tobytes(), None)


ODD = (garbled_png, garbled_jpeg, closed_short_jpeg, floating, too_deep, bomb, random_bytes)


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(LENGTHS), draw(LENGTHS)
    kind = draw(st.sampled_from([*WHOLE, *ODD, garbled_jpeg, *6 * ["cut"]]))
    if kind == "cut":
        kind = draw(st.sampled_from(WHOLE))
        return f"cut {kind.__name__}", cut(rng, kind(rng, size)), draw(st.sampled_from(SUFFIXES))
    return kind.__name__, kind(rng, size), draw(st.sampled_from(SUFFIXES))


def judge(case, path):
    """Read a case's file; return "read", "refused" or "read otherwise", or fail."""
    path.write_bytes(case.content)
    image, message = None, ""
    try:
        image = read_image(path)
    except DataError as error:
        message = str(error)
    if image is None:
        assert case.expected is None or case.damaged, message
        assert str(path) in message
        return "refused"
    assert case.expected is not None, "a file without an image was read"
    assert image.dtype == np.uint8
    assert image.shape == case.expected.shape
    assert read_size(path) == image.shape[:2]
    difference = np.abs(image.astype(int) - case.expected).mean()
    if difference > case.tolerance:
        assert not case.noticed, f"read otherwise, by {difference:.1f} on average"
        return "read otherwise"
    return "read"


def test_a_thousand_odd_files(tmp_path):
    seen = Counter()

    @settings(
        max_examples=NUM_CASES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def check(drawn):
        kind, case, suffix = drawn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen[kind, judge(case, tmp_path / f"a{suffix}")] += 1

    check()
    outcomes = Counter()
    for (_, outcome), count in seen.items():
        outcomes[outcome] += count
    assert outcomes.total() >= NUM_CASES
    assert outcomes["read"] > NUM_CASES / 3
    assert outcomes["refused"] > NUM_CASES / 4
    assert {kind for kind, _ in seen} >= {kind.__name__ for kind in (*WHOLE, *ODD)}
    # Only where no reader can tell.
    assert {kind for kind, outcome in seen if outcome == "read otherwise"} <= {"garbled_jpeg"}


@pytest.mark.parametrize("size", [(3, 20_000), (20_000, 3), (1, 1)])
@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.__name__)
def test_extreme_shapes(tmp_path, size, kind):
    for seed in range(3):
        assert judge(kind(np.random.default_rng(seed), size), tmp_path / "a.png") == "read"


def test_a_strip_that_resizing_would_blow_up_is_refused_by_name(tmp_path):
    """20,000 x 3 pixels with the shorter side brought to 256: 1.7 million x 256, 1.3 GB."""
    path = save(tmp_path / "a.png", np.zeros((3, 20_000, 3), dtype=np.uint8))
    for resize in ("lanczos_shorter", "bilinear_shorter"):
        transform = PairTransform(256, 224, resize)
        dataset = ImageDataset([path], transform)
        loader = BatchLoader(dataset, batch_size=1, workers=0, skip_unreadable=False)
        with pytest.raises(DataError, match=r"a\.png.*1706666 x 256 pixels.*pass --skip-unread"):
            list(loader)
        with pytest.raises(DataError, match="1706666 x 256 pixels"):
            transform.mask(read_mask(path))


def test_bomb_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decodes it"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries do
    path = tmp_path / "bomb.png"
    for seed in range(20):
        path.write_bytes(bomb(np.random.default_rng(seed), ()).content)
        assert path.stat().st_size < 200
        for read in (read_image, read_mask, read_size):
            with pytest.raises(DataError, match=r"too large to be read safely: .*bomb\.png"):
                read(path)
    assert MAX_PIXELS < 2e4**2


def test_every_prefix_of_a_jpeg_and_a_png_is_refused_or_the_whole(tmp_path):
    values = texture(np.random.default_rng(0), (20, 20))
    for suffix in (".jpg", ".png"):
        content = save(tmp_path / f"whole{suffix}", values).read_bytes()
        whole = read_image(tmp_path / f"whole{suffix}")
        for stop in range(len(content)):
            judge(Case(content[:stop], whole, damaged=True), tmp_path / f"cut{suffix}")


def test_whole_jpegs_that_end_in_the_fillers_grey_are_read(tmp_path):
    """What raises the suspicion of missing data is no proof of it."""
    for size in ((8, 8), (9, 17), (64, 33)):
        for mode, value in (("L", 128), ("RGB", (128, 128, 128)), ("L", 127)):
            Image.new(mode, size, value).save(tmp_path / "a.jpg")
            assert (read_image(tmp_path / "a.jpg") == np.ravel(value)[0]).all()
        values = texture(np.random.default_rng(0), size)
        values[-16:] = 128
        Image.fromarray(values).save(tmp_path / "b.jpg", quality=95)
        assert np.abs(read_image(tmp_path / "b.jpg").astype(int) - values).mean() < 6


def test_formats_outside_the_list_stay_closed(tmp_path, monkeypatch):
    """Pillow hands PostScript to an interpreter, whatever the file's suffix is."""
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: ran.append(1))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(DataError, match=r"cannot read the image .*a\.png"):
        read_image(path)
    assert not ran


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mask_is_turned_too", [True, False])
def test_mask_stays_on_its_defect_however_exif_turns(tmp_path, orientation, mask_is_turned_too):
    """A mask is of the upright image, unless its own EXIF turns it."""
    stored = np.full((20, 30, 3), 100, dtype=np.uint8)
    stored[2:6, 3:12] = 255
    exif = exif_of(orientation)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    mask = stored[:, :, 0] == 255
    if mask_is_turned_too:
        Image.fromarray(mask).save(tmp_path / "mask.png", exif=exif)
    else:
        Image.fromarray(np.ascontiguousarray(turn(mask, orientation))).save(tmp_path / "mask.png")
    transform = PairTransform(64, None, "opencv_square")
    bright = transform.image(read_image(tmp_path / "a.png"))[:, :, 0] > 180
    (drawn,) = read_masks([tmp_path / "a.png"], [tmp_path / "mask.png"], transform).numpy()
    assert drawn.sum() > 100
    assert (bright & drawn).sum() > 0.9 * (bright | drawn).sum()


def masks_that_are_read(drawn):
    """name -> content of masks with the defect `drawn` and nothing else."""
    seven, rng = drawn.astype(np.uint8) * 7, np.random.default_rng(0)
    alpha = noise(rng, drawn.shape)
    indexed = Image.fromarray(drawn.astype(np.uint8))
    indexed.putpalette([200, 200, 200, 0, 0, 0])
    inks = Image.fromarray(rgb(seven)).convert("CMYK")
    lossy = drawn.astype(np.uint8) * 255
    return {
        "grey": encode(drawn * (alpha | 1), "PNG"),
        "grey 16": encode(seven.astype(np.uint16), "PNG"),
        "one bit": encode(drawn, "PNG"),
        "palette": encode(indexed, "PNG"),
        "palette, see-through": encode(indexed, "PNG", transparency=0),
        "RGBA": encode(np.dstack([0 * seven, 0 * seven, seven, alpha]), "PNG"),
        "LA": encode(np.dstack([seven, alpha]), "PNG"),
        "CMYK": encode(inks, "TIFF"),
        "float": encode(drawn.astype(np.float32), "TIFF"),
        "lossless WebP": encode(rgb(seven), "WEBP", lossless=True),
        "empty": encode(np.zeros_like(seven), "PNG"),
        "empty JPEG": encode(np.zeros_like(seven), "JPEG"),
        "JPEG": encode(lossy, "JPEG"),
        "lossy WebP": encode(rgb(lossy), "WEBP", quality=60),
        "JPEG in TIFF": encode(rgb(lossy), "TIFF", compression="jpeg"),
    }


@pytest.mark.parametrize("name", masks_that_are_read(np.ones((4, 4), dtype=bool)))
def test_odd_masks_are_read_as_drawn(tmp_path, name):
    y, x = np.mgrid[:48, :40]
    drawn = np.hypot(y - 20, x - 18) < 11
    (tmp_path / "mask.png").write_bytes(masks_that_are_read(drawn)[name])
    mask = read_mask(tmp_path / "mask.png")
    expected = drawn & ("empty" not in name)
    is_lossy = name in {"JPEG", "lossy WebP", "JPEG in TIFF"}
    assert (mask ^ expected).sum() <= (12 if is_lossy else 0)


def test_masks_whose_values_would_be_lost_are_refused(tmp_path):
    path = tmp_path / "mask.png"
    values = np.zeros((8, 8, 3), dtype=np.uint16)
    values[2:5, 2:5] = 3
    for content in (
        cv2.imencode(".png", values)[1].tobytes(),
        cv2.imencode(".tif", values)[1].tobytes(),
        encode(np.full((4, 4), np.nan, dtype=np.float32), "TIFF"),
        encode(values[:, :, 0].astype(np.uint8), "PNG")[:-30],
        b"",
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot read the image .*mask\.png"):
            read_mask(path)


NAMES = (
    *("with spaces", " leading", "trailing ", "it's", 'a "quote"', "50% [ab]*?", "-x", "~"),
    "$HOME",
    *(unicodedata.normalize(form, "é ü 한") for form in ("NFC", "NFD")),
    *("日本語", "🙂", "line\nbreak", "tab\there", os.fsdecode(b"latin-1 \xe9"), "x" * 200, "a.b.c"),
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_odd_names_of_folders_and_files(tmp_path, name):
    rng = np.random.default_rng(0)
    image = texture(rng, (24, 24))
    category = tmp_path / name
    try:
        save(category / f"train/good/{name}.png", image)
    except OSError as error:
        pytest.skip(f"this file system refuses the name ({error})")
    save(category / f"test/{name}/{name}.png", image)
    save(category / f"ground_truth/{name}/{name}_mask.png", image[:, :, 0] > 128)
    folder = find_data_sets(StructuredSet)["folder"]
    assert list_categories(folder, tmp_path) == (name,)
    (task,) = structured_tasks(folder, tmp_path, [name], folder.options)
    transform = PairTransform(24, None, "opencv_square")
    loader = BatchLoader(
        images_of(task.train, transform), batch_size=1, workers=1, skip_unreadable=False
    )
    (batch,) = loader
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), image)
    (mask,) = read_masks(task.test.paths, task.masks, transform)
    np.testing.assert_array_equal(mask, image[:, :, 0] > 128)
    task.train.paths[0].write_bytes(b"")
    with pytest.raises(DataError, match="cannot read the image") as refusal:
        list(loader)
    assert name in str(refusal.value)
