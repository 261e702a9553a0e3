"""What every detector is, what it is fitted on, and what gives it its features: the contracts.

A detector is a small head that is fitted on stored features and returns anomaly maps. What only
some detectors can do is a Protocol of its own; `isinstance` tells whether one can.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models.features.multiscale import join_stages

if TYPE_CHECKING:
    from models.backbone.extractor import FrozenExtractor

Scored = tuple[Tensor, Tensor | None]
"""Anomaly maps (B, H, W), and image scores (B,) of methods that have their own; None stands for the
suite's image score, the maximum of the upsampled, blurred map."""


class Extractor(nn.Module, ABC):
    """What turns images into what a method takes: features of a backbone, the images, or both.

    Attributes:
        stage_channels: channels of each stage of the features, then 3 where images are taken.
    """

    stage_channels: tuple[int, ...]

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the joined features; 3 where only images are taken."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it runs, and where the heads are."""

    @property
    @abstractmethod
    def weights_digest(self) -> str:
        """Short hash of the backbone's weights; empty where there is none."""

    @property
    @abstractmethod
    def random_weights(self) -> bool:
        """Whether the backbone's weights are random because that was asked for."""

    @abstractmethod
    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Run the backbone on uint8 images (B, 3, S, S).

        Returns:
            One float32 map (B, C_l, H_l, W_l) per stage, then the images where they are taken.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return everything the result depends on beside the images, as JSON values."""

    @staticmethod
    def assemble(stages: list[Tensor]) -> Tensor:
        """Return features (B, C, H, W), float32, or images where only these are taken."""
        return join_stages(stages)


class FeatureSource(Protocol):
    """Normal training features, as a detector sees them."""

    channels: int
    """Of the joined features; 3 where a method takes only images."""

    @property
    def held_out(self) -> "FeatureSource | None":
        """Normal images beside these, for scales and thresholds; None where the data has none."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yield features (B, C, H, W), float32; shuffled when a generator is given.

        Methods that take only images get uint8 images (B, 3, S, S).
        """
        ...

    def stage_batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[list[Tensor]]:
        """Yield the same features as the stages' maps (B, C_l, H_l, W_l) they are joined from.

        The largest map has the grid of the features. Where they are made of joined maps, they are
        the only stage. Methods that take images too get them as a last stage, uint8.
        """
        ...

    def subset(self, rows: Tensor) -> "FeatureSource":
        """Return the images at `rows`."""
        ...


class Monitor(Protocol):
    """Is called after each epoch or candidate of a fit, and decides what is kept."""

    @property
    def scores_steps(self) -> bool:
        """Whether it scores images with the detector each time it is called."""
        ...

    def __call__(self, step: int, values: dict[str, float], /) -> None:
        """Take the number of the step, from 1, and values to log."""
        ...


@runtime_checkable
class KeepsFits(Protocol):
    """A monitor that can keep where a fit is, so that a killed one goes on from there."""

    def kept(self, phase: str, /) -> dict[str, Any] | None:
        """Return the state an interrupted fit had in one of its phases; None to start that."""
        ...

    def keep(self, phase: str, state: Callable[[], dict[str, Any]], /, *, ended: bool) -> None:
        """Keep the state at the end of an epoch, if it is time to.

        Args:
            phase: names the part of the fit.
            state: makes it, of tensors and plain values.
            ended: the phase is over and another one follows: what is kept later holds this too.
        """
        ...


@dataclass(frozen=True)
class FeatureShape:
    """What a detector is built for.

    Attributes:
        stage_channels: channels of each stage of the features; none where it takes only images.
        backbone: the frozen network, for methods that train a copy of it or compare with it; None
            where a method brings a network of its own.
    """

    stage_channels: tuple[int, ...]
    backbone: "FrozenExtractor | None" = None

    @property
    def channels(self) -> int:
        """Channels of the joined features."""
        return sum(self.stage_channels)


class SizedByFit(nn.Module):
    """A module that has buffers or parameters as long as its last fit made them."""

    sized_by_fit: tuple[str, ...] = ()
    """Those whose first axis is as long as the fit made it; loading takes the stored length."""

    def resize(self, name: str, length: int) -> None:
        """Make a buffer or a parameter anew, of another length and without values."""
        tensor = getattr(self, name)
        room = tensor.new_empty(length, *tensor.shape[1:])
        setattr(self, name, nn.Parameter(room) if isinstance(tensor, nn.Parameter) else room)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take the lengths of the stored tensors, then their values."""
        for name in self.sized_by_fit:
            stored = state_dict.get(f"{prefix}{name}")
            # Of the same length it stays the parameter that an optimizer knows.
            if stored is not None and len(stored) != len(getattr(self, name)):
                self.resize(name, len(stored))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Detector(SizedByFit):
    """A head on frozen features; a subclass is built from `FeatureShape` and its options.

    `forward` maps features (B, C, H, W) to anomaly maps (B, H, W), higher = more anomalous, on any
    grid, 1 x 1 included. `state_dict` holds the head and nothing of the frozen backbone.

    Where this class speaks of features, methods that take only images get these, uint8
    (B, 3, S, S). Those that take both, or each stage at its own grid, read `stage_batches` and
    override `score_stages`.
    """

    final_maps: bool = False
    """Maps come at the size of the image and smoothed; nothing upsamples or blurs them again."""

    batches_at_once: int = 1
    """Batches of features that are scored together where that is faster."""

    def __init__(self) -> None:
        super().__init__()
        self.remarks: list[str] = []
        """What a reader of the last fit's numbers must know, in words."""
        self.diagnostics: dict[str, list[float]] = {}
        """What figures need of the last fit beside the scores."""

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Fit the head on normal features; every random number comes from `generator`.

        Raises:
            FloatingPointError: the loss left the finite numbers; the message names epoch and step.
        """
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Return anomaly maps (B, H, W) of features (B, C, H, W)."""
        raise NotImplementedError

    def score(self, features: Tensor) -> Scored:
        """Return anomaly maps and the method's own image scores of features (B, C, H, W)."""
        return self(features), None

    def score_stages(self, stages: Sequence[Tensor]) -> Scored:
        """Return what `score` returns, from the stages' maps (B, C_l, H_l, W_l) before joining.

        Detectors whose first step is linear need no joined features; all others join them here.
        Those that keep stages apart see joined features as stages of one grid.
        """
        return self.score(join_stages(stages))

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters of the head."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def stopped_at(self, step: int) -> dict[str, Any]:
        """Return the options under which `fit` ends where it was at `monitor(step)`.

        None where a fit is a single step, as here.
        """
        del step
        return {}

    def exported(self) -> nn.Module:
        """Return what a graph for export holds of the fitted detector, float32, in eval mode.

        It maps what the method takes (features, images, or both in this order) to `Scored` or to
        maps alone. Where it has `takes_stages`, the features are a list of the stages' maps.

        Raises:
            ModelError: this detector cannot be exported.
        """
        return self


@runtime_checkable
class LearnsOnline(Protocol):
    """A detector that can learn from a few images at a time."""

    def start(self, generator: torch.Generator) -> None:
        """Forget what was fitted, before the first `partial_fit`."""
        ...

    def partial_fit(self, stages: Sequence[Tensor]) -> None:
        """Add normal features, the stages' maps (B, C_l, H_l, W_l); `solve` makes them count."""
        ...

    def solve(self) -> None:
        """Make what `partial_fit` was given count."""
        ...


@runtime_checkable
class KnowsSteps(Protocol):
    """A detector that can score by all steps of its last fit at once."""

    def steps(self) -> list[dict[str, float]]:
        """Return what `fit` tells its monitor of each step; empty where they are not all known."""
        ...

    def score_steps(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the anomaly maps (T, B, H, W) of all T steps of the last fit.

        They are what `score_stages` would return at each `monitor(step)`, up to rounding.
        """
        ...


@runtime_checkable
class HasParts(Protocol):
    """A detector whose map is the mean of several, each of which sees something else."""

    part_names: tuple[str, ...]
    """What each sees, in order."""

    def score_parts(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps (B, H, W) that `score_stages` takes the mean of, from the same stages."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """A detector whose map compares images with what its network makes of them."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what the network makes of images (B, 3, S, S), uint8, of the same shape, uint8."""
        ...


@runtime_checkable
class KnowsCategory(Protocol):
    """A detector that can use the name of what the images show.

    Attributes:
        category: in words, set before the fit; None where the images are of several.
    """

    category: str | None


@runtime_checkable
class HasObjective(Protocol):
    """A detector that draws projected features to an objective."""

    def geometry(self, stages: Sequence[Tensor], maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return where features lie against the objective.

        Args:
            stages: (B, C_l, H_l, W_l) each.
            maps: (B, H, W), of these features; each is looked at where its map is highest.

        Returns:
            The projection's Euclidean norm (B,), and its angle to the objective (B,), in radians,
            in [0, pi].
        """
        ...
