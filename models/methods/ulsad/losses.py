"""How ULSAD compares features, and how it ties what an image network makes to an image's own."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patch_distance(ones: Tensor, others: Tensor, weight: float) -> Tensor:
    """Return the mean squared difference of channels, plus `weight` times 1 - cosine.

    Args:
        ones: (B, C, H, W).
        others: of the same shape.
        weight: of the directions; lambda.

    Returns:
        (B, H, W), at least 0.
    """
    squared = (ones - others).square().mean(dim=1)  # (B, H, W)
    if weight == 0:
        return squared
    return squared + weight * (1 - F.cosine_similarity(ones, others, dim=1))


def attend(queries: Tensor, features: Tensor) -> Tensor:
    """Return, for each query, the features it is most like, averaged by softmax.

    One head without learned projections or positions; logits are divided by sqrt(C).

    Args:
        queries: (B, C, H, W).
        features: keys and values, (B, C, H, W).

    Returns:
        (B, C, H, W).
    """
    H, W = queries.shape[2:]
    asking = rearrange(queries, "b c h w -> b (h w) c")
    tokens = rearrange(features, "b c h w -> b (h w) c")
    found = F.scaled_dot_product_attention(asking, tokens, tokens)  # (B, H*W, C)
    return rearrange(found, "b (h w) c -> b c h w", h=H, w=W)
