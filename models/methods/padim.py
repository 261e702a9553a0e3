"""PaDiM: one Gaussian at each position, over a random subset of the channels.

Source: "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization"
(Defard et al., ICPR 2020): covariance divided by N - 1, plus 0.01 I (eq. 1); the score is the
Mahalanobis distance (eq. 2); 100 channels of ResNet18's 448, 550 of WideResNet50's 1792.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from configs.options import FeatureOptions, OptionalInt, Positive
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.features.matmul import at_once, full_precision
from models.method import Method

READ = 16
"""Images read at once: each batch touches all covariances, so the more the better."""
CHUNK = 2**22
"""Entries of the covariances that are factorised at once, in float64; more on a GPU."""


@dataclass(frozen=True, kw_only=True)
class PadimOptions(FeatureOptions):
    """PaDiM: one Gaussian per position over a random subset of the channels."""

    dims: OptionalInt = 550
    """Channels drawn at random (paper: 100 of ResNet18's, 550 of WideResNet50's); none, or more
    than there are, for all."""
    regularization: Positive = 0.01
    """Added to the diagonal of each covariance (paper: 0.01)."""


class Padim(Detector):
    """Mahalanobis distance under each position's own Gaussian.

    The head has H*W*D^2 numbers; a fit needs little more memory than that. It scores grids of the
    size it was fitted on.

    Attributes:
        kept: channels drawn, ascending, (D,) int64.
        mean: (H*W, D).
        whitening: (H*W, D, D), inverse Cholesky factors of the covariances.
        remarks: that there are fewer channels than `dims`.
    """

    sized_by_fit = ("mean", "whitening")

    kept: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, features: FeatureShape, options: PadimOptions) -> None:
        super().__init__()
        self.options = options
        channels, dims = features.channels, options.dims
        self.channels = channels
        D = channels if dims is None else min(dims, channels)
        if dims is not None and dims > channels:
            self.remarks.append(
                f"all {channels} channels are used: there are fewer than --method.dims {dims}"
            )
        self.register_buffer("kept", torch.arange(D))
        self.register_buffer("mean", torch.zeros(0, D))
        self.register_buffer("whitening", torch.zeros(0, D, D))

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Draw the channels and estimate the Gaussians, reading the bank twice; see `Detector.fit`.

        Raises:
            ModelError: there are fewer than two images.
        """
        if len(bank) < 2:
            raise ModelError(f"PaDiM needs at least 2 normal images for a covariance: {len(bank)}")
        drawn = torch.randperm(self.channels, generator=generator)[: len(self.kept)]
        self.kept.copy_(drawn.sort().values)
        total: Tensor | None = None
        for features in bank.batches(READ):
            sums = self._positions(features).double().sum(dim=1)  # (H*W, D)
            total = sums if total is None else total + sums
        assert total is not None
        self.mean = (total / len(bank)).to(self.mean)
        P, D = self.mean.shape
        self.whitening = self.whitening.new_zeros(P, D, D)  # the sums, then each factor's inverse
        with full_precision(self.mean.device):
            for features in bank.batches(READ):
                centred = self._positions(features).sub_(self.mean.unsqueeze(1))  # (H*W, B, D)
                self.whitening.baddbmm_(centred.mT, centred)
        chunk_size = max(1, at_once(CHUNK, self.whitening.device) // D**2)
        for chunk in self.whitening.split(chunk_size):
            self._invert(chunk, len(bank))
        if monitor is not None:
            monitor(1, {})

    def _invert(self, sums: Tensor, count: int) -> None:
        """Turn sums of squares (P, D, D) into the inverse Cholesky factors, in place."""
        covariances = sums.double() / (count - 1)
        covariances.diagonal(dim1=1, dim2=2).add_(self.options.regularization)
        factors = torch.linalg.cholesky(covariances)
        identity = torch.eye(sums.shape[1], dtype=factors.dtype, device=factors.device)
        sums.copy_(torch.linalg.solve_triangular(factors, identity, upper=False))

    def forward(self, features: Tensor) -> Tensor:
        """Return the Mahalanobis distance at each position, (B, H, W).

        Raises:
            ModelError: the grid is not the one the detector was fitted on.
        """
        _, _, H, W = features.shape
        if len(self.mean) != H * W:
            raise ModelError(
                f"this PaDiM has Gaussians for {len(self.mean)} positions, the features have "
                f"{H} x {W}: fit and score at the same image size"
            )
        with full_precision(features.device):
            centred = self._positions(features).sub_(self.mean.unsqueeze(1))  # (H*W, B, D)
            whitened = centred @ self.whitening.mT  # (H*W, B, D)
        distances = torch.linalg.vector_norm(whitened, dim=2)  # (H*W, B)
        return rearrange(distances, "(h w) b -> b h w", h=H, w=W)

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def _positions(self, features: Tensor) -> Tensor:
        """Return the drawn channels by position, (H*W, B, D), of features (B, C, H, W)."""
        # As a view, with a position's images far apart, the products take four times as long.
        return rearrange(features[:, self.kept], "b d h w -> (h w) b d").contiguous()


class _Exported(nn.Module):
    """`Padim`, with its factors on the left so that no copy of them is transposed."""

    kept: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, detector: Padim) -> None:
        super().__init__()
        self.register_buffer("kept", detector.kept)
        self.register_buffer("mean", detector.mean.unsqueeze(2))  # (H*W, D, 1)
        self.register_buffer("whitening", detector.whitening)

    def forward(self, features: Tensor) -> Tensor:
        """Return maps (B, H, W) of features (B, C, H, W)."""
        _, _, H, W = features.shape
        drawn = features.index_select(1, self.kept)  # (B, D, H, W)
        centred = rearrange(drawn, "b d h w -> (h w) d b") - self.mean  # (H*W, D, B)
        distances = torch.linalg.vector_norm(self.whitening @ centred, dim=1)  # (H*W, B)
        return rearrange(distances, "(h w) b -> b h w", h=H, w=W)


METHOD = Method(
    detector=lambda: Padim,
    options=PadimOptions(),
    published_as="PaDiM",
    experiment={"structured": {"patch_size": 1}},  # paper: the stages' maps as they are
)
