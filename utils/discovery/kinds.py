"""From vectors to kinds: joining them, how many kinds there are, and which one a new vector is of.

How many kinds there are is where the silhouette is highest: the mean over all vectors of how much
nearer each is to its own kind than to the next. It sees groups, not names: of defects that people
call one kind but that look like two, it finds two.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import silhouette_score

MOST = 15
"""Kinds that are tried."""
FEWEST_EACH = 4
"""Vectors that a kind has on average where the number of kinds is estimated."""
LARGEST = 5000
"""Vectors that are joined pairwise; of more, as many are drawn, and the rest goes to the nearest
centre: the distances of all pairs would grow with the square of their number."""
STARTS = 10

Clustering = Literal["ward", "kmeans"]


@dataclass(frozen=True)
class Clusters:
    """Kinds of N vectors, the largest first.

    Attributes:
        kinds: (N,) int64, from 0.
        centres: (K, D) float32, the mean of each.
        was_estimated: whether their number was not given.
    """

    kinds: np.ndarray
    centres: np.ndarray
    was_estimated: bool = False


def cluster(
    vectors: np.ndarray, number: int | None, how: Clustering, *, random_seed: int
) -> Clusters:
    """Join vectors that lie near each other.

    Args:
        vectors: (N, D), at least one.
        number: of kinds, at most N count; None estimates it.
        how: Ward's criterion, or k-means on the vectors at unit length, so by their angles.
        random_seed: of k-means, and of the vectors drawn where there are more than `LARGEST`.
    """
    drawn = np.arange(len(vectors))
    if len(vectors) > LARGEST:
        drawn = np.sort(np.random.default_rng(random_seed).permutation(len(vectors))[:LARGEST])
    some = _directions(vectors[drawn]) if how == "kmeans" else vectors[drawn]
    if number is None:
        kinds = _most_apart(some, how, random_seed)
    else:
        kinds = _joined(some, min(number, len(some)), how, random_seed)
    order = np.argsort(-np.bincount(kinds), kind="stable")
    centres = np.stack([vectors[drawn[kinds == kind]].mean(axis=0) for kind in order])
    ranked = np.argsort(order)[kinds]
    if len(drawn) < len(vectors):
        everyone, _ = nearest(vectors, centres)
        everyone[drawn] = ranked
        ranked = everyone
    return Clusters(ranked, centres.astype(np.float32), number is None)


def nearest(vectors: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of the nearest centre, and how sure that is.

    Args:
        vectors: (N, D).
        centres: (K, D).

    Returns:
        (N,) int64, and (N,) in 0 to 1: the share by which the second nearest centre is further
        away; 0 where both are as near, 1 at a centre, or where there is one kind only.
    """
    squares = (vectors**2).sum(axis=1)[:, None] - 2 * vectors @ centres.T + (centres**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares, 0))  # (N, K)
    kinds = distances.argmin(axis=1)
    if len(centres) == 1:
        return kinds, np.ones(len(vectors))
    first, second = np.sort(distances, axis=1)[:, :2].T
    return kinds, 1 - first / np.maximum(second, np.finfo(second.dtype).tiny)


def _most_apart(vectors: np.ndarray, how: Clustering, random_seed: int) -> np.ndarray:
    """Return the kinds whose silhouette is highest; one kind where none is above 0."""
    best, highest = np.zeros(len(vectors), dtype=np.int64), 0.0
    for number in range(2, min(MOST, len(vectors) // FEWEST_EACH) + 1):
        kinds = _joined(vectors, number, how, random_seed)
        # Vectors that are all alike fall into fewer kinds than were asked for.
        if len(np.unique(kinds)) < number:
            break
        silhouette = silhouette_score(vectors, kinds)
        if silhouette > highest:
            best, highest = kinds, silhouette
    return best


def _joined(vectors: np.ndarray, number: int, how: Clustering, random_seed: int) -> np.ndarray:
    if number == 1 or len(vectors) == 1:
        return np.zeros(len(vectors), dtype=np.int64)
    if how == "ward":
        return AgglomerativeClustering(number).fit_predict(vectors)
    return KMeans(number, n_init=STARTS, random_state=random_seed).fit_predict(vectors)


def _directions(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(lengths.dtype).tiny)
