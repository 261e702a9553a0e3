"""How far an image is from what was made of it: by a backbone's features, and by its pixels."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbone.extractor import FrozenExtractor, channels_first

POOLED = 3
"""Side of the neighbourhood by which features are averaged (released code)."""
Network = Callable[[Tensor], list[Tensor]]
"""A timm feature network: normalised pixels to the stages' maps."""


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 images as values from -1 to 1.

    Channels are not last in memory: the backward pass of group norms takes eight times as long so.
    """
    return (images.float() / 127.5 - 1).contiguous()


def to_bytes(values: Tensor) -> Tensor:
    """Return values from -1 to 1 as uint8 images."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def distances(
    network: Network, backbone: FrozenExtractor, values: Tensor, rebuilt: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how far images are from what was made of them, by features and by pixels.

    Args:
        network: that of the backbone, or a copy of it.
        backbone: says what its pixels and its maps are like.
        values: (B, 3, S, S), from -1 to 1.
        rebuilt: the same.

    Returns:
        (B, S, S) each.
    """
    maps, others = (stage_maps(network, backbone, part) for part in (values, rebuilt))
    by_features = feature_distance(maps, others, values.shape[-1])
    return by_features, pixel_distance(values, rebuilt)


def stage_maps(network: Network, backbone: FrozenExtractor, values: Tensor) -> list[Tensor]:
    """Return a network's maps (B, C_l, H_l, W_l) of images (B, 3, S, S), from -1 to 1."""
    pixels = ((values + 1) / 2 - backbone.mean) / backbone.std
    maps = network(pixels.contiguous(memory_format=torch.channels_last))
    return channels_first(backbone.net, maps)


def feature_distance(maps: Sequence[Tensor], others: Sequence[Tensor], size: int) -> Tensor:
    """Return 1 - cosine of averaged features, summed over stages, each at `size`, (B, S, S)."""
    found = []
    for one, other in zip(maps, others, strict=True):
        averaged = (F.avg_pool2d(m.float(), POOLED, 1, POOLED // 2) for m in (one, other))
        left, right = (F.normalize(m, dim=1) for m in averaged)
        # The same as 1 - cosine, without its loss of digits where the two are nearly equal.
        distance = (left - right).square().sum(dim=1) / 2  # (B, H_l, W_l)
        found.append(F.interpolate(distance[:, None], (size, size), mode="bilinear")[:, 0])
    return torch.stack(found).sum(dim=0)  # (B, S, S)


def pixel_distance(values: Tensor, others: Tensor) -> Tensor:
    """Return the absolute difference of images (B, 3, S, S), averaged over channels, (B, S, S)."""
    return (values - others).abs().mean(dim=1)
