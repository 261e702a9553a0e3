"""Views of images for DifferNet: turned, and pooled by a backbone at several scales."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.backbone.extractor import FrozenExtractor, channels_first
from models.errors import ModelError


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Turn images about their centre: the nearest pixel counts, black where there is none.

    Args:
        images: (B, 3, S, S), float.
        angles: (B, V), in degrees, counter-clockwise.

    Returns:
        (B * V, 3, S, S), the views of an image one after the other.
    """
    S, V = images.shape[-1], angles.shape[1]
    radians = rearrange(angles, "b v -> (b v) 1 1") * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    middles = (2 * torch.arange(S, device=images.device) + 1) / S - 1  # (S,)
    x, y = rearrange(middles, "w -> 1 1 w"), rearrange(middles, "h -> 1 h 1")
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)  # (B * V, S, S, 2)
    every = repeat(images, "b c h w -> (b v) c h w", v=V)
    return F.grid_sample(every, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def pooled(net: nn.Module, pixels: Tensor, scales: int) -> Tensor:
    """Return the mean of the last stage over positions, at each scale, (B, D).

    Args:
        net: a feature network of timm.
        pixels: (B, 3, S, S), normalised.
        scales: sizes S, S / 2, S / 4 and so on, rounded down; pixels are picked, not averaged.
    """
    found = []
    for scale in range(scales):
        side = pixels.shape[-1] >> scale
        seen = F.interpolate(pixels, (side, side), mode="nearest") if scale else pixels
        found.append(channels_first(net, net(seen))[-1].mean(dim=(2, 3)))  # (B, C)
    return torch.cat(found, dim=1)


def check_sizes(backbone: FrozenExtractor, side: int, scales: int) -> None:
    """Check that a backbone takes images at all scales.

    Raises:
        ModelError: it does not.
    """
    sides = [side >> scale for scale in range(scales)]
    if sides[-1] < 1:
        raise ModelError(
            f"images of {side} pixels cannot be halved {scales - 1} times", {"scales": "lower"}
        )
    for smaller in sides[1:]:
        try:
            backbone.require_size(smaller)
        except ModelError as error:
            raise ModelError(f"at a smaller scale, {error}", {"scales": "1"}) from error
