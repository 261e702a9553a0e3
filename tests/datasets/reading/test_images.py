import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image

from datasets.reading.images import is_image_file, read_image, read_mask, read_size
from datasets.samples import DataError
from tests.datasets.trees import save, texture

WIDTH, HEIGHT = 24, 16


@pytest.fixture
def colours():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF", ".ppm", ".PNG"])
def test_lossless_rgb_is_read_as_saved(tmp_path, colours, suffix):
    path = save(tmp_path / f"a{suffix}", colours)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, colours)
    assert read_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_lossy_rgb_is_close(tmp_path, suffix):
    colours = texture(np.random.default_rng(0), (64, 48))
    image = read_image(save(tmp_path / f"a{suffix}", colours))
    assert image.shape == colours.shape
    assert np.abs(image.astype(int) - colours).mean() < 8


def test_grey_is_repeated(tmp_path, colours):
    image = read_image(save(tmp_path / "a.pgm", colours[:, :, 0]))
    np.testing.assert_array_equal(image, np.repeat(colours[:, :, :1], 3, axis=2))


def test_alpha_is_dropped_not_blended(tmp_path, colours):
    alpha = np.zeros((HEIGHT, WIDTH, 1), dtype=np.uint8)
    rgba = save(tmp_path / "a.png", np.concatenate([colours, alpha], axis=2))
    np.testing.assert_array_equal(read_image(rgba), colours)
    grey_alpha = save(tmp_path / "b.png", np.concatenate([colours[:, :, :1], alpha], axis=2))
    np.testing.assert_array_equal(read_image(grey_alpha)[:, :, 2], colours[:, :, 0])


def test_palette_gives_its_colours(tmp_path, colours):
    few = (colours // 128) * 255
    path = tmp_path / "a.png"
    Image.fromarray(few).quantize(8).save(path)
    with Image.open(path) as image:
        assert image.mode == "P"
    np.testing.assert_array_equal(read_image(path), few)


def test_cmyk_is_converted(tmp_path):
    # Full cyan ink leaves no red.
    Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0, 0], [0, 255, 255])


def test_one_bit_image_is_black_and_white(tmp_path, colours):
    bits = colours[:, :, 0] > 128
    Image.fromarray(bits).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[:, :, 1], bits * 255)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_keeps_the_high_byte(tmp_path, suffix):
    # A dark image must stay dark: no stretching to its own range.
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 40
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    image = read_image(tmp_path / f"a{suffix}")
    assert image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(image[:, :, 0], values >> 8)


def test_values_beyond_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*floating-point"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, suffix, orientation, turns):
    drawn = np.full((HEIGHT, WIDTH, 3), 20, dtype=np.uint8)
    drawn[:8, :8] = 240
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(drawn).save(path, exif=exif)
    upright = np.rot90(drawn, turns)
    image = read_image(path)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).max() < 40
    assert read_size(path) == upright.shape[:2]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_file_is_an_error_not_half_an_image(tmp_path, suffix, part):
    whole = save(tmp_path / f"whole{suffix}", texture(np.random.default_rng(0), (96, 96)))
    cut = tmp_path / f"cut{suffix}"
    content = whole.read_bytes()
    cut.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match=rf"cannot read the image .*cut\{suffix}"):
        read_image(cut)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "empty.jpg"):
        for read in (read_image, read_mask, read_size):
            with pytest.raises(DataError, match=f"cannot read the image .*{name}"):
                read(tmp_path / name)
    with pytest.raises(DataError, match=r"image file not found: .*none\.png"):
        read_image(tmp_path / "none.png")


def test_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch, colours):
    path = save(tmp_path / "bomb.png", colours)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    for read in (read_image, read_size):
        with pytest.raises(DataError, match=r"too large to be read safely: .*bomb\.png"):
            read(path)


def test_large_image_below_the_limit_is_read(tmp_path, monkeypatch, colours):
    path = save(tmp_path / "large.png", colours)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert read_image(path).shape == colours.shape


@pytest.fixture
def mask():
    drawn = np.zeros((HEIGHT, WIDTH), dtype=bool)
    drawn[4:9, 10:20] = True
    return drawn


@pytest.mark.parametrize("value", [1, 7, 255])
def test_mask_counts_every_value_above_zero(tmp_path, mask, value):
    path = save(tmp_path / "mask.png", mask.astype(np.uint8) * np.uint8(value))
    read = read_mask(path)
    assert read.dtype == bool
    np.testing.assert_array_equal(read, mask)


def test_one_bit_mask(tmp_path, mask):
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "1"
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_mask_of_a_palette_counts_the_index(tmp_path, mask):
    image = Image.fromarray(mask.astype(np.uint8)).convert("P")
    # Background of a visible colour, defect black: the index is the label, not the colour.
    image.putpalette([200, 200, 200, 0, 0, 0])
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_mask_in_colour_ignores_alpha(tmp_path, mask):
    rgba = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    rgba[mask, 2] = 255
    rgba[:, :, 3] = 255
    np.testing.assert_array_equal(read_mask(save(tmp_path / "mask.png", rgba)), mask)


def test_16_bit_mask(tmp_path, mask):
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)


@pytest.mark.parametrize("value", [120, 255])
def test_jpeg_mask_does_not_grow_by_its_compression(tmp_path, value):
    y, x = np.mgrid[:64, :64]
    disc = np.hypot(y - 30, x - 33) < 12
    path = save(tmp_path / "mask.jpg", disc.astype(np.uint8) * np.uint8(value))
    with Image.open(path) as image:
        assert ((np.asarray(image) > 0) & ~disc).sum() > 50
    assert (read_mask(path) ^ disc).sum() <= 2


def test_empty_jpeg_mask_stays_empty(tmp_path):
    assert not read_mask(save(tmp_path / "mask.jpg", np.zeros((16, 16), dtype=np.uint8))).any()


def test_is_image_file(tmp_path, colours):
    assert is_image_file(save(tmp_path / "a.PNG", colours))
    hidden = save(tmp_path / ".a.png", colours)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").touch()
    assert not is_image_file(hidden)
    assert not is_image_file(tmp_path / "folder.png")
    assert not is_image_file(tmp_path / "notes.txt")


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


def test_of_several_frames_the_first_is_read(tmp_path, colours):
    others = [Image.fromarray(colours[::-1].copy())]
    path = tmp_path / "a.tif"
    Image.fromarray(colours).save(path, save_all=True, append_images=others)
    np.testing.assert_array_equal(read_image(path), colours)
