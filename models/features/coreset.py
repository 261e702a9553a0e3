"""Greedy k-centre selection (farthest point first) of features, exact but lazy.

Source: PatchCore (Roth et al., CVPR 2022), algorithm 1, and its released code
(`ApproximateGreedyCoresetSampler`): features are projected to 128 dimensions at random, distances
begin as the mean distance to 10 random features, and the feature farthest from all chosen ones is
chosen next. The projection here is Gaussian (released: uniform entries; neither changes what is
preserved: distances up to a common factor).

Written down, each choice costs a pass over all N features, which memory bandwidth bounds. But
distances only ever shrink, so one that is out of date is an upper bound, and only features whose
bound is among the largest can be next:

1. Take the features with the `pool` largest bounds, and bring those up to date: all choices they
   have not seen, in one product per block.
2. Choose among them, up to date at each step, while the farthest is at least as far as the least
   bound in the pool: all outside are nearer.

A product only sorts out pairs that cannot matter, with its rounding error allowed for; what it
leaves is computed by subtraction, the same operation as in a plain loop. So the choices are those
of the plain loop, to the bit, ties included.

Two prunings were measured on backbone features and left out. The triangle inequality still leaves
half of the pairs when 1 % is chosen and a fifth at 3 %, scattered where a product wants them
together; leading principal components leave few, but comparing took what the products saved.
"""

import math

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from models.detector import FeatureSource
from models.features.matmul import at_once, full_precision, linear
from models.features.nearest import direct_distances, rounding_share

READ = 4
"""Images read at once."""
ROWS = 1024
CENTRES = 1024
"""Sides of one product of features and choices; the first for a CPU, see `at_once`."""
PAIRS = 2**16
"""Pairs of features subtracted at once."""
POOL_SHARE = 1 / 128
POOL_RANGE = (1024, 16384)
"""Features in the pool: a larger one costs more per choice and fewer passes over the bounds."""
BURST = 32
"""Choices on a device between two questions to it: a host that asks must wait for the device."""


def draw_projection(channels: int, dim: int, generator: torch.Generator) -> Tensor | None:
    """Draw a Gaussian projection (C, dim) that keeps squared distances in expectation.

    Returns:
        None where C is not above `dim`: nothing is gained there.
    """
    if channels <= dim:
        return None
    return torch.randn(channels, dim, generator=generator) / math.sqrt(dim)


def count_positions(bank: FeatureSource) -> int:
    """Return the number of positions of all images, N*H*W."""
    _, _, H, W = next(iter(bank.batches(1))).shape
    return len(bank) * H * W


def read_projected(bank: FeatureSource, projection: Tensor | None) -> Tensor:
    """Read all positions of a bank, (N*H*W, dim) float32, projected as they are read."""
    points: Tensor | None = None
    start = 0
    for features in bank.batches(READ):
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        with full_precision(positions.device):
            if projection is not None:
                positions = linear(positions, projection.to(positions).T)  # (P, dim)
        if points is None:
            points = positions.new_empty(count_positions(bank), positions.shape[1])
        points[start : start + len(positions)] = positions
        start += len(positions)
    assert points is not None
    return points


def read_positions(bank: FeatureSource, rows: Tensor) -> Tensor:
    """Read some positions of a bank, (R, C) float32, in the order of `rows`.

    Args:
        bank: features (N, C, H, W).
        rows: positions counted through images, then H, then W; (R,), int64.
    """
    ordered, order = rows.cpu().sort()
    chosen: Tensor | None = None
    start = 0
    for features in bank.batches(READ):
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        if chosen is None:
            chosen = positions.new_empty(len(rows), positions.shape[1])
        stop = start + len(positions)
        low, high = torch.searchsorted(ordered, torch.tensor([start, stop])).tolist()
        here = (ordered[low:high] - start).to(positions.device)
        chosen[order[low:high].to(positions.device)] = positions[here]
        start = stop
    assert chosen is not None
    return chosen


def greedy_k_centre(
    points: Tensor, count: int, *, generator: torch.Generator, num_starts: int = 10
) -> Tensor:
    """Choose points, each the farthest from those chosen before.

    Args:
        points: (N, C) float32. Beside them memory holds 8 bytes for each and a copy of the choices.
        count: how many to choose, 1 to N.
        generator: of the CPU; it draws the starts.
        num_starts: random points whose mean distance stands for the distance to the choices before
            there are any (released code: 10). They are not choices themselves.

    Returns:
        Indices of the choices in order, (count,) int64, so that any beginning of them is a smaller
        coreset; fewer where there are fewer different points than `count`.

    Raises:
        FloatingPointError: a point is not finite, or so large that its distances are not.
    """
    starts = torch.randperm(len(points), generator=generator)[:num_starts].to(points.device)
    with full_precision(points.device):
        return _LazyGreedy(points, count, points[starts]).choose()


class _LazyGreedy:
    """The bounds of all points and the choices so far."""

    def __init__(self, points: Tensor, count: int, starts: Tensor) -> None:
        device = points.device
        self.points = points
        self.bounds = direct_distances(points, starts).mean(dim=1)  # (N,)
        if not torch.isfinite(self.bounds).all():
            raise FloatingPointError("a distance between normal features is not finite")
        self.seen = torch.zeros(len(points), dtype=torch.int32, device=device)
        self.chosen = torch.zeros(count, dtype=torch.int64, device=device)
        self.taken = 0
        self.burst = 1 if device.type == "cpu" else BURST
        least, most = POOL_RANGE
        self.pool = min(max(int(len(points) * POOL_SHARE), least), most, len(points))
        # Products see points and choices shifted by the mean: smaller norms, smaller errors.
        self.shift = points.mean(dim=0)
        self.share = rounding_share(points.shape[1], points.dtype)
        self.centres = points.new_empty(count, points.shape[1])
        self.centre_norms = points.new_empty(count)

    def choose(self) -> Tensor:
        """Return the choices, at least one."""
        count = len(self.chosen)
        with tqdm(total=count, desc="coreset", leave=False, disable=None) as bar:
            while self.taken < count:
                largest = self.bounds.topk(self.pool, sorted=False).values
                if largest.max() == 0:  # every point equals a choice
                    break
                threshold = largest.min()
                rows = (self.bounds >= threshold).nonzero()[:, 0]
                self.update(rows)
                self.take_from(rows, threshold)
                bar.update(self.taken - bar.n)
        return self.chosen[: max(1, self.taken)]

    def update(self, rows: Tensor) -> None:
        """Bring the bounds of points (R,) up to date with all choices."""
        behind = rows[self.seen[rows] < self.taken]
        if not len(behind):
            return
        # Neighbours in this order have missed about the same choices: few are computed twice.
        behind = behind[self.seen[behind].argsort()]
        rows_at_once = at_once(ROWS, rows.device)
        firsts = self.seen[behind[::rows_at_once]].tolist()
        for block, first in zip(behind.split(rows_at_once), firsts, strict=True):
            self.lower(block, first)
        self.seen[behind] = self.taken

    def lower(self, rows: Tensor, first: int) -> None:
        """Lower the bounds of points (R,) to their distances to the choices from `first` on."""
        block = self.points[rows] - self.shift  # (R, C)
        bounds = self.bounds[rows]
        norms, doubled = block.square().sum(dim=1), -2 * block
        for start in range(first, self.taken, CENTRES):
            stop = min(start + CENTRES, self.taken)
            centre_norms = self.centre_norms[start:stop]
            # Squared distances less their possible error, without the point's norm.
            centres = self.centres[start:stop]
            squares = linear(doubled, centres, (1 - self.share) * centre_norms)  # (R, K)
            limits = bounds.square() - (1 - self.share) * norms  # (R,)
            slack = 2 * self.share * (norms + centre_norms.max())
            limits = torch.minimum(limits, squares.amin(dim=1) + slack)
            point, centre = (squares <= limits.unsqueeze(1)).nonzero(as_tuple=True)
            for p, c in zip(point.split(PAIRS), centre.split(PAIRS), strict=True):
                left = self.points[rows[p]].unsqueeze(1)  # (pairs, 1, C)
                right = self.points[self.chosen[start + c]].unsqueeze(1)  # (pairs, 1, C)
                distances = direct_distances(left, right).flatten()  # (pairs,)
                bounds.scatter_reduce_(0, p, distances, reduce="amin")
        self.bounds[rows] = bounds

    def take_from(self, rows: Tensor, threshold: Tensor) -> None:
        """Choose among points (R,), all up to date, while the farthest reaches the threshold."""
        points, bounds = self.points[rows], self.bounds[rows]
        before = self.taken
        live = torch.ones(1, dtype=torch.bool, device=rows.device)
        while self.taken < len(self.chosen) and live:
            last = min(self.taken + self.burst, len(self.chosen))
            made = torch.zeros(1, dtype=torch.int64, device=rows.device)
            for step in range(self.taken, last):
                # Of equal distances the first, as `max` says; `rows` ascend.
                farthest, where = bounds.max(dim=0, keepdim=True)  # (1,)
                live = live & (farthest >= threshold) & (farthest > 0)
                made += live
                self.chosen[step : step + 1] = rows.index_select(0, where)
                distances = direct_distances(points, points.index_select(0, where))  # (R, 1)
                nearer = torch.minimum(bounds, distances.squeeze(1))
                bounds = torch.where(live, nearer, bounds)
            self.taken += int(made)
        self.bounds[rows] = bounds
        self.seen[rows] = self.taken
        centres = self.points[self.chosen[before : self.taken]] - self.shift  # (K, C)
        self.centres[before : self.taken] = centres
        self.centre_norms[before : self.taken] = centres.square().sum(dim=1)
