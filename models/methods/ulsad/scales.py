"""The scale of ULSAD's maps: quantiles over the pixels of normal images, of blurred maps."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

QUANTILES = (0.9, 0.995)
SIGMA = 4.0
"""Pixels, of the blur."""


def blurred(maps: Tensor, size: torch.Size) -> Tensor:
    """Return maps (B, h, w) at another size, (B, H, W), blurred by 33 x 33 Gaussian weights."""
    whole = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    radius = min(round(4 * SIGMA), min(size) - 1)
    kernel = (2 * radius + 1, 2 * radius + 1)
    return gaussian_blur2d(whole, kernel, (SIGMA, SIGMA))[:, 0]  # (B, H, W)


def quantiles_of(maps: Sequence[Tensor]) -> Tensor:
    """Return `QUANTILES` of all pixels of maps (B, H, W) together, (2,) float32.

    The released code takes a random 2^24 of them, where there are more: PyTorch's limit.
    """
    pixels = np.concatenate([part.numpy().reshape(-1) for part in maps])
    return torch.from_numpy(np.quantile(pixels, QUANTILES)).float()
