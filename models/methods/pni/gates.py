"""Distances to the nearest member of a coreset that a position may be compared with."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

SPARE = 2
"""Members proposed by a product beside the nearest one."""

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`F.linear`, or what computes the same."""


class Members:
    """The coreset, seen from its mean: smaller norms round less.

    Args:
        members: (max(M, D), C), in the order of choice: the first M are C_emb, the first D C_dist.
        owner: the nearest of C_dist of each of C_emb, (M,).
        classes: D.
        product: computes products of features.
    """

    def __init__(self, members: Tensor, owner: Tensor, classes: int, product: Product) -> None:
        self.shift = members.mean(dim=0)
        centred = members - self.shift
        squares = centred.square().sum(dim=1)
        count = len(owner)
        self.owner = owner
        self.embedding, self.embedding_squares = centred[:count], squares[:count]
        self.distribution, self.distribution_squares = centred[:classes], squares[:classes]
        self.product = product

    def gated(self, queries: Tensor, likely: Tensor, threshold: float) -> Tensor:
        """Return the distance to the nearest member that passes, (P,).

        A member passes where the class it belongs to is more likely than the threshold. The one
        whose class is the most likely always does: where C_dist is the larger set, its likely
        classes may have no member in C_emb.

        Args:
            queries: features (P, C).
            likely: probability of each class, (P, D).
            threshold: tau.
        """
        if likely.shape[1] > self.owner.shape[0]:
            blocked = _blocked(likely.index_select(1, self.owner), threshold)
        else:  # every class has a member, itself, and classes are fewer
            blocked = _blocked(likely, threshold).index_select(1, self.owner)  # (P, M)
        return self._nearest_open(queries - self.shift, blocked)

    def released(
        self, queries: Tensor, likely: Tensor, votes: Tensor, threshold: float, sharpness: float
    ) -> Tensor:
        """Return the released code's scores (P,): the mean of two, each with a gate of its own.

        The gate of the neighbours gives the r-th nearest of C_emb what is due to another: it asks
        for the class that is, among C_dist, as far down the position's list as the number of the
        class that the r-th chosen of C_emb belongs to.

        Args:
            queries: features (P, C).
            likely: probability of each class by the neighbours, (P, D).
            votes: that of each member of C_emb by the position, (P, M).
            threshold: of both gates.
            sharpness: g of the probability g exp(-g distance).
        """
        centred = queries - self.shift
        order = self._rough(centred).argsort(dim=1)  # (P, M)
        of_classes = self.product(-2 * centred, self.distribution, self.distribution_squares)
        by_rank = (likely > threshold).gather(1, of_classes.argsort(dim=1))  # (P, D)
        passes = by_rank.index_select(1, self.owner)  # (P, M), by rank
        # In either gate the farthest always passes.
        ranks = torch.arange(passes.shape[1], device=passes.device)
        first = torch.where(passes, ranks, ranks[-1]).amin(dim=1, keepdim=True)  # (P, 1)
        chosen = self.embedding[order.gather(1, first)[:, 0]]  # (P, C)
        by_neighbours = torch.linalg.vector_norm(centred - chosen, dim=1)
        farthest = torch.linalg.vector_norm(centred - self.embedding[order[:, -1]], dim=1)
        by_position = self._nearest_open(centred, votes <= threshold).minimum(farthest)
        return sharpness * (by_neighbours + by_position) / 2 - math.log(sharpness)

    def _rough(self, centred: Tensor) -> Tensor:
        """Return squared distances to C_emb, (P, M), less the squared norm of each feature."""
        return self.product(-2 * centred, self.embedding, self.embedding_squares)

    def _nearest_open(self, centred: Tensor, blocked: Tensor) -> Tensor:
        """Return the distance to the nearest member not `blocked`, (P, M); infinite for none."""
        rough = self._rough(centred).masked_fill_(blocked, torch.inf)
        proposed = min(1 + SPARE, blocked.shape[1])
        best, rows = rough.topk(proposed, dim=1, largest=False)  # (P, proposed)
        offsets = rearrange(centred, "p c -> p 1 c") - self.embedding[rows]
        distances = torch.linalg.vector_norm(offsets, dim=2)
        return distances.masked_fill(best.isinf(), torch.inf).amin(dim=1)


def _blocked(likely: Tensor, threshold: float) -> Tensor:
    """Return which of (P, K) are neither above the threshold nor the largest of their row."""
    return (likely <= threshold) & (likely < likely.amax(dim=1, keepdim=True))


def without_border(maps: Tensor, border: int) -> tuple[Tensor, Tensor]:
    """Return maps (B, H, W) whose border repeats what is inside, and the maximum inside, (B,)."""
    inside = maps[:, border:-border, border:-border]
    filled = F.pad(rearrange(inside, "b h w -> b 1 h w"), [border] * 4, mode="replicate")
    return rearrange(filled, "b 1 h w -> b h w"), inside.amax(dim=(1, 2))
