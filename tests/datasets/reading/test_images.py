import warnings

import numpy as np
import pytest
from PIL import Image

from datasets.reading.images import (
    Reading,
    largest_of_16_bits,
    read_image,
    read_mask,
    read_size,
)
from datasets.samples import DataError
from tests.datasets.trees import save, texture


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 70_000, dtype=np.int32), "save it with 8 or 16 bits"),
        (np.full((4, 4), 0.5, dtype=np.float32), "floating-point"),
    ],
)
def test_values_that_are_no_brightness_are_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif.*{message}"):
        read_image(tmp_path / "a.tif")


def test_of_16_bit_files_the_bits_in_use_are_kept(tmp_path):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert len(np.unique(read_image(tmp_path / "a.png"))) == 16
    found = read_image(tmp_path / "a.png", Reading(bit_depth=12))
    np.testing.assert_array_equal(found[..., 0], ramp >> 4)
    with pytest.raises(DataError, match="holds 4095, more than the 11 bits"):
        read_image(tmp_path / "a.png", Reading(bit_depth=11))
    assert largest_of_16_bits([tmp_path / "a.png", tmp_path / "gone.png"]) == 4095
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "b.png")
    assert largest_of_16_bits([tmp_path / "b.png"]) is None


def test_the_limit_on_pixels_can_be_raised(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((30, 40, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="limit is 1000: --max-pixels raises it"):
        read_image(path, Reading(max_pixels=1000))
    assert read_image(path, Reading(max_pixels=1200)).shape == (30, 40, 3)


@pytest.mark.parametrize("colour", [0, 200])
def test_a_mask_drawn_in_alpha_is_read_from_it(tmp_path, colour):
    drawn = np.zeros((20, 30), dtype=np.uint8)
    drawn[4:9, 5:12] = 255
    flat = np.full_like(drawn, colour)
    Image.fromarray(np.dstack([flat, flat, flat, drawn])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([flat, drawn])).save(tmp_path / "la.png")
    for name in ("rgba.png", "la.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), drawn > 0)
    # Where colours vary they are the mask, and alpha is not.
    Image.fromarray(np.dstack([drawn, drawn, drawn, 255 - drawn])).save(tmp_path / "both.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "both.png"), drawn > 0)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.png").mkdir()
    for read in (read_image, read_mask, read_size):
        for name in ("text.png", "empty.jpg", "folder.png", "x" * 5000 + ".png"):
            with pytest.raises(DataError, match=f"cannot read the image .*{name}"):
                read(tmp_path / name)
        with pytest.raises(DataError, match=r"image file not found: .*none\.png"):
            read(tmp_path / "none.png")


def test_large_image_below_the_limit_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png", np.zeros((16, 24, 3), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 24 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert read_image(path).shape == (16, 24, 3)


@pytest.mark.parametrize("value", [120, 255])
def test_jpeg_mask_does_not_grow_by_its_compression(tmp_path, value):
    y, x = np.mgrid[:64, :64]
    disc = np.hypot(y - 30, x - 33) < 12
    path = save(tmp_path / "mask.jpg", disc.astype(np.uint8) * np.uint8(value))
    with Image.open(path) as image:
        assert ((np.asarray(image) > 0) & ~disc).sum() > 50
    assert (read_mask(path) ^ disc).sum() <= 2


def test_a_changed_pixel_in_a_png_is_noticed(tmp_path):
    """Pillow leaves the checksum of the pixels unchecked."""
    path = tmp_path / "a.png"
    Image.fromarray(texture(np.random.default_rng(0), (24, 16))).save(path, compress_level=0)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 60] ^= 1
    path.write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"a\.png: damaged: a wrong checksum in its b'IDAT'"):
            read(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"\xff\x37", "a marker 0x37 where JPEG has none"),
        (b"\xff\xd9", "truncated: its data end before its last pixel"),
        (b"\xff\xd0\xff\xd5", "its restart markers are out of order"),
    ],
)
def test_damage_inside_of_a_jpeg_is_noticed(tmp_path, damage, message):
    """Decoders pass over it with a warning that Pillow keeps to itself."""
    path = save(tmp_path / "a.jpg", texture(np.random.default_rng(0), (96, 96)))
    content = bytearray(path.read_bytes())
    middle = (content.index(b"\xff\xda") + len(content)) // 2
    content[middle : middle + len(damage)] = damage
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg: .*{message}"):
        read_image(path)


def test_what_cameras_add_to_a_jpeg_is_no_damage(tmp_path):
    """Bytes behind the end, fill bytes before a marker, a thumbnail, comments, restart markers."""
    image = Image.fromarray(texture(np.random.default_rng(0), (96, 96)))
    path = tmp_path / "a.jpg"
    image.save(path, restart_marker_blocks=3, comment=b"\xff\xd9\xff\x37", icc_profile=b"\xff" * 99)
    content = path.read_bytes()
    whole = read_image(path)
    for changed in (
        content + b"\x00\xff\x37\xff\xd8" * 9,
        content[:-2] + b"\xff\xff" + content[-2:],
        content[:2] + b"\xff\xe1\x00\x10" + b"\xff\xd8\xff\xd9" + b"\xff" * 10 + content[2:],
    ):
        path.write_bytes(changed)
        np.testing.assert_array_equal(read_image(path), whole)
    image.save(tmp_path / "b.jpg", format="MPO", save_all=True, append_images=[image.rotate(90)])
    image.save(tmp_path / "c.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "b.jpg"), read_image(tmp_path / "c.jpg"))
