"""A defect as a vector: how the features inside a mask differ from those around it.

What is subtracted is what the defect lies on: a scratch on wood and one on metal differ more in
their surroundings than in being scratches. Channels are in units of what normal images vary by, and
each stage of the backbone has unit length, so that none of them drowns another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

GAP = 0.018
"""Pixels between mask and surroundings that belong to neither, as a share of the image's side."""
SMALLEST = 1e-6
"""Of a deviation, and of what lengths and sums are divided by."""


@dataclass(frozen=True)
class Standard:
    """Of each stage's channels on normal images, (C_l,) each.

    Attributes:
        means: over images and positions.
        deviations: likewise.
    """

    means: tuple[Tensor, ...]
    deviations: tuple[Tensor, ...]


def standard_of(batches: Iterable[Sequence[Tensor]]) -> Standard:
    """Measure the channels of stages (B, C_l, H_l, W_l) in one reading, in double precision."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    counts: list[int] = []
    for stages in batches:
        if not sums:
            sums = [stage.new_zeros(stage.shape[1], dtype=torch.float64) for stage in stages]
            squares = [torch.zeros_like(one) for one in sums]
            counts = [0] * len(stages)
        for i, stage in enumerate(stages):
            values = stage.double()
            sums[i] += values.sum(dim=(0, 2, 3))  # (C_l,)
            squares[i] += values.square().sum(dim=(0, 2, 3))  # (C_l,)
            counts[i] += stage.numel() // stage.shape[1]
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    variances = [
        (square / count - mean.square()).clamp(min=0)
        for square, count, mean in zip(squares, counts, means, strict=True)
    ]
    return Standard(
        tuple(mean.float() for mean in means),
        tuple(variance.sqrt().float() + SMALLEST for variance in variances),
    )


def surroundings(mask: np.ndarray, width: float) -> np.ndarray:
    """Return the ring around a mask.

    Args:
        mask: (S, S) bool, all that is no surroundings.
        width: of the ring, as a share of the side S.

    Returns:
        (S, S) bool; all False where the mask has no outside or no pixel.
    """
    inner = round(GAP * len(mask))
    return _widened(mask, inner + round(width * len(mask))) & ~_widened(mask, inner)


def contrasts(
    stages: Sequence[Tensor], inside: Tensor, around: Tensor, standard: Standard
) -> Tensor:
    """Return a vector of each of B masks, whose stages have unit length each.

    Args:
        stages: (B, C_l, H_l, W_l) features of the images that the masks are of.
        inside: (B, S, S) weights of pixels, 0 outside the mask.
        around: (B, S, S) weights of the surroundings; where they are 0 everywhere, the contrast is
            to the mean of normal images.
        standard: of the stages.

    Returns:
        (B, D) float32, D the channels of all stages; 0 where there is no pixel inside.
    """
    found = []
    for stage, mean, deviation in zip(stages, standard.means, standard.deviations, strict=True):
        difference = _pooled(stage, inside, mean, deviation) - _pooled(
            stage, around, mean, deviation
        )
        found.append(F.normalize(difference, dim=1))  # (B, C_l)
    return torch.cat(found, dim=1)  # (B, D)


def turned(values: Tensor, quarters: int) -> Tensor:
    """Return images or masks (..., S, S) turned by quarters."""
    return torch.rot90(values, quarters, (-2, -1)).contiguous()


def whatever_way_up(vectors: Sequence[Tensor], stage_channels: Sequence[int]) -> Tensor:
    """Return what contrasts of the same defects have in common, turned by quarters.

    A scratch is a scratch across and along; its features are not the same.

    Args:
        vectors: (B, D) each, of `contrasts`.
        stage_channels: of the stages that D is made of.

    Returns:
        (B, D), their mean, each stage of unit length.
    """
    mean = torch.stack(list(vectors)).mean(dim=0)  # (B, D)
    parts = mean.split(list(stage_channels), dim=1)
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)  # (B, D)


def whole_images(stages: Sequence[Tensor], standard: Standard) -> Tensor:
    """Return the averages of whole images (B, D), standardised, each stage of unit length."""
    found = [
        F.normalize((stage.float().mean(dim=(2, 3)) - mean) / deviation, dim=1)  # (B, C_l)
        for stage, mean, deviation in zip(stages, standard.means, standard.deviations, strict=True)
    ]
    return torch.cat(found, dim=1)  # (B, D)


def _pooled(stage: Tensor, weights: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Average standardised features over weights (B, S, S), (B, C_l); 0 without a weight."""
    size = stage.shape[2], stage.shape[3]
    shares = F.adaptive_avg_pool2d(weights[:, None], size)[:, 0]  # (B, H_l, W_l)
    total = shares.sum(dim=(1, 2))[:, None]  # (B, 1)
    sums = einsum(stage.float(), shares, "b c h w, b h w -> b c")
    # The mean goes off after the sum: features are read once, and no copy of them is made.
    averages = sums / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, (averages - mean) / deviation, 0.0)


def _widened(mask: np.ndarray, by: int) -> np.ndarray:
    kernel = np.ones((2 * by + 1, 2 * by + 1), dtype=np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)  # (S, S)
