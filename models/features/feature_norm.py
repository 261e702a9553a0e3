"""Rescaling of extracted features before a head sees them, for every detector."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from models.detector import (
    Detector,
    FeatureSource,
    HasObjective,
    KnowsSteps,
    LearnsOnline,
    Monitor,
    Scored,
)
from models.errors import ModelError
from models.features.multiscale import join_stages, split_images


def channel_statistics(bank: FeatureSource) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over all positions, (C,) float64 each.

    The deviation of a channel that varies by rounding alone, below a millionth of its root mean
    square, is 0.
    """
    total: Tensor | None = None
    count = 0
    for features in bank.batches(16):
        positions = rearrange(features, "b c h w -> (b h w) c").double()
        sums = torch.stack([positions.sum(dim=0), positions.square().sum(dim=0)])  # (2, C)
        total = sums if total is None else total + sums
        count += len(positions)
    assert total is not None
    mean, square = total / count
    std = (square - mean.square()).clamp_min(0).sqrt()
    return mean, torch.where(std > 1e-6 * square.sqrt(), std, 0.0)


class FeatureNorm(nn.Module):
    """Rescales features (B, C, H, W) at each position.

    Args:
        kind: "none"; "l2", unit length of the whole vector; "l2_per_layer", unit length of each
            stage's part; "std", each channel divided by its standard deviation over the normal
            training positions.
        stage_channels: channels of each stage, in order.
    """

    scale: Tensor

    def __init__(self, kind: str, stage_channels: Sequence[int]) -> None:
        super().__init__()
        self.kind = kind
        self.stage_channels = tuple(stage_channels)
        self.register_buffer("scale", torch.ones(sum(stage_channels)))

    def fit(self, bank: FeatureSource) -> None:
        """Measure the channels' standard deviations if the kind needs them."""
        if self.kind != "std":
            return
        _, std = channel_statistics(bank)
        # A constant channel says nothing of normality and keeps its scale: any change shows.
        self.scale.copy_(torch.where(std > 0, 1 / std, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Return rescaled features (B, C, H, W)."""
        if self.kind == "std":
            return features * rearrange(self.scale, "c -> 1 c 1 1")
        if self.kind == "l2":
            return nn.functional.normalize(features, dim=1)
        if self.kind == "l2_per_layer":
            parts = features.split(self.stage_channels, dim=1)
            return torch.cat([nn.functional.normalize(part, dim=1) for part in parts], dim=1)
        return features


class NormalisedDetector(Detector):
    """A detector behind a `FeatureNorm`; `normalised` makes one that can do what the head can."""

    def __init__(self, head: Detector, feature_norm: FeatureNorm) -> None:
        super().__init__()
        self.head = head
        self.feature_norm = feature_norm
        self.remarks = head.remarks
        self.diagnostics = head.diagnostics
        self.batches_at_once = head.batches_at_once

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Measure the norm, then fit the head on rescaled features; see `Detector.fit`."""
        self.feature_norm.fit(bank)
        self.head.fit(_Rescaled(bank, self.feature_norm), generator=generator, monitor=monitor)
        self.remarks, self.diagnostics = self.head.remarks, self.head.diagnostics

    def stopped_at(self, step: int) -> dict[str, Any]:
        """See `Detector.stopped_at`."""
        return self.head.stopped_at(step)

    def forward(self, features: Tensor) -> Tensor:
        """Return anomaly maps (B, H, W)."""
        return self.head(self.feature_norm(features))

    def score(self, features: Tensor) -> Scored:
        """See `Detector.score`."""
        return self.head.score(self.feature_norm(features))

    def score_stages(self, stages: Sequence[Tensor]) -> Scored:
        """See `Detector.score_stages`."""
        maps, images = split_images(stages)
        features = self.feature_norm(join_stages(maps))
        if images is None:
            return self.head.score(features)
        return self.head.score_stages([features, images])

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self.feature_norm, self.head.exported())

    def _rescaled(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Join the stages and rescale the features, which are one stage then."""
        return _rescaled(self.feature_norm, stages)


class _Online(NormalisedDetector):
    """One whose head learns online."""

    def start(self, generator: torch.Generator) -> None:
        """See `LearnsOnline.start`."""
        if self.feature_norm.kind == "std":
            raise ModelError(
                "deviations are measured over all images: no online learning",
                {"feature_norm": "l2 or none"},
            )
        cast(LearnsOnline, self.head).start(generator)

    def partial_fit(self, stages: Sequence[Tensor]) -> None:
        """See `LearnsOnline.partial_fit`."""
        cast(LearnsOnline, self.head).partial_fit(self._rescaled(stages))

    def solve(self) -> None:
        """See `LearnsOnline.solve`."""
        cast(LearnsOnline, self.head).solve()


class _Stepping(NormalisedDetector):
    """One whose head knows its steps."""

    def steps(self) -> list[dict[str, float]]:
        """See `KnowsSteps.steps`."""
        return cast(KnowsSteps, self.head).steps()

    def score_steps(self, stages: Sequence[Tensor]) -> Tensor:
        """See `KnowsSteps.score_steps`."""
        return cast(KnowsSteps, self.head).score_steps(self._rescaled(stages))


class _WithObjective(NormalisedDetector):
    """One whose head has an objective."""

    def geometry(self, stages: Sequence[Tensor], maps: Tensor) -> tuple[Tensor, Tensor]:
        """See `HasObjective.geometry`."""
        return cast(HasObjective, self.head).geometry(self._rescaled(stages), maps)


_ABILITIES = ((LearnsOnline, _Online), (KnowsSteps, _Stepping), (HasObjective, _WithObjective))


def normalised(head: Detector, kind: str, stage_channels: Sequence[int]) -> Detector:
    """Return a head behind a `FeatureNorm` of some kind; itself where that is "none"."""
    if kind == "none":
        return head
    can = tuple(part for protocol, part in _ABILITIES if isinstance(head, protocol))
    made = type("NormalisedDetector", (*can, NormalisedDetector), {})
    return made(head, FeatureNorm(kind, stage_channels))


class _Exported(nn.Module):
    """A head's graph behind its feature norm; images, where they are taken, pass by."""

    def __init__(self, feature_norm: FeatureNorm, head: nn.Module) -> None:
        super().__init__()
        self.feature_norm = feature_norm
        self.head = head

    def forward(self, features: Tensor, *images: Tensor) -> Any:
        """Return what the head's graph does of features (B, C, H, W)."""
        rescaled = self.feature_norm(features)
        apart = getattr(self.head, "takes_stages", False)  # joined features are one stage
        return self.head([rescaled] if apart else rescaled, *images)


def _rescaled(feature_norm: FeatureNorm, stages: Sequence[Tensor]) -> list[Tensor]:
    maps, images = split_images(stages)
    joined = feature_norm(join_stages(maps))
    return [joined] if images is None else [joined, images]


class _Rescaled:
    """A feature source seen through a `FeatureNorm`."""

    def __init__(self, bank: FeatureSource, feature_norm: FeatureNorm) -> None:
        self.channels = bank.channels
        self._bank = bank
        self._feature_norm = feature_norm

    def __len__(self) -> int:
        return len(self._bank)

    @property
    def held_out(self) -> "_Rescaled | None":
        held = self._bank.held_out
        return None if held is None else _Rescaled(held, self._feature_norm)

    def subset(self, rows: Tensor) -> "_Rescaled":
        return _Rescaled(self._bank.subset(rows), self._feature_norm)

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        for features in self._bank.batches(batch_size, generator=generator):
            yield self._feature_norm(features)

    def stage_batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[list[Tensor]]:
        for stages in self._bank.stage_batches(batch_size, generator=generator):
            yield _rescaled(self._feature_norm, stages)
