"""Prototypes: centres of normal features, by k-means on a sample of their positions."""

import math

import torch
from einops import rearrange
from torch import Tensor

from models.detector import FeatureSource
from models.errors import ModelError
from models.features.matmul import full_precision, linear
from models.features.multiscale import features_at, grid_size

READ = 16
"""Images read at once."""


def kmeans_centres(
    bank: FeatureSource, count: int, *, positions: int, generator: torch.Generator
) -> Tensor:
    """Return k-means centres of normal features.

    Args:
        bank: the features.
        count: centres K.
        positions: features that k-means sees, as many of each image.
        generator: draws them, and the seeds of k-means.

    Returns:
        (K, C), on the CPU.

    Raises:
        ModelError: there are fewer features than centres.
    """
    # A second of import that only prototypes need.
    from sklearn.cluster import KMeans, kmeans_plusplus
    from threadpoolctl import threadpool_limits

    per_image = math.ceil(positions / len(bank))
    sample = []
    for stages in bank.stage_batches(READ):
        H, W = grid_size(stages)
        drawn = [torch.randperm(H * W, generator=generator)[:per_image] for _ in stages[0]]
        places = torch.stack(drawn).to(stages[0].device)  # (B, N)
        sample.append(rearrange(features_at(stages, places), "b n c -> (b n) c").cpu())
    stacked = torch.cat(sample)  # (S, C)
    if len(stacked) < count:
        raise ModelError(
            f"{count} prototypes need as many normal features; there are {len(stacked)}",
            {"prototypes": "lower"},
        )
    points = stacked.numpy()
    state = int(torch.randint(2**31, (1,), generator=generator))
    # One candidate for each seed, as first published: to compare five, as scikit-learn does, takes
    # longer than all iterations, and gains less than two random states differ by (measured: 0.07 %
    # of the inertia).
    seeds, _ = kmeans_plusplus(points, count, n_local_trials=1, random_state=state)
    # Threads would add their sums in the order in which they end: other bits with each fit.
    with threadpool_limits(1, user_api="openmp"):
        means = KMeans(count, init=seeds, n_init=1, max_iter=50).fit(points)
    return torch.from_numpy(means.cluster_centers_)


def lloyd(
    features: Tensor, count: int, *, generator: torch.Generator, iterations: int = 10
) -> Tensor:
    """Return centres of features by a few iterations of k-means from random features.

    For centres that only divide features into neighbourhoods: scikit-learn's k-means++ and all its
    iterations take ten times as long, for an inertia that scores do not show.

    Args:
        features: (S, C), at least K of them.
        count: centres K; where fewer features differ, some are equal.
        generator: draws the first centres.
        iterations: in all.

    Returns:
        (K, C), where the features are.
    """
    drawn = torch.randperm(len(features), generator=generator)[:count]
    centres = features[drawn.to(features.device)]  # (K, C)
    with full_precision(features.device):
        for _ in range(iterations):
            owner = owners(features, centres)  # (S,)
            sums = torch.zeros_like(centres).index_add_(0, owner, features)
            sizes = rearrange(torch.bincount(owner, minlength=count), "k -> k 1")
            centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres


def owners(features: Tensor, centres: Tensor) -> Tensor:
    """Return which of centres (K, C) is nearest to each of features (S, C): (S,), int64."""
    lengths = centres.square().sum(dim=1)  # (K,)
    return linear(features, -2 * centres, lengths).argmin(dim=1)


def apart(centres: Tensor, features: Tensor, share: float) -> Tensor:
    """Keep centres that differ, those of most features first.

    Where many features are all but equal, as on a flat background, k-means places several centres
    in one spot; which of them is nearest is then decided by rounding.

    Args:
        centres: (K, C).
        features: (S, C) they were found on.
        share: of the mean squared distance of a feature to its nearest centre; the squared distance
            of each two centres that are kept is larger.

    Returns:
        (at most K, C), at least one.
    """
    with full_precision(features.device):
        owner = owners(features, centres)  # (S,)
    limit = share * (features - centres[owner]).square().sum(dim=1).mean()
    sizes = torch.bincount(owner, minlength=len(centres))
    order = sizes.argsort(descending=True, stable=True)
    # Not by products, which round where centres nearly coincide.
    gaps = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")  # (K, K)
    is_near = (gaps.square() <= limit).cpu()
    kept: list[int] = []
    for k in order.tolist():
        if not is_near[k, kept].any():
            kept.append(k)
    return centres[kept]
