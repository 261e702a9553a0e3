"""How alike two images are around each position: structural and gradient similarity."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import kornia.metrics
import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
"""Side of the Gaussian window, of standard deviation 1.5 (Wang et al., 2004)."""
GMS_CONSTANT = 0.0026
"""Keeps the ratio finite without gradients (Xue et al., 2014: 170 / 255^2, for 0 to 1)."""

Further = ParamSpec("Further")
Comparison = Callable[Concatenate[Tensor, Tensor, Further], Tensor]


def in_float32(compare: Comparison[Further]) -> Comparison[Further]:
    """Let a comparison compute in float32 under autocast: differences of squares need the digits.

    Without autocast nothing is done, so that a traced graph holds nothing of it.
    """

    @functools.wraps(compare)
    def guarded(
        images: Tensor, others: Tensor, /, *args: Further.args, **options: Further.kwargs
    ) -> Tensor:
        kind = images.device.type
        if not torch.is_autocast_enabled(kind):
            return compare(images, others, *args, **options)
        with torch.autocast(kind, enabled=False):
            return compare(images.float(), others.float(), *args, **options)

    return guarded


@in_float32
def ssim_map(images: Tensor, others: Tensor, *, max_value: float = 1.0) -> Tensor:
    """Return the structural similarity at each pixel, averaged over channels, (B, H, W), at most 1.

    Borders are reflected. Source: "Image Quality Assessment" (Wang et al., 2004), equation 13.

    Args:
        images: (B, C, H, W), float32; both sides above 5.
        others: the same shape.
        max_value: the range of the values: 1 for 0 to 1, 2 for -1 to 1.
    """
    found = kornia.metrics.ssim(images, others, SSIM_WINDOW, max_val=max_value)
    return found.mean(dim=1)  # (B, H, W)


def gradient_magnitude(images: Tensor) -> Tensor:
    """Return the length of the Prewitt gradient of each channel, (B, C, H, W); borders continue."""
    C = images.shape[1]
    slope = 1 - torch.arange(3, dtype=images.dtype, device=images.device)  # 1, 0, -1
    edge = slope.expand(3, 3) / 3
    kernels = torch.stack([edge, edge.T])[:, None].repeat(C, 1, 1, 1)  # (2C, 1, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(padded, kernels, groups=C).unflatten(1, (C, 2))  # (B, C, 2, H, W)
    # The root has no slope at 0, which flat regions are.
    return (both.square().sum(dim=2) + 1e-12).sqrt()


@in_float32
def gms_map(images: Tensor, others: Tensor) -> Tensor:
    """Return the gradient magnitude similarity at each pixel, averaged over channels, (B, H, W).

    Source: "Gradient Magnitude Similarity Deviation" (Xue et al., 2014), equation 4.

    Args:
        images: (B, C, H, W), values in 0 to 1.
        others: the same shape.
    """
    one, other = gradient_magnitude(images), gradient_magnitude(others)
    similarity = (2 * one * other + GMS_CONSTANT) / (one**2 + other**2 + GMS_CONSTANT)
    return similarity.mean(dim=1)  # (B, H, W)


@in_float32
def multiscale_gms_map(images: Tensor, others: Tensor, *, scales: int) -> Tensor:
    """Return the mean of the maps of an image and its halvings, each at full size, (B, H, W).

    Source: "Reconstruction by inpainting for visual anomaly detection" (Zavrtanik et al., 2021).

    Args:
        images: (B, C, H, W), values in 0 to 1; sides of at least 2 ** (scales - 1).
        others: the same shape.
        scales: how many; 1 is the image alone.
    """
    size = images.shape[2:]
    maps = [gms_map(images, others)]
    for _ in range(scales - 1):
        images, others = F.avg_pool2d(images, 2), F.avg_pool2d(others, 2)
        small = gms_map(images, others)[:, None]
        maps.append(F.interpolate(small, size, mode="bilinear")[:, 0])  # (B, H, W)
    return torch.stack(maps).mean(dim=0)
