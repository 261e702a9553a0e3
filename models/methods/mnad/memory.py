"""The memory of MNAD: items of unit length that normal queries read, and that follow them.

Source: "Learning Memory-guided Normality for Anomaly Detection" (Park et al., CVPR 2020), section
3.2. Queries and items are of unit length, so the item of the largest product is the nearest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def read(queries: Tensor, items: Tensor) -> Tensor:
    """Return the items' mean for each query, weighted by a softmax over products, (P, C).

    No gradient passes through the weights, as in the released code.

    Args:
        queries: (P, C).
        items: (M, C).
    """
    weights = (queries @ items.T).softmax(dim=1).detach()  # (P, M)
    return weights @ items


def updated(items: Tensor, queries: Tensor) -> Tensor:
    """Return the items (M, C) after they have followed the queries (P, C) nearest to each.

    A query counts by its softmax over all queries, relative to the largest of it for that item. So
    only differences of products remain.
    """
    products = queries @ items.T  # (P, M)
    nearest = F.one_hot(products.argmax(dim=1), len(items))  # (P, M)
    weights = (products - products.amax(dim=0)).exp() * nearest
    return F.normalize(items + weights.T @ queries, dim=1)


def two_nearest(queries: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest and the second nearest item of each query (P, C), (P, C) each."""
    rows = (queries @ items.T).topk(2, dim=1).indices  # (P, 2)
    return items[rows[:, 0]], items[rows[:, 1]]


def draw_items(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Return items (count, channels) of unit length, drawn uniformly where all are positive."""
    return F.normalize(torch.rand(count, channels, generator=generator), dim=1)
