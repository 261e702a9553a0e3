"""Small grey copies of images, kept beside their features to find near-duplicates by."""

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from utils.features.features import windows_of

SIDE = 32
"""In pixels."""
_GREEN = 1  # nearly what an image is in grey, and there already


def thumbnails(images: Tensor) -> Tensor:
    """Return the green channels of images (B, 3, S, S) uint8, averaged to (B, 32, 32) uint8.

    Of images (B, 3, T * S, S) that were cut into windows, those are side by side, each averaged.
    """
    green = images[:, _GREEN : _GREEN + 1]  # (B, 1, T * S, S)
    tiles = green.shape[2] // green.shape[3]
    if tiles > 1:
        per_side = math.isqrt(tiles)
        (windows,) = windows_of([green], tiles)
        small = F.adaptive_avg_pool2d(windows.float(), max(1, SIDE // per_side))
        green = rearrange(small, "(b r c) 1 h w -> b 1 (r h) (c w)", r=per_side, c=per_side)
    green = green.float()  # (B, 1, S, S)
    return rearrange(F.adaptive_avg_pool2d(green, SIDE), "b 1 h w -> b h w").round().byte()
