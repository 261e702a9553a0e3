"""One Gaussian over all normal features; the score is the Mahalanobis distance.

Source: "Modeling the Distribution of Normal Data in Pre-Trained Deep Features for Anomaly
Detection" (Rippel, Mertens and Merhof, ICPR 2020), after "A Simple Unified Framework for Detecting
Out-of-Distribution Samples and Adversarial Attacks" (Lee et al., NeurIPS 2018). There one Gaussian
per stage on pooled features, here one over the joined features, pooled or at all positions.

The covariance is shrunk towards the identity, (1 - rho) S + rho mu I with mu = trace(S) / C. The
best rho in expectation (Ledoit and Wolf, 2004, "A well-conditioned estimator for large-dimensional
covariance matrices") is estimated as scikit-learn does it, for centred samples x_k:

    delta = (||S||_F^2 - trace(S)^2 / C) / C
    beta = (sum_k ||x_k x_k' - S||_F^2) / (n^2 C) = (sum_k ||x_k||^4 / n - ||S||_F^2) / (n C)
    rho = min(beta, delta) / delta

since sum_k ||x_k x_k'||_F^2 = sum_k ||x_k||^4 and sum_k <x_k x_k', S> = n ||S||_F^2. So S and the
sum of fourth powers are enough. One pass over the features gives both, and none of them is kept:
with y_k = f_k - c for a point c near the mean of the features f_k, m the mean of the y_k, and
x_k = y_k - m,

    n S = G - n m m'  with  G = sum_k y_k y_k'
    sum_k ||x_k||^4 = sum_k ||y_k||^4 + 4 m'G m - 4 m'sum_k ||y_k||^2 y_k + 2 ||m||^2 trace(G)
                      - 3 n ||m||^4
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import FeatureOptions, OptionalFraction
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.features.matmul import full_precision
from models.features.multiscale import (
    add_outer,
    add_second_moment,
    grid_size,
    mirrored,
    parts_in_cache,
    position_sums,
    project,
    squared_lengths,
)
from models.method import Method

READ = 16
"""Images read at once."""


@dataclass(frozen=True, kw_only=True)
class MahalanobisOptions(FeatureOptions):
    """One Gaussian over all normal features, its covariance shrunk."""

    shrinkage: OptionalFraction = None
    """Weight rho of the scaled identity in the covariance; none for Ledoit and Wolf's optimum,
    which Rippel et al. use."""


class Mahalanobis(Detector):
    """Mahalanobis distance under one Gaussian with a shrunk covariance.

    Attributes:
        mean: (C,).
        whitening: (C, C), inverse Cholesky factor of the covariance.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, features: FeatureShape, options: MahalanobisOptions) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("mean", torch.zeros(features.channels))
        self.register_buffer("whitening", torch.zeros(features.channels, features.channels))

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Estimate the Gaussian in float64, reading the bank once; see `Detector.fit`.

        The monitor gets the shrinkage used.

        Raises:
            ModelError: the covariance is singular.
        """
        del generator  # nothing is random
        moments = self._moments(bank)
        mean, covariance, count = moments.mean, moments.covariance, moments.count
        shrinkage = self.options.shrinkage
        if shrinkage is None:
            shrinkage = ledoit_wolf_shrinkage(covariance, moments.fourth_powers, count)
        scale = covariance.trace() / len(mean)
        shrunk = (1 - shrinkage) * covariance
        shrunk.diagonal().add_(shrinkage * scale)
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        # Of a singular matrix rounding may leave pivots that are not quite zero.
        pivots = factor.diagonal().square()
        rounding = len(mean) * torch.finfo(factor.dtype).eps * shrunk.diagonal().max()
        if failed or not (pivots > rounding).all():
            raise ModelError(
                f"the covariance of {count} normal features in {len(mean)} channels is singular "
                f"at shrinkage {shrinkage:.3g}; more normal images would help",
                {"shrinkage": "none or larger"},
            )
        identity = torch.eye(len(mean), dtype=factor.dtype, device=factor.device)
        self.mean.copy_(mean)
        self.whitening.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
        if monitor is not None:
            monitor(1, {"shrinkage": shrinkage})

    def _moments(self, bank: FeatureSource) -> "_Moments":
        """Sum what the module's docstring names, about the mean of the first images."""
        C, device = len(self.mean), self.mean.device
        origin = torch.zeros(C, dtype=torch.float64, device=device)
        cubes = torch.zeros(1, C, dtype=torch.float64, device=device)
        sums = torch.zeros(C + 1, C + 1, dtype=torch.float64, device=device)
        fourth_powers = torch.zeros((), dtype=torch.float64, device=device)
        count = 0
        for stages in bank.stage_batches(READ):
            H, W = grid_size(stages)
            if not count:
                origin = position_sums(stages) / (len(stages[0]) * H * W)
            shifted = _minus([stage.double() for stage in stages], origin)
            squares = squared_lengths(shifted)  # (B, H, W)
            add_second_moment(sums, shifted)
            add_outer(cubes, shifted, rearrange(squares, "b h w -> b h w 1"))
            fourth_powers += squares.square().sum()
            count += squares.numel()
        gram = mirrored(sums[:-1, :-1])
        mean = sums[:-1, -1] / count
        square = mean @ mean
        fourth_powers += 4 * (mean @ gram @ mean - mean @ cubes[0])
        fourth_powers += 2 * square * gram.trace() - 3 * count * square.square()
        covariance = gram / count - torch.outer(mean, mean)
        return _Moments(origin + mean, covariance, fourth_powers, count)

    def forward(self, features: Tensor) -> Tensor:
        """Return the Mahalanobis distance at each position, (B, H, W)."""
        return self.score_stages([features])[0]

    def score_stages(self, stages: Sequence[Tensor]) -> Scored:
        """Return what `score` returns, whitening each stage at its own size."""
        maps = []
        with full_precision(self.mean.device):
            for part in parts_in_cache(stages, len(self.mean)):
                # Before the product: the mean may be far larger than what differs from it.
                whitened = project(_minus(part, self.mean), self.whitening)  # (b, H, W, C)
                maps.append(torch.linalg.vector_norm(whitened, dim=3))
        return torch.cat(maps), None

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)


def _minus(stages: Sequence[Tensor], mean: Tensor) -> list[Tensor]:
    """Subtract a mean (C,) of the joined features from the stages they are joined from."""
    parts = mean.split([stage.shape[1] for stage in stages])
    return [
        stage - rearrange(part, "c -> c 1 1") for stage, part in zip(stages, parts, strict=True)
    ]


@dataclass(frozen=True)
class _Moments:
    """Mean (C,) and covariance S (C, C) of features, and the sum of ||x||^4 about the mean."""

    mean: Tensor
    covariance: Tensor
    fourth_powers: Tensor
    count: int


def ledoit_wolf_shrinkage(covariance: Tensor, fourth_powers: Tensor, count: int) -> float:
    """Estimate the best weight of the scaled identity, 0 to 1.

    Args:
        covariance: S of centred samples, (C, C), divided by their number.
        fourth_powers: sum of ||x||^4 over the samples.
        count: number of samples, n.
    """
    C = len(covariance)
    squares = covariance.square().sum()
    delta = (squares - covariance.trace().square() / C) / C
    beta = (fourth_powers / count - squares) / (count * C)
    if delta <= 0 or beta <= 0:
        return 0.0
    return float(torch.minimum(beta, delta) / delta)


class _Exported(nn.Module):
    """`Mahalanobis` without its guard against lower precisions."""

    mean: Tensor
    whitening: Tensor

    def __init__(self, detector: Mahalanobis) -> None:
        super().__init__()
        self.register_buffer("mean", detector.mean)
        self.register_buffer("whitening", detector.whitening)

    def forward(self, features: Tensor) -> Tensor:
        """Return maps (B, H, W) of features (B, C, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        whitened = F.linear(positions - self.mean, self.whitening)  # (P, C)
        distances = torch.linalg.vector_norm(whitened, dim=1)  # (P,)
        return rearrange(distances, "(b h w) -> b h w", b=B, h=H, w=W)


METHOD = Method(detector=lambda: Mahalanobis, options=MahalanobisOptions())
