import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from configs.tiles import Tiling
from utils.evaluation.smoothing import image_scores, upsample_and_blur


def reference(maps, size, sigma):
    """What the published pipelines do: upsample, then SciPy's blur, map by map."""
    if size is not None:
        maps = F.interpolate(maps[:, None], size=(size, size), mode="bilinear")[:, 0]
    return torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), sigma)) for m in maps])


def assert_close(found, expected, rtol):
    """Also of the same type and shape."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


def random_grids(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(28, 28), (56, 56), (7, 19), (19, 7), (1, 1), (1, 5), (90, 70)])
@pytest.mark.parametrize("size", [64, 33, 6, None])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0])
def test_equals_interpolate_then_scipy_blur_whatever_the_scale(grid, size, sigma):
    """Also where the blur is wider than the map, which SciPy then reflects several times."""
    maps = random_grids(3, *grid) * torch.tensor([1e-30, 1.0, 1e12])[:, None, None]
    exact = upsample_and_blur(maps.double(), size, sigma)
    assert_close(exact, reference(maps.double(), size, sigma), 1e-12)
    found = upsample_and_blur(maps, size, sigma)
    assert_close(found, exact.float(), 0)
    for stride in (2, 3):
        fewer = upsample_and_blur(maps, size, sigma, stride=stride)
        assert_close(fewer, found[:, ::stride, ::stride], 1e-6)


def test_same_size_without_blur_is_untouched():
    maps = random_grids(2, 5, 9)
    assert upsample_and_blur(maps, None, 0.0) is maps


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_one_pixel_maps_of_semantic_tasks_are_untouched(size, scale):
    maps = random_grids(4, 1, 1) * scale
    assert torch.equal(upsample_and_blur(maps, size, 4.0), maps)


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
    assert_close(upsample_and_blur(maps, 8, 1.0), upsample_and_blur(maps.float(), 8, 1.0), 0)


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


TILING = Tiling(image_size=80, tile_size=32, per_side=3)  # by 24 pixels: eight are shared


def in_a_mosaic(image, tiling):
    """What the windows of an image (K, K) hold, side by side: (1, n * S, n * S)."""
    rows = [image[rows, columns] for rows, columns in tiling.windows]
    n = tiling.per_side
    strips = [torch.cat(rows[i * n : i * n + n], dim=1) for i in range(n)]
    return torch.cat(strips)[None]


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_windows_that_agree_are_blended_to_what_they_show(sigma):
    """With maps as fine as the image there is nothing else to see than the image, blurred."""
    image = random_grids(80, 80).double()
    found = upsample_and_blur(in_a_mosaic(image, TILING), 80, sigma, tiling=TILING)
    expected = torch.from_numpy(gaussian_filter(image.numpy(), sigma)) if sigma else image
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


def test_windows_that_disagree_meet_without_a_step():
    """Each of another constant: where two meet, the map goes over from one to the other."""
    levels = torch.arange(9.0).reshape(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    found = upsample_and_blur(levels[None].double(), 80, 0.0, tiling=TILING)[0]
    assert found.min() == 0
    assert found.max() == 8
    steps = torch.maximum(found.diff(dim=0).abs().max(), found.diff(dim=1).abs().max())
    assert steps < 3 / 7  # rows of windows differ by three, over eight pixels
    assert torch.equal(found[:20, :20], torch.zeros(20, 20).double())


def test_a_stride_leaves_rows_and_columns_out():
    maps = random_grids(2, 12, 12)
    whole = upsample_and_blur(maps, 80, 1.0, tiling=TILING)
    assert whole.shape == (2, 80, 80)
    fewer = upsample_and_blur(maps, 80, 1.0, stride=3, tiling=TILING)
    assert_close(fewer, whole[:, ::3, ::3], 1e-6)


def test_windows_without_overlap_lie_side_by_side():
    tiling = Tiling(image_size=64, tile_size=32, per_side=2)
    image = random_grids(64, 64)
    assert torch.equal(upsample_and_blur(image[None], 64, 0.0, tiling=tiling)[0], image)
