"""What every detector is: a small head that is fitted on stored features and returns maps."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

Monitor = Callable[[int, dict[str, float]], None]
"""Called with (step, values to log) after each epoch or candidate; it decides what is kept."""


class FeatureSource(Protocol):
    """Normal training features, as a detector sees them."""

    channels: int

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yield features (B, C, H, W), float32; shuffled when a generator is given."""
        ...


class Detector(nn.Module):
    """A head on frozen features.

    `forward` maps features (B, C, H, W) to anomaly maps (B, H, W), higher = more anomalous, on any
    grid, 1 x 1 included. `state_dict` holds the head and nothing of the backbone.
    """

    def fit(
        self,
        bank: FeatureSource,
        *,
        generator: torch.Generator,
        monitor: Monitor | None = None,
    ) -> None:
        """Fit the head on normal features; every random number comes from `generator`.

        Raises:
            FloatingPointError: the loss left the finite numbers; the message names epoch and step.
        """
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Return anomaly maps (B, H, W) of features (B, C, H, W)."""
        raise NotImplementedError

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters of the head."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
