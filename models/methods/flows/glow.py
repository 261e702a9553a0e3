"""Glow on features: the likelihood of a feature map under a normalising flow.

Source: "Glow: Generative Flow with Invertible 1x1 Convolutions" (Kingma and Dhariwal, NeurIPS
2018). The paper models images and detects nothing; that its flow is fitted to features of a frozen
backbone and scored by position is ours (DifferNet, CFlow and FastFlow are its published relatives).
`multiscale_flow` says what of the flow is the paper's. `glow_images` is Glow on images.

Features are continuous, so nothing is dequantised; each channel is centred and scaled to variance
1 on the normal images, and bits per dimension are those of scaled features. They can be below 0: a
density is no probability. A density that may grow without bound where features lie in fewer
dimensions than they have channels (a ReLU's zeros, coarse stages resized to a fine grid) is bounded
by a little Gaussian noise in training.

The log-likelihood is a sum over positions: of the latents' log-density and the log-determinants of
actnorms, convolutions and couplings, all of which are known by position. So the map has no
heuristic: its sum is the image's negative log-likelihood.

| paper | here | meaning |
| --- | --- | --- |
| x | features | scaled, (B, C, H, W) |
| L, K | levels, steps | paper: 3 to 6 and 32, for images |
| -log p(x) | map | in nats, (B, H, W) |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from configs.options import (
    FeatureOptions,
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveInt,
)
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.features.feature_norm import channel_statistics
from models.method import Method
from models.methods.flows.layers import per_channel
from models.methods.flows.multiscale_flow import (
    bits_per_dimension,
    build_flow,
    train_flow,
)
from models.training.generators import derived


@dataclass(frozen=True, kw_only=True)
class GlowOptions(FeatureOptions):
    """Glow on features: a flow of invertible convolutions and affine couplings."""

    levels: PositiveInt = 1
    """Levels of the flow; each beyond the first halves the grid, which must be even (ours: 1 takes
    any grid; paper: 3 to 6, for images)."""
    steps: PositiveInt = 8
    """Steps of each level (ours, as features have many channels; paper: 32)."""
    width: PositiveInt = 512
    """Hidden channels of the couplings' networks (paper)."""
    noise: NotNegative = 0.1
    """Deviation of the Gaussian noise that is added to scaled features in training (ours)."""
    learning_rate: Positive = 1e-3
    """Of Adamax (released code)."""
    warmup_epochs: NotNegativeInt = 10
    """Epochs over which the learning rate rises linearly (released code)."""
    batch_size: PositiveInt = 8
    """Images per step (ours)."""
    epochs: PositiveInt = 50
    """Passes over the training images (ours)."""
    image_score: Literal["likelihood", "max"] = "likelihood"
    """An image's score: its bits per dimension, or the maximum of the map (ours)."""


class Glow(Detector):
    """A flow on the joined feature map; anomalous where the likelihood is low.

    Attributes:
        mean: of each channel over the normal positions, (C,).
        std: its deviation, 1 where the channel is constant, (C,).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: FeatureShape, options: GlowOptions) -> None:
        super().__init__()
        self.options = options
        C = features.channels
        self.flow = build_flow(
            C,
            levels=options.levels,
            steps=options.steps,
            width=options.width,
            squeezes_first=False,
        )
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))
        self.eval()

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Measure the channels, then train the flow; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the grid cannot be halved as the levels ask.
        """
        options = self.options
        self.flow.initialise(generator)
        self._measure(bank)
        noise = derived(generator, self.mean.device)

        def batches() -> Iterator[Tensor]:
            for features in bank.batches(options.batch_size, generator=generator):
                scaled = self.scaled(features)
                if options.noise > 0:
                    drawn = torch.randn(scaled.shape, generator=noise, device=scaled.device)
                    scaled = scaled + options.noise * drawn
                yield scaled

        train_flow(
            self,
            self.flow,
            batches,
            options=options,
            steps=-(-len(bank) // options.batch_size),
            generator=generator,
            noise=noise,
            monitor=monitor,
        )

    def scaled(self, features: Tensor) -> Tensor:
        """Return features (B, C, H, W) with mean 0 and variance 1 on the normal images."""
        return (features - per_channel(self.mean)) / per_channel(self.std)

    def forward(self, features: Tensor) -> Tensor:
        """Return the negative log-likelihood at each position, in nats, (B, H, W)."""
        return self.flow.negative_log_likelihood(self.scaled(features))

    def score(self, features: Tensor) -> Scored:
        """Return maps (B, H, W) and, unless the maximum counts, bits per dimension (B,)."""
        maps = self(features)
        if self.options.image_score == "max":
            return maps, None
        return maps, bits_per_dimension(maps, len(self.mean))

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    @torch.no_grad()
    def _measure(self, bank: FeatureSource) -> None:
        """Set mean and deviation of each channel over all positions."""
        mean, std = channel_statistics(bank)
        if not std.any():
            raise ModelError("all normal features are the same: there is nothing to fit")
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1.0))


class _Exported(nn.Module):
    """`Glow` with an actnorm and a convolution as one, and each matrix whole."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Glow) -> None:
        super().__init__()
        self.register_buffer("mean", per_channel(detector.mean))
        self.register_buffer("std", per_channel(detector.std))
        self.flow = detector.flow.folded()
        self.has_scores = detector.options.image_score == "likelihood"

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return maps, and bits per dimension if they count, of features (B, C, H, W)."""
        maps = self.flow.negative_log_likelihood((features - self.mean) / self.std)
        if not self.has_scores:
            return maps
        return maps, bits_per_dimension(maps, features.shape[1])


METHOD = Method(
    detector=lambda: Glow,
    options=GlowOptions(),
    # Ours: at the grid of stage 1 it would cost four times as much.
    experiment={"structured": {"layers": (2, 3)}},
)
