"""PaDiM: one Gaussian at each position, over a random subset of the channels.

Source: "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization"
(Defard et al., ICPR 2020): covariance divided by N - 1, plus 0.01 I (eq. 1); the score is the
Mahalanobis distance (eq. 2); 100 channels of ResNet18's 448, 550 of WideResNet50's 1792.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from models.detector import Detector, FeatureSource, Monitor
from models.errors import ModelError
from models.features.matmul import full_precision

READ = 16
"""Images read at once: each batch touches all covariances, so the more the better."""
CHUNK = 2**22
"""Entries of the covariances that are factorised at once, in float64."""


class Padim(Detector):
    """Mahalanobis distance under each position's own Gaussian.

    The head has H*W*D^2 numbers; a fit needs little more memory than that. It scores grids of the
    size it was fitted on.

    Args:
        channels: channels of the features.
        dims: channels drawn at random, D; None for all. With fewer channels than that it is all of
            them, and a remark says so.
        regularization: epsilon, added to the diagonal of each covariance.

    Attributes:
        kept: channels drawn, ascending, (D,) int64.
        mean: (H*W, D).
        whitening: (H*W, D, D), inverse Cholesky factors of the covariances.
        remarks: that there are fewer channels than `dims`.
    """

    kept: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(
        self, channels: int, *, dims: int | None = 550, regularization: float = 0.01
    ) -> None:
        super().__init__()
        if dims is not None and dims < 1:
            raise ModelError(f"dims {dims} must be at least 1, or none for all channels")
        if not regularization > 0:
            raise ModelError(f"regularization {regularization} must be above 0")
        self.channels = channels
        self.regularization = regularization
        D = channels if dims is None else min(dims, channels)
        self.remarks: list[str] = []
        if dims is not None and dims > channels:
            self.remarks.append(
                f"all {channels} channels are used: there are fewer than --method.dims {dims}"
            )
        self.register_buffer("kept", torch.arange(D))
        self.register_buffer("mean", torch.zeros(0, D))
        self.register_buffer("whitening", torch.zeros(0, D, D))

    def fit(
        self,
        bank: FeatureSource,
        *,
        generator: torch.Generator,
        monitor: Monitor | None = None,
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
        for chunk in self.whitening.split(max(1, CHUNK // D**2)):
            self._invert(chunk, len(bank))
        if monitor is not None:
            monitor(1, {})

    def _invert(self, sums: Tensor, count: int) -> None:
        """Turn sums of squares (P, D, D) into the inverse Cholesky factors, in place."""
        covariances = sums.double() / (count - 1)
        covariances.diagonal(dim1=1, dim2=2).add_(self.regularization)
        factors = torch.linalg.cholesky(covariances)
        identity = torch.eye(sums.shape[1], dtype=factors.dtype, device=factors.device)
        sums.copy_(torch.linalg.solve_triangular(factors, identity, upper=False))

    def stopped_at(self, step: int) -> dict[str, Any]:
        """There is one step; see `Detector.stopped_at`."""
        del step
        return {}

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

    def _positions(self, features: Tensor) -> Tensor:
        """Return the drawn channels by position, (H*W, B, D), of features (B, C, H, W)."""
        # As a view, with a position's images far apart, the products take four times as long.
        return rearrange(features[:, self.kept], "b d h w -> (h w) b d").contiguous()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take the stored number of positions, then the values."""
        if (stored := state_dict.get(f"{prefix}mean")) is not None:
            P, D = len(stored), self.mean.shape[1]
            self.mean = self.mean.new_empty(P, D)
            self.whitening = self.whitening.new_empty(P, D, D)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
