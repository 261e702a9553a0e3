import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from datasets.reading.transforms import PairTransform
from tests.datasets.trees import texture

RESIZES = ["opencv_square", "lanczos_shorter", "bilinear_shorter"]


def intersection_over_union(a, b):
    return (a & b).sum() / (a | b).sum()


def random_image(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(("image_size", "crop_size"), [(64, 56), (64, None), (65, 56), (61, 61)])
@pytest.mark.parametrize("size", [(96, 96), (201, 133), (133, 201), (77, 50), (40, 31), (64, 64)])
def test_mask_stays_on_its_defect(resize, image_size, crop_size, size):
    width, height = size
    mask = np.zeros((height, width), dtype=bool)
    # Off centre, so that a flip, a transposition or a wrong offset is found out.
    mask[int(0.3 * height) : int(0.65 * height), int(0.4 * width) : int(0.8 * width)] = True
    image = np.repeat(mask[:, :, None] * np.uint8(255), 3, axis=2)
    transform = PairTransform(image_size, crop_size, resize)
    transformed = transform.image(image)
    moved = transform.mask(mask)
    assert transformed.shape == (transform.output_size, transform.output_size, 3)
    assert moved.shape == (transform.output_size, transform.output_size)
    assert transformed.dtype == np.uint8
    assert moved.dtype == bool
    assert intersection_over_union(transformed[:, :, 1] > 127, moved) > 0.95
    assert 0.02 < moved.mean() < 0.9


@pytest.mark.parametrize("resize", RESIZES)
def test_mask_is_not_shifted_by_a_fraction_of_a_pixel(resize):
    # Reduced four times, cv2.INTER_NEAREST would sample each block's corner: 1.5 pixels off.
    mask = np.zeros((256, 256), dtype=bool)
    mask[101:151, 103:155] = True
    moved = PairTransform(64, None, resize).mask(mask)
    centre = np.argwhere(moved).mean(axis=0) * 4 + 1.5
    assert np.abs(centre - [125.5, 128.5]).max() < 1.1


def test_opencv_square_is_the_published_pipeline():
    image = random_image(300, 211)
    squeezed = cv2.resize(image, (256, 256), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(
        PairTransform(256, 224, "opencv_square").image(image), squeezed[16:240, 16:240]
    )
    np.testing.assert_array_equal(PairTransform(256, None, "opencv_square").image(image), squeezed)


@pytest.mark.parametrize("size", [(300, 211), (211, 300), (97, 97), (64, 80)])
@pytest.mark.parametrize(("image_size", "crop_size"), [(64, 56), (64, 57), (63, 56), (64, 64)])
@pytest.mark.parametrize("resize", ["lanczos_shorter", "bilinear_shorter"])
def test_shorter_side_is_torchvisions_pipeline(size, image_size, crop_size, resize):
    mode = v2.InterpolationMode[resize.removesuffix("_shorter").upper()]
    reference = v2.Compose([v2.Resize(image_size, mode), v2.CenterCrop(crop_size)])
    image = random_image(*size)
    np.testing.assert_array_equal(
        PairTransform(image_size, crop_size, resize).image(image),
        np.asarray(reference(Image.fromarray(image))),
    )


@pytest.mark.parametrize("resize", ["lanczos_shorter", "bilinear_shorter"])
def test_shorter_side_without_crop_keeps_the_whole_image(resize):
    image = texture(np.random.default_rng(0), (120, 60))
    resample = Image.Resampling[resize.removesuffix("_shorter").upper()]
    np.testing.assert_array_equal(
        PairTransform(48, None, resize).image(image),
        np.asarray(Image.fromarray(image).resize((48, 48), resample)),
    )


LENGTHS = st.one_of(st.integers(1, 40), st.just(2000))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(RESIZES),
    LENGTHS,
    LENGTHS,
    st.integers(1, 24),
    st.one_of(st.none(), st.integers(1, 24)),
)
def test_output_is_square_and_contiguous(resize, width, height, image_size, crop_size):
    if crop_size is not None:
        crop_size = min(crop_size, image_size)
    transform = PairTransform(image_size, crop_size, resize)
    image = transform.image(random_image(width, height))
    mask = transform.mask(np.ones((height, width), dtype=bool))
    size = crop_size or image_size
    assert image.shape == (size, size, 3)
    assert mask.shape == (size, size)
    assert mask.all()
    torch.from_numpy(image)


def test_bad_sizes():
    with pytest.raises(ValueError, match="crop_size 225 exceeds image_size 224"):
        PairTransform(224, 225, "opencv_square")
    with pytest.raises(ValueError, match="must be 1 or more"):
        PairTransform(0, None, "opencv_square")
    with pytest.raises(ValueError, match="must be 1 or more"):
        PairTransform(32, 0, "opencv_square")
    with pytest.raises(ValueError, match="'nearest' is none of opencv_square"):
        PairTransform(32, None, "nearest")


PADDED = PairTransform(64, None, "bilinear_padded")


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (201, 133), (50, 50), (640, 20), (3, 200)])
def test_padding_keeps_the_aspect_and_mirrors_the_image_beside_its_box(size):
    width, height = size
    image = random_image(width, height)
    top, left, rows, columns = PADDED.box(height, width)
    assert max(rows, columns) == 64
    assert abs(columns / rows - width / height) <= 0.5 * max(1, width / height) / min(rows, columns)
    padded = PADDED.image(image)
    assert padded.shape == (64, 64, 3)
    inside = np.array(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
    assert np.array_equal(padded[top : top + rows, left : left + columns], inside)
    margins = ((top, 64 - rows - top), (left, 64 - columns - left))
    assert max(abs(a - b) for a, b in margins) <= 1
    if top:
        assert np.array_equal(padded[top - 1], padded[top])
    if left:
        assert np.array_equal(padded[:, left - 1], padded[:, left])


def test_a_padded_mask_stays_on_its_defect_and_marks_no_margin():
    mask = np.zeros((80, 200), dtype=bool)
    mask[:30, 60:120] = True  # at the edge, which the margin mirrors
    image = np.repeat(mask[:, :, None] * np.uint8(255), 3, axis=2)
    top, left, rows, columns = PADDED.box(80, 200)
    moved = PADDED.mask(mask)
    assert not moved[:top].any()
    box = slice(top, top + rows), slice(left, left + columns)
    assert intersection_over_union(PADDED.image(image)[box][..., 0] > 127, moved[box]) > 0.9
    assert moved.sum() == moved[box].sum()


def test_only_padding_leaves_margins():
    assert PairTransform(64, 56, "lanczos_shorter").box(80, 200) is None
    with pytest.raises(ValueError, match="of padded images nothing is cropped"):
        PairTransform(64, 56, "bilinear_padded")
