"""What every detector is: a small head that is fitted on stored features and returns maps."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.features.multiscale import join_stages

ONLINE_HINT = "use --method.solver closed_form with --method.prototypes 1"
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

    def stage_batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[list[Tensor]]:
        """Yield the same features as the stages' maps (B, C_l, H_l, W_l) they are joined from.

        The largest map has the grid of the features. Where they are made of joined maps, they are
        the only stage.
        """
        ...

    def subset(self, rows: Tensor) -> "FeatureSource":
        """Return the images at `rows`."""
        ...


class Detector(nn.Module):
    """A head on frozen features.

    `forward` maps features (B, C, H, W) to anomaly maps (B, H, W), higher = more anomalous, on any
    grid, 1 x 1 included. `state_dict` holds the head and nothing of the frozen backbone.

    Methods that train the backbone itself declare `takes = "images"`: where this class speaks of
    features they get uint8 images (B, 3, S, S), and all else is the same.
    """

    takes: ClassVar[Literal["features", "images"]] = "features"
    """What `fit` and `forward` are given."""
    final_maps: bool = False
    """Maps come at the size of the image and smoothed; nothing upsamples or blurs them again."""
    remarks: list[str] = []  # noqa: RUF012  replaced, never changed, by those that have any
    """What a reader of the fit's numbers must know, in words."""

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

    def score(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return anomaly maps (B, H, W), and image scores (B,) where the method has its own.

        None stands for the suite's image score: the maximum of the upsampled, blurred map.
        """
        return self(features), None

    def score_stages(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return what `score` returns, from the stages' maps (B, C_l, H_l, W_l) before joining.

        Detectors whose first step is linear need no joined features; all others join them here.
        """
        return self.score(join_stages(stages))

    def geometry(self, stages: Sequence[Tensor], maps: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return where features lie against the objective, for methods that have one; else None.

        Args:
            stages: (B, C_l, H_l, W_l) each.
            maps: (B, H, W), of these features; each is looked at where its map is highest.

        Returns:
            The projection's Euclidean norm (B,), and its angle to the objective (B,), in radians,
            in [0, pi].
        """
        del stages, maps
        return None

    def steps(self) -> list[dict[str, float]]:
        """Return what `fit` tells its monitor of each step, where `score_steps` knows them all.

        Empty for detectors whose steps each have a state of their own, as epochs have.
        """
        return []

    def score_steps(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the anomaly maps (T, B, H, W) of all T steps of the last fit at once.

        They are what `score_stages` would return at each `monitor(step)`, up to rounding.
        """
        del stages
        raise NotImplementedError

    def stopped_at(self, step: int) -> dict[str, Any]:
        """Return the options under which `fit` ends where it was at `monitor(step)`."""
        raise NotImplementedError

    def diagnostics(self) -> dict[str, list[float]]:
        """Return what figures need of a fit beside the scores; nothing for most detectors."""
        return {}

    def start(self, generator: torch.Generator) -> None:
        """Forget what was fitted, before the first `partial_fit`.

        Raises:
            ModelError: this detector cannot learn online.
        """
        del generator
        raise ModelError(f"{type(self).__name__} cannot learn online; {ONLINE_HINT}")

    def partial_fit(self, stages: Sequence[Tensor]) -> None:
        """Add normal features, the stages' maps (B, C_l, H_l, W_l); `solve` makes them count."""
        del stages
        raise ModelError(f"{type(self).__name__} cannot learn online; {ONLINE_HINT}")

    def solve(self) -> None:
        """Make what `partial_fit` was given count; nothing to do where it counts at once."""

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters of the head."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
