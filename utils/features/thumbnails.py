"""Small grey copies of images, kept beside their features to find near-duplicates by."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

SIDE = 32
"""In pixels."""
_GREEN = 1  # nearly what an image is in grey, and there already


def thumbnails(images: Tensor) -> Tensor:
    """Return the green channels of images (B, 3, S, S) uint8, averaged to (B, 32, 32) uint8."""
    green = images[:, _GREEN : _GREEN + 1].float()  # (B, 1, S, S)
    return rearrange(F.adaptive_avg_pool2d(green, SIDE), "b 1 h w -> b h w").round().byte()
