"""Anomaly maps to full resolution and to image scores.

Bilinear upsampling and then a Gaussian blur, as the published pipelines do it, is linear and acts
on rows and columns separately. So it is exactly `A @ M @ B.T`, with A and B built once per size.
"""

import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from configs.tiles import Tiling


def smoothing_matrix(grid: int, size: int, sigma: float) -> Tensor:
    """Returns the (size, grid) float64 operator that upsamples and blurs one axis.

    It is `F.interpolate` (bilinear, `align_corners=False`, no antialiasing) and then
    `scipy.ndimage.gaussian_filter1d` (`mode="reflect"`, `truncate=4.0`), applied to the identity.

    Args:
        grid: Length of the axis before, >= 1.
        size: Length of the axis after, in pixels, >= 1.
        sigma: Standard deviation of the blur in pixels of the result; 0 = no blur.

    Raises:
        ValueError: A length below 1 or a sigma that is negative or not finite.
    """
    if grid < 1 or size < 1:
        raise ValueError(f"grid is {grid} and size {size}; both must be at least 1")
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma is {sigma}; it must be finite and at least 0 (0 = no blur)")
    identity = torch.eye(grid, dtype=torch.float64, device="cpu").unsqueeze(1)  # (grid, 1, grid)
    matrix = F.interpolate(identity, size=size, mode="linear", align_corners=False)
    matrix = matrix.squeeze(1).T.contiguous()  # (size, grid)
    return _blurred(matrix, sigma)


def blending_matrix(grid: int, tiling: Tiling, sigma: float) -> Tensor:
    """Returns the (K, n * grid) float64 operator that makes an axis of the image of its windows'.

    Each window is upsampled as `smoothing_matrix` does it; where windows overlap, each counts by
    its distance to its own edge, at most the overlap, so that none ends in a step; then the whole
    is blurred.

    Args:
        grid: Length of a window's axis before, >= 1.
        tiling: The windows, n in a row, of an image of K pixels a side.
        sigma: Standard deviation of the blur in pixels of the image; 0 = no blur.
    """
    size, starts = tiling.tile_size, tiling.starts
    upsampled = smoothing_matrix(grid, size, 0.0)  # (S, grid)
    overlap = max([0, *(a + size - b for a, b in itertools.pairwise(starts))])
    places = torch.arange(size, dtype=torch.float64)
    weights = torch.minimum(places, size - 1 - places).add(0.5).clamp(max=max(overlap, 0.5))  # (S,)
    matrix = torch.zeros(tiling.image_size, len(starts), grid, dtype=torch.float64)
    total = torch.zeros(tiling.image_size, dtype=torch.float64)
    for number, start in enumerate(starts):
        matrix[start : start + size, number] = weights[:, None] * upsampled
        total[start : start + size] += weights
    return _blurred((matrix / total[:, None, None]).flatten(1), sigma)  # (K, n * grid)


def _blurred(matrix: Tensor, sigma: float) -> Tensor:
    """Returns an operator (size, grid) with a blur of its result after it."""
    if sigma == 0:
        return matrix
    blurred = gaussian_filter1d(matrix.numpy(), sigma, axis=0, mode="reflect", truncate=4.0)
    return torch.from_numpy(blurred)


@lru_cache(maxsize=16)
def _cached_matrix(
    grid: int, size: int, sigma: float, device: torch.device, tiling: Tiling | None
) -> Tensor:
    # A tensor made inside inference mode could not be used by autograd later, out of the cache.
    with torch.inference_mode(False):
        if tiling is not None:
            return blending_matrix(grid // tiling.per_side, tiling, sigma).to(device)
        return smoothing_matrix(grid, size, sigma).to(device)


def upsample_and_blur(
    anomaly_maps: Tensor,
    size: int | None,
    sigma: float,
    *,
    stride: int = 1,
    tiling: Tiling | None = None,
) -> Tensor:
    """Upsamples anomaly maps to `size` x `size` and blurs them.

    The two products run in float64, about 7 MFLOP a map from 56 x 56 to 224 x 224, so that neither
    autocast nor TF32 nor the size of the batch costs float32 scores their precision.

    Args:
        anomaly_maps: (B, h, w), any float.
        size: Height and width of the result in pixels; None keeps (h, w).
        sigma: Standard deviation of the blur in pixels of the result; 0 = no blur. The published
            pipelines use 4.
        stride: Only every stride-th row and column of the result is computed, from the first on.
        tiling: Of maps that are those of windows side by side, n in a row: (B, n * h, n * w). They
            are blended; `size` is that of the image.

    Returns:
        (B, size, size), float64 for float64 maps, else float32; with a stride, (B, s, s) with
        s = ceil(size / stride). Maps whose size stays and that have one pixel (semantic tasks) or
        no blur are returned as they are.

    Raises:
        ValueError: Maps that are not (B, h, w), or a size or sigma `smoothing_matrix` refuses.
    """
    if anomaly_maps.ndim != 3:
        raise ValueError(f"anomaly maps must be (B, h, w), got {tuple(anomaly_maps.shape)}")
    grid_height, grid_width = anomaly_maps.shape[1:]
    height, width = (grid_height, grid_width) if size is None else (size, size)
    device = anomaly_maps.device
    rows = _cached_matrix(grid_height, height, sigma, device, tiling)  # (height, h)
    columns = _cached_matrix(grid_width, width, sigma, device, tiling)  # (width, w)
    same_size = (height, width) == (grid_height, grid_width)
    if tiling is None and same_size and (sigma == 0 or height == width == 1):
        return anomaly_maps if stride == 1 else anomaly_maps[:, ::stride, ::stride]
    rows, columns = rows[::stride], columns[::stride]  # (height, h), (width, w)
    smoothed = rows @ (anomaly_maps.double() @ columns.T)  # (B, height, width)
    return smoothed if anomaly_maps.dtype == torch.float64 else smoothed.float()


def image_scores(anomaly_maps: Tensor) -> Tensor:
    """Returns the score of each image, (B,): the maximum of its map (B, H, W), never squashed."""
    return anomaly_maps.amax(dim=(1, 2))  # (B,)
