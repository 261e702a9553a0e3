"""Gaussians with shrunk covariances: one for all vectors, or one for each position of a grid."""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from models.detector import SizedByFit
from models.errors import ModelError
from models.methods.mahalanobis import ledoit_wolf_shrinkage


class Gaussians(SizedByFit):
    """Mahalanobis distances under P Gaussians, each covariance shrunk as Ledoit and Wolf do it.

    Args:
        dims: D, of the vectors.

    Attributes:
        mean: (P, D).
        whitening: (P, D, D), inverse Cholesky factors of the covariances.
    """

    sized_by_fit = ("mean", "whitening")

    mean: Tensor
    whitening: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(0, dims))
        self.register_buffer("whitening", torch.zeros(0, dims, dims))

    def fit(self, batches: Iterable[Tensor], *, per_position: bool) -> None:
        """Estimate the Gaussians in one pass; the sums are those of `mahalanobis`.

        One Gaussian is summed up in float64. Those of many positions, which fill gigabytes, are in
        float32, about the first batch's means.

        Args:
            batches: vectors (B, N, D) of images and positions.
            per_position: N Gaussians, and not one.

        Raises:
            ModelError: a covariance is singular.
        """
        sums: _Sums | None = None
        for vectors in batches:
            samples = _samples(vectors, per_position=per_position)  # (P, n, D)
            sums = _Sums(samples) if sums is None else sums
            sums.add(samples)
        assert sums is not None
        self.resize("mean", len(sums.origin))
        self.resize("whitening", len(sums.origin))
        for position in range(len(sums.origin)):
            mean, covariance, fourth_powers = sums.moments(position)
            self.mean[position] = mean
            self.whitening[position] = _inverse_factor(covariance, fourth_powers, sums.count)

    def distances(self, vectors: Tensor) -> Tensor:
        """Return the Mahalanobis distance (B, N) of each of the vectors (B, N, D).

        Raises:
            ModelError: there are Gaussians for another number of positions.
        """
        return torch.linalg.vector_norm(self._whitened(vectors), dim=2)

    def slopes(self, vectors: Tensor) -> Tensor:
        """Return the gradient of half the squared distance in each of the vectors (B, N, D)."""
        whitened = self._whitened(vectors)  # (B, N, D)
        slopes = rearrange(whitened, "b n d -> n b d") @ self.whitening  # (N, B, D)
        return rearrange(slopes, "n b d -> b n d")

    def _whitened(self, vectors: Tensor) -> Tensor:
        count, N = len(self.mean), int(vectors.shape[1])  # a traced shape is no integer
        if count not in {1, N}:
            raise ModelError(
                f"there are Gaussians for {count} positions, and {N} are to be scored: fit and "
                "score at the same image size"
            )
        centred = rearrange(vectors - self.mean, "b n d -> n b d")
        if count == 1:
            centred = rearrange(centred, "n b d -> 1 (n b) d")
        whitened = centred @ self.whitening.mT  # (P, n, D)
        return rearrange(whitened, "p (n b) d -> b (p n) d", n=N // count)


class _Sums:
    """What the mean, the covariance and the fourth powers of P sets of samples follow from.

    Args:
        samples: the first of them, (P, n, D), of which only the means count here.
    """

    def __init__(self, samples: Tensor) -> None:
        P, _, D = samples.shape
        self.count = 0
        self.origin = samples.to(torch.float64 if P == 1 else torch.float32).mean(dim=1)  # (P, D)
        self.first = self.origin.new_zeros(P, D)
        self.gram = self.origin.new_zeros(P, D, D)
        self.cubes = self.origin.new_zeros(P, D)
        self.fourths = self.origin.new_zeros(P)

    def add(self, samples: Tensor) -> None:
        """Add samples (P, n, D)."""
        shifted = samples.to(self.gram.dtype) - self.origin.unsqueeze(1)
        squares = shifted.square().sum(dim=2, keepdim=True)  # (P, n, 1)
        self.count += samples.shape[1]
        self.first += shifted.sum(dim=1)
        self.gram.baddbmm_(shifted.mT, shifted)
        self.cubes += (squares * shifted).sum(dim=1)
        self.fourths += squares.square().sum(dim=(1, 2))

    def moments(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (D,), covariance (D, D), and the sum of ||x||^4 about the mean, float64."""
        n = self.count
        origin, first, gram, cubes, fourths = (
            part[position].double()
            for part in (self.origin, self.first, self.gram, self.cubes, self.fourths)
        )
        mean = first / n
        square = mean @ mean
        fourths = fourths + 4 * (mean @ gram @ mean - mean @ cubes)
        fourths = fourths + 2 * square * gram.trace() - 3 * n * square.square()
        return origin + mean, gram / n - torch.outer(mean, mean), fourths


def _samples(vectors: Tensor, *, per_position: bool) -> Tensor:
    """Return vectors (B, N, D) by Gaussian, (P, n, D)."""
    return rearrange(vectors, "b n d -> n b d" if per_position else "b n d -> 1 (b n) d")


def _inverse_factor(covariance: Tensor, fourth_powers: Tensor, count: int) -> Tensor:
    """Return the inverse Cholesky factor of a covariance (D, D), shrunk.

    Raises:
        ModelError: it is singular.
    """
    D = len(covariance)
    shrinkage = ledoit_wolf_shrinkage(covariance, fourth_powers, count)
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * covariance.trace() / D)
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    # Of a singular matrix rounding may leave pivots that are not quite zero.
    rounding = D * torch.finfo(factor.dtype).eps * shrunk.diagonal().max()
    if failed or not (factor.diagonal().square() > rounding).all():
        raise ModelError(
            f"CutPaste's density of {count} representations in {D} dimensions is singular: it "
            "needs more training images, or images that are not all alike"
        )
    identity = torch.eye(D, dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False)
