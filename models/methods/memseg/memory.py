"""How far the features of an image are from those of the nearest remembered one, in what unit."""

from collections.abc import Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from models.errors import ModelError
from models.features.matmul import full_precision

LEAST_DEVIATION = 1e-6


def deviations(batches: Iterable[Sequence[Tensor]]) -> Tensor:
    """Return the standard deviation of each stage's maps over all batches, (stages,), float64."""
    sums = [torch.stack([_moments(one.double()) for one in maps]) for maps in batches]
    count, total, squares = torch.stack(sums).sum(dim=0).T  # (stages,)
    variances = squares / count - (total / count).square()
    return variances.clamp_min(LEAST_DEVIATION**2).sqrt()


def _moments(maps: Tensor) -> Tensor:
    """Return the number of values, their sum and that of their squares, (3,), where they are."""
    count = maps.new_full((), maps.numel())
    return torch.stack([count, maps.sum(), maps.square().sum()])  # (3,)


def squared_differences(levels: Sequence[Tensor], memories: Sequence[Tensor]) -> list[Tensor]:
    """Return the squared differences of maps to those of the nearest remembered image.

    It is that of least mean squared difference, summed over the stages.

    Args:
        levels: maps of the stages, (B, C_l, H_l, W_l).
        memories: of the stages, (M, H_l * W_l * C_l).

    Returns:
        (B, C_l, H_l, W_l) of each stage, float32.

    Raises:
        ModelError: the maps are not as large as the remembered ones.
    """
    rows = [rearrange(level.float(), "b c h w -> b (h w c)") for level in levels]
    if any(one.shape[1] != memory.shape[1] for one, memory in zip(rows, memories, strict=True)):
        raise ModelError(
            "the images are not as large as those that MemSeg remembers: fit and score at the same "
            "image size"
        )
    nearest = _find_nearest(rows, memories)  # (B,)
    found = []
    for level, queries, memory in zip(levels, rows, memories, strict=True):
        height, width = level.shape[2:]
        squares = (queries - memory[nearest]).square()
        found.append(rearrange(squares, "b (h w c) -> b c h w", h=height, w=width))
    return found


@torch.no_grad()
def _find_nearest(rows: Sequence[Tensor], memories: Sequence[Tensor]) -> Tensor:
    """Return which remembered image is nearest, (B,), by features (B, H_l * W_l * C_l)."""
    distances = []
    with full_precision(rows[0].device):
        for queries, memory in zip(rows, memories, strict=True):
            # Less the square of the query, which is the same for all.
            squares = memory.square().sum(dim=1) - 2 * queries @ memory.T  # (B, M)
            distances.append(squares / memory.shape[1])
    return torch.stack(distances).sum(dim=0).argmin(dim=1)
