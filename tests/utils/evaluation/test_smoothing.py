import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from utils.evaluation.smoothing import image_scores, smoothing_matrix, upsample_and_blur


def reference(maps, size, sigma):
    """What the published pipelines do: upsample, then SciPy's blur, map by map."""
    upsampled = F.interpolate(
        maps.double().unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False
    ).squeeze(1)
    return torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), sigma)) for m in upsampled])


def random_grids(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("grid", [(28, 28), (56, 56), (7, 19), (19, 7), (1, 1), (1, 5), (90, 70)])
@pytest.mark.parametrize("size", [64, 33])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0])
def test_a_stride_gives_the_same_pixels_but_fewer(grid, size, sigma):
    maps = random_grids(3, *grid)
    whole = upsample_and_blur(maps, size, sigma)
    for stride in (2, 3):
        found = upsample_and_blur(maps, size, sigma, stride=stride)
        torch.testing.assert_close(found, whole[:, ::stride, ::stride], rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", [(28, 28), (56, 56), (7, 19), (19, 7), (1, 1), (1, 5), (90, 70)])
@pytest.mark.parametrize("size", [64, 33])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0])
def test_equals_interpolate_then_scipy_blur(grid, size, sigma):
    maps = random_grids(3, *grid) * 1e3
    result = upsample_and_blur(maps, size, sigma)
    assert result.shape == (3, size, size)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, reference(maps, size, sigma).float(), rtol=1e-6, atol=0)


def test_blur_wider_than_the_map_reflects_as_scipy_does():
    maps = random_grids(2, 3, 3, dtype=torch.float64)
    result = upsample_and_blur(maps, 6, 4.0)
    torch.testing.assert_close(result, reference(maps, 6, 4.0), rtol=1e-12, atol=0)


def test_rows_of_the_matrix_are_averages():
    matrix = smoothing_matrix(28, 224, 4.0)
    assert matrix.shape == (224, 28)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(224, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.flip(0, 1))  # neither end is favoured


def test_same_size_without_blur_is_untouched():
    maps = random_grids(2, 5, 9)
    assert upsample_and_blur(maps, None, 0.0) is maps


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_one_pixel_maps_of_semantic_tasks_are_untouched(size, scale):
    maps = random_grids(4, 1, 1) * scale
    assert torch.equal(upsample_and_blur(maps, size, 4.0), maps)


def test_size_none_blurs_on_the_grid():
    maps = random_grids(1, 12, 20, dtype=torch.float64)
    expected = torch.from_numpy(gaussian_filter(maps[0].numpy(), 2.0))
    torch.testing.assert_close(upsample_and_blur(maps, None, 2.0)[0], expected)


def test_a_map_scores_the_same_in_any_batch():
    maps = random_grids(20, 28, 28)
    together = upsample_and_blur(maps, 64, 4.0)
    one_by_one = torch.cat([upsample_and_blur(m, 64, 4.0) for m in maps.split(1)])
    assert torch.equal(together, one_by_one)


def test_autocast_does_not_coarsen_the_scores():
    maps = random_grids(2, 28, 28)
    expected = upsample_and_blur(maps, 64, 4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(upsample_and_blur(maps, 64, 4.0), expected)


def test_half_precision_maps_come_back_as_float32():
    maps = random_grids(2, 4, 4).half()
    result = upsample_and_blur(maps, 8, 1.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, upsample_and_blur(maps.float(), 8, 1.0), rtol=0, atol=0)


def test_matrices_first_built_in_inference_mode_serve_autograd_later():
    with torch.inference_mode():
        upsample_and_blur(random_grids(1, 6, 6), 23, 1.0)
    maps = random_grids(1, 6, 6).requires_grad_()
    upsample_and_blur(maps, 23, 1.0).sum().backward()
    assert maps.grad is not None
    assert maps.grad.abs().sum() > 0


def test_scores_keep_their_scale():
    maps = torch.zeros(3, 8, 8)
    maps[0, 7, 0], maps[1, 3, 3], maps[2] = 1e6, 1e-6, -5.0
    assert torch.equal(image_scores(maps), torch.tensor([1e6, 1e-6, -5.0]))


@pytest.mark.parametrize(
    ("shape", "size", "sigma", "message"),
    [
        ((2, 1, 4, 4), 8, 4.0, r"\(B, h, w\), got \(2, 1, 4, 4\)"),
        ((2, 4, 4), 0, 4.0, "size 0"),
        ((2, 4, 4), 8, -1.0, "sigma is -1"),
        ((2, 4, 4), 8, float("nan"), "sigma is nan"),
        ((2, 1, 1), None, -1.0, "sigma is -1"),
    ],
)
def test_bad_input(shape, size, sigma, message):
    with pytest.raises(ValueError, match=message):
        upsample_and_blur(torch.zeros(shape), size, sigma)
