"""Normal features of one stage as many small clouds: centres, second moments, likelihoods.

A feature f is compared with its nearest centres c_k. The energy at a centre is

    e_k(f) = ||A_k (f - c_k)||^2 + level_k,        C_k = (S_k + nu P) / (n_k + nu).

| symbol | here | meaning |
| --- | --- | --- |
| S_k, n_k | `sums`, `counts` | sum of (f - c_k)(f - c_k)' over the n_k features nearest to c_k |
| P | parent | moment of a group of centres, shrunk to the pool of all; or that pool itself |
| nu | `shrinkage` | features that the parent's moment stands for |
| rho | `ridge` | lambda = rho times the mean variance of a channel about its centre |
| A_k | `filters` | the filter of C_k |
| level_k | `levels` | log det(C_k + lambda), less its smallest over k |

Two filters of one family suppress the directions that normal features fill:

    ridge   (C_k + lambda)^(-1/2)                    squared gain on variance v: 1 / (v + lambda)
    flow    exp(-C_k / (2 lambda)) / lambda^(1/2)    squared gain:         exp(-v / lambda) / lambda

The flow is NoCo's training, stopped early (see `noco_exact`); stopped at t / trace = 1 / (2 lambda)
it agrees with the ridge to first order in v, the known near-equivalence of early stopping and
ridge. With the ridge and the level, e_k is twice a Gaussian's negative log-likelihood, up to a
constant: without the level a flat background, where little varies, would compete with busy regions.

A feature's energy is the smallest over its n nearest centres. So that it does not jump where the
n-th and the next centre change places, a centre counts less the nearer it is to being left out:
`EDGE` D (1 / w - 1) is added to its energy, with w = (d_{n+1} - d_k) / (d_{n+1} - d_1) of squared
distances d, which falls from 1 at the nearest centre to 0 at the first that is not compared with.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from models.detector import SizedByFit
from models.features.kmeans import apart, lloyd
from models.features.matmul import at_once, full_precision, linear

ENTRIES = 1 << 24
"""Entries of a stage's filters at most: 64 MiB."""
SMALLEST, LARGEST = 16, 256
"""Features of one centre that share a product: powers of two in this range."""
TOGETHER = 2048
"""Features whose products a processor adds in float32, all others in float64."""
PARENT_WEIGHT = 500.0
"""Features that the pool stands for in a parent's moment."""
SAME = 0.03
"""Squared distance at which two centres are one, as a share of that of a feature to its centre."""
EDGE = 0.1
"""Energy per channel that a centre loses half of the way out to."""
DISTANCES = 1 << 21
"""Distances to centres that are made at once: few enough for a processor's cache."""
AT_ONCE = 1 << 24
"""Entries of the products made at once."""


@dataclass(frozen=True)
class Shape:
    """How clouds become filters.

    Attributes:
        filter: of the two above.
        ridge: rho.
        shrinkage: nu.
        parents: groups of centres; 0 or 1 for the pool alone.
        has_levels: whether the levels count.
        nearest: centres that each feature is compared with.
    """

    filter: Literal["ridge", "flow"]
    ridge: float
    shrinkage: float
    parents: int
    has_levels: bool
    nearest: int


class Mixture(SizedByFit):
    """Centres of one stage's normal features, each with the filter of its second moment.

    Attributes:
        centres: (K, D) float32.
        filters: (K, D, D) float32.
        levels: (K,) float32, at least 0.
        ridge: lambda, a scalar, for whoever wants to know what the filters were made with.
    """

    sized_by_fit = ("centres", "filters", "levels")

    centres: Tensor
    filters: Tensor
    levels: Tensor
    ridge: Tensor

    def __init__(self, channels: int, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.channels = channels
        self.register_buffer("centres", torch.zeros(0, channels))
        self.register_buffer("filters", torch.zeros(0, channels, channels))
        self.register_buffer("levels", torch.zeros(0))
        self.register_buffer("ridge", torch.zeros(()))
        # Working memory of the fit, not part of the head.
        self.sums = torch.zeros(0)
        self.counts = torch.zeros(0)
        self.groups = torch.zeros(0)

    def start(self, sample: Tensor, count: int, generator: torch.Generator) -> None:
        """Find centres by k-means and forget the sums.

        Args:
            sample: (S, D) normal features.
            count: centres K; of those that all but coincide one is kept.
            generator: draws the seeds of k-means.
        """
        device = self.centres.device
        centres = apart(lloyd(sample, count, generator=generator), sample, SAME)
        K, D = centres.shape
        groups = torch.zeros(K, dtype=torch.long)
        if 1 < self.shape.parents < K:
            coarse = lloyd(centres, self.shape.parents, generator=generator)
            groups = torch.cdist(centres, coarse).argmin(dim=1)  # (K,)
        self.groups = groups.to(device)
        self.centres = centres.to(device)
        self.filters = torch.zeros(K, D, D, device=device)
        self.levels = torch.zeros(K, device=device)
        self.sums = torch.zeros(K, D, D, dtype=torch.float64, device=device)
        self.counts = torch.zeros(K, dtype=torch.float64, device=device)

    def add(self, positions: Tensor) -> None:
        """Add normal features (P, D) to the sums of their nearest centres.

        float32 products of at most `TOGETHER` features are summed in float64: adding features one
        by one or all at once gives the same sums up to about 1e-7 of the trace.
        """
        owner = self._nearest(positions, 1)[0][0]  # (P,)
        rows, of_block, _ = blocks(owner, len(self.centres))  # (T, R), (T,)
        for part, centre in self._in_parts(rows, of_block):
            offsets = self._offsets(positions, part, centre)  # (T, R, D)
            offsets *= rearrange(part < len(positions), "t r -> t r 1")
            with full_precision(positions.device):
                self._add_products(offsets, centre)
        self.counts += _sizes(owner, len(self.centres))

    def solve(self) -> None:
        """Set filters and levels from the sums."""
        shape, D = self.shape, self.channels
        counts = rearrange(self.counts, "k -> k 1 1")
        pool = self.sums.sum(dim=0) / counts.sum()  # (D, D)
        parents = pool
        if bool(self.groups.any()):
            grouped = torch.zeros(int(self.groups.max()) + 1, D, D).to(self.sums)
            sizes = torch.zeros(len(grouped)).to(self.counts)
            grouped.index_add_(0, self.groups, self.sums)
            sizes = rearrange(sizes.index_add_(0, self.groups, self.counts), "g -> g 1 1")
            shrunk = (grouped + PARENT_WEIGHT * pool) / (sizes + PARENT_WEIGHT)
            parents = shrunk[self.groups]  # (K, D, D)
        # A centre without features, where nothing shrinks, has the pool's moment.
        weight = torch.where(counts > 0, shape.shrinkage, max(shape.shrinkage, 1.0))
        moments = (self.sums + weight * parents) / (counts + weight)  # (K, D, D)
        # Features that are all equal have no scale of their own; rounding of theirs is one.
        rounding = torch.finfo(torch.float32).eps * self.centres.square().mean().double()
        ridge = shape.ridge * pool.diagonal().mean() + rounding + 1e-30
        self.ridge.copy_(ridge)
        loaded = moments.clone()
        loaded.diagonal(dim1=1, dim2=2).add_(ridge)
        factors = torch.linalg.cholesky(loaded)  # (K, D, D)
        if shape.filter == "ridge":
            identity = torch.eye(D, dtype=factors.dtype, device=factors.device)
            filters = torch.linalg.solve_triangular(factors, identity, upper=False)
        else:
            values, vectors = torch.linalg.eigh(moments)
            gains = torch.exp(-values.clamp_min(0) / (2 * ridge)) / ridge.sqrt()
            filters = rearrange(gains, "k d -> k d 1") * vectors.mT
        self.filters.copy_(filters)
        if shape.has_levels:
            levels = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)  # (K,)
            self.levels.copy_(levels - levels.min())

    def forward(self, positions: Tensor) -> Tensor:
        """Return the smallest energies over the nearest centres, (P,), of features (P, D)."""
        P, K = len(positions), len(self.centres)
        count = min(self.shape.nearest, K)
        near, distances = self._nearest(positions, min(count + 1, K))  # (n, P) or one more
        owner = rearrange(near[:count], "n p -> (n p)")
        rows, of_block, slots = blocks(owner, K)  # (T, R), (T,), (n*P,)
        energies = []
        for part, centre in self._in_parts(rows, of_block):
            offsets = self._offsets(positions, part % P, centre)  # (T, R, D)
            with full_precision(positions.device):
                filtered = self._filtered(offsets, centre)  # (T, R, D)
            lengths = torch.linalg.vector_norm(filtered, dim=2)  # (T, R)
            energies.append(lengths.square_() + rearrange(self.levels[centre], "t -> t 1"))
        found = torch.cat(energies).flatten().index_select(0, slots)  # (n*P,)
        found = rearrange(found, "(n p) -> n p", n=count)
        return (found + self.channels * edge(distances, count)).amin(dim=0)  # (P,)

    def _nearest(self, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Find the centres nearest to features (P, D).

        Returns:
            Centres, (count, P), the nearest first, and their squared distances, less a constant of
            each feature.
        """
        lengths = self.centres.square().sum(dim=1)  # (K,)
        parts, lengths_of = [], []
        room = at_once(DISTANCES, positions.device)
        for part in positions.split(max(1, room // len(self.centres))):
            with full_precision(positions.device):
                # Less the features' own lengths, which order nothing.
                distances = linear(part, -2 * self.centres, lengths)  # (P, K)
            every = torch.arange(len(part), device=part.device)
            found = [distances.min(dim=1)]
            while len(found) < count:  # a few minima take less time than `topk`
                distances[every, found[-1].indices] = torch.inf
                found.append(distances.min(dim=1))
            parts.append(torch.stack([one.indices for one in found]))
            lengths_of.append(torch.stack([one.values for one in found]))
        return torch.cat(parts, dim=1), torch.cat(lengths_of, dim=1)  # (count, P)

    def _offsets(self, positions: Tensor, rows: Tensor, centre: Tensor) -> Tensor:
        """Return features less their block's centre, (T, R, D)."""
        rows = rows.clamp_max(len(positions) - 1)
        chosen = positions.index_select(0, rows.flatten()).unflatten(0, rows.shape)  # (T, R, D)
        return chosen.sub_(rearrange(self.centres[centre], "t d -> t 1 d"))

    def _in_parts(self, rows: Tensor, of_block: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split blocks so that what is made of a part stays small."""
        D = self.channels
        size = max(1, AT_ONCE // (D * max(D, rows.shape[1])))
        return list(zip(rows.split(size), of_block.split(size), strict=True))

    def _add_products(self, offsets: Tensor, centre: Tensor) -> None:
        """Add the products of each block (T, R, D) with itself to its centre's sum."""
        if _is_batched(offsets):
            self.sums.index_add_(0, centre, torch.bmm(offsets.mT, offsets).double())
            return
        for k, rows in _by_centre(offsets, centre):
            for part in rows.split(TOGETHER):
                self.sums[k] += part.T @ part

    def _filtered(self, offsets: Tensor, centre: Tensor) -> Tensor:
        """Return each block (T, R, D) behind its centre's filter."""
        if _is_batched(offsets):
            return torch.bmm(offsets, self.filters[centre].mT)
        filtered = [rows @ self.filters[k].T for k, rows in _by_centre(offsets, centre)]
        return torch.cat(filtered).view_as(offsets)


def _is_batched(offsets: Tensor) -> bool:
    """Tell whether one product of all blocks (T, R, D) is faster than one for each centre.

    A processor takes longer to copy a filter for each block than to apply it, where blocks are
    much smaller than filters. Any other device would wait for small products.
    """
    return offsets.device.type != "cpu" or 2 * offsets.shape[1] >= offsets.shape[2]


def _by_centre(offsets: Tensor, centre: Tensor) -> list[tuple[int, Tensor]]:
    """Return centres and their features (M, D), of blocks (T, R, D) in the order of centres."""
    found, counts = centre.unique_consecutive(return_counts=True)
    parts = offsets.flatten(0, 1).split((counts * offsets.shape[1]).tolist())
    return list(zip(found.tolist(), parts, strict=True))


def blocks(owner: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort features by their centres into blocks of one centre each, all of one size.

    So that one batched product serves all centres, and none waits for a size to be known: the
    number of blocks is bounded by those of M features and one more for each centre.

    Args:
        owner: (M,) int64, each in [0, count).
        count: of centres.

    Returns:
        Features of each block, (T, R) int64, filled up with M; each block's centre, (T,); and each
        feature's place among the T*R, (M,).
    """
    M = len(owner)
    size = 1 << round(math.log2(max(1.0, M / count)))
    size = min(LARGEST, max(SMALLEST, size))
    order = owner.argsort(stable=True)
    sizes = _sizes(owner, count)  # (K,)
    needed = (sizes + size - 1) // size
    last = needed.cumsum(0)
    T = int(last[-1]) if owner.device.type == "cpu" else M // size + count
    sorted_owner = owner[order]
    within = torch.arange(M, device=owner.device) - (sizes.cumsum(0) - sizes)[sorted_owner]
    places = (last - needed)[sorted_owner] * size + within  # (M,)
    rows = torch.full((T * size,), M, device=owner.device)
    rows[places] = order
    slots = torch.empty_like(order)
    slots[order] = places
    of_block = torch.searchsorted(last, torch.arange(T, device=owner.device), right=True)
    return rearrange(rows, "(t r) -> t r", r=size), of_block.clamp_max(count - 1), slots


def _sizes(owner: Tensor, count: int) -> Tensor:
    """Return how many features each centre has, (K,); `bincount` would wait for a GPU."""
    return owner.new_zeros(count).index_add_(0, owner, torch.ones_like(owner))


def edge(distances: Tensor, count: int) -> Tensor:
    """Return what is added to the energies per channel of centres that are nearly left out.

    Args:
        distances: (n, P) squared distances of each feature to its nearest centres, ascending, and
            to the first that is not compared with, where there is one: n is count or one more.
        count: centres that each feature is compared with.

    Returns:
        (count, P), at least 0; all 0 where no centre is left out.
    """
    first, last = distances[:1], distances[-1:]
    if len(distances) == count or count == 1:
        return torch.zeros_like(distances[:count])
    span = (last - first).clamp_min(torch.finfo(distances.dtype).tiny)
    left = ((last - distances[:count]) / span).clamp(1e-6, 1.0)
    return EDGE * (1 / left - 1)


def most_centres(asked: int, positions: int, channels: int) -> int:
    """Return how many centres a stage gets: at most `asked`, and fewer where data are few.

    A second moment wants a feature for each channel, and the head stays below `ENTRIES`.
    """
    return max(1, min(asked, positions // channels, ENTRIES // channels**2))
