"""Features scored by the nearest of several centres, each with a matrix of its own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.features.matmul import linear

ROUND = 256
"""Positions of a centre are filled up to multiples of it: `linear` likes few different numbers."""


def nearest(positions: Tensor, centres: Tensor, count: int) -> Tensor:
    """Return the indices (P, count) of the centres (K, D) nearest to positions (P, D)."""
    # |f - c|^2 without |f|^2, which orders the same and needs one product.
    lengths = centres.square().sum(dim=1)  # (K,)
    distance = linear(positions, -2 * centres, lengths)  # (P, K)
    if count == 1:
        return distance.argmin(dim=1, keepdim=True)
    return distance.topk(count, dim=1, largest=False).indices


def offsets_from(centre: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of positions (P, D) relative to a centre, filled up with zeros, (M, D)."""
    filled = F.pad(rows, (0, -len(rows) % ROUND))
    offsets = positions.index_select(0, filled).sub_(centre)
    offsets[len(rows) :] = 0
    return offsets


def smallest(
    positions: Tensor,
    centres: Tensor,
    matrices: Tensor,
    count: int,
    energies: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Return the smallest energies over each position's nearest centres.

    Args:
        positions: (P, D).
        centres: (K, D).
        matrices: (K, R, D + 1), one for the offsets [f; 1] from each centre.
        count: of the nearest centres.
        energies: T energies (M, T) of products (M, R) with the k-th matrix.

    Returns:
        (P, T).
    """
    P = len(positions)
    centre = rearrange(nearest(positions, centres, count), "p n -> (n p)")
    order = centre.argsort()
    sizes = torch.bincount(centre, minlength=len(centres)).tolist()
    parts = []
    for k, rows in enumerate(order.split(sizes)):
        offsets = offsets_from(centres[k], positions, rows % P)
        product = linear(offsets, matrices[k, :, :-1], matrices[k, :, -1])
        parts.append(energies(product[: len(rows)], k))
    found = torch.cat(parts)  # (N*P, T), by centre
    by_position = torch.empty_like(found).index_copy_(0, order, found)
    return rearrange(by_position, "(n p) t -> n p t", p=P).amin(dim=0)  # (P, T)


class Exported(nn.Module):
    """Maps of features by their nearest centres, for a graph of any number of images.

    Where `smallest` sorts features by their nearest centres, this picks each centre's features out
    of all.
    """

    centres: Tensor
    filters: Tensor
    lengths: Tensor

    def __init__(self, centres: Tensor, filters: Tensor, count: int, *, takes_root: bool) -> None:
        super().__init__()
        self.count = count
        self.takes_root = takes_root
        self.register_buffer("centres", centres)
        self.register_buffer("filters", filters)
        self.register_buffer("lengths", centres.square().sum(dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Return maps (B, H, W) of features (B, C, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, D)
        distance = torch.addmm(self.lengths, positions, self.centres.T, alpha=-2)  # (P, K)
        near = distance.topk(self.count, dim=1, largest=False).indices  # (P, n)
        least = torch.full_like(distance[:, 0], torch.inf)  # (P,)
        for k, (centre, matrix) in enumerate(zip(self.centres, self.filters, strict=True)):
            rows = (near == k).any(dim=1).nonzero().squeeze(1)  # (M,)
            offsets = positions.index_select(0, rows) - centre  # (M, D)
            filtered = torch.addmm(matrix[:, -1], offsets, matrix[:, :-1].T)  # (M, R)
            energies = filtered.square().sum(dim=1)  # (M,)
            energies = torch.minimum(energies, least.index_select(0, rows))
            least = least.scatter(0, rows, energies)
        scores = least.sqrt() if self.takes_root else least
        return rearrange(scores, "(b h w) -> b h w", b=B, h=H, w=W)
