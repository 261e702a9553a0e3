"""Prototypes: centres of normal features, by k-means on a sample of their positions."""

import math

import torch
from einops import rearrange
from torch import Tensor

from models.detector import FeatureSource
from models.errors import ModelError
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
    stacked = torch.cat(sample).numpy()  # (S, C)
    if len(stacked) < count:
        raise ModelError(
            f"{count} prototypes need as many normal features; there are {len(stacked)}",
            {"prototypes": "lower"},
        )
    state = int(torch.randint(2**31, (1,), generator=generator))
    # One candidate for each seed, as first published: to compare five, as scikit-learn does, takes
    # longer than all iterations, and gains less than two random states differ by (measured: 0.07 %
    # of the inertia).
    seeds, _ = kmeans_plusplus(stacked, count, n_local_trials=1, random_state=state)
    # Threads would add their sums in the order in which they end: other bits with each fit.
    with threadpool_limits(1, user_api="openmp"):
        means = KMeans(count, init=seeds, n_init=1, max_iter=50).fit(stacked)
    return torch.from_numpy(means.cluster_centers_)
