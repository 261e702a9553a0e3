"""Our closed form: many small clouds of normal features, a likelihood for each, stage by stage.

NoCo's training has an exact solution, a spectral filter of the normal second moment (derived in
`noco_exact`). One filter serves features that form one cloud; patches of images form many. So each
stage of the backbone gets centres of its own, each centre the filter of the features around it,
and a feature's energy is the smallest over its nearest centres (`mixture` has the formulas).

Stages are kept apart, each at its own grid, and their energies per channel are averaged: a sum of
log-likelihoods, as if stages were independent. That costs half of what joined features cost and is
more exact in place, since nothing coarse is resized into every position. The coarsest stage sees
that something is wrong with a picture, but not where: it counts for the image's score only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import (
    FeatureOptions,
    NotNegative,
    NotNegativeInt,
    OnlyWith,
    Positive,
    PositiveInt,
    Share,
)
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.features.multiscale import grid_size, join_stages
from models.method import Method
from models.methods.noco_cf.exported import ExportedMixture
from models.methods.noco_cf.mixture import Mixture, Shape, most_centres

CHANNELS = 65536
"""Channels of the images read at once, in all."""
APART = OnlyWith("stages", "apart", lambda stages: stages == "apart")
SEVERAL = OnlyWith("prototypes", "above 1", lambda prototypes: prototypes > 1)


@dataclass(frozen=True, kw_only=True)
class NocoCfOptions(FeatureOptions):
    """The local closed form: one pass, no epochs, no learning rate, nothing to choose."""

    stages: Literal["apart", "joined"] = "apart"
    """Each stage at its own grid with centres of its own, or all joined at the finest grid."""
    averaged: Annotated[NotNegativeInt, APART] = 1
    """Finest stages averaged to the next one's grid; two stages always stay for the map."""
    context: Annotated[NotNegativeInt, APART] = 1
    """Coarsest stages that count for an image's score only; two always stay for the map."""
    context_weight: Annotated[NotNegative, APART] = 0.2
    """Weight of their energy per channel, that of the map having 1."""
    top_share: Share = 0.01
    """An image's score is the mean over this share of its positions, the highest; at least one."""
    filter: Literal["ridge", "flow"] = "ridge"
    """(C + lambda)^(-1/2), or NoCo's training exp(-C s), stopped where it comes next to that."""
    ridge: Positive = 0.1
    """lambda, as a share of the mean variance of a channel about its centre."""
    normaliser: bool = True
    """Add each centre's log-determinant, so that energies are likelihoods that compare."""
    prototypes: PositiveInt = 128
    """Centres of each stage; fewer where they would have fewer positions than channels each."""
    nearest: Annotated[PositiveInt, SEVERAL] = 3
    """Centres each feature is compared with."""
    shrinkage: Annotated[NotNegative, SEVERAL] = 200.0
    """Positions that the moment of all centres counts for in each centre's own."""
    parents: Annotated[NotNegativeInt, SEVERAL] = 0
    """Groups of centres whose moments take the place of that of all; 0 for none."""
    kmeans_positions: PositiveInt = 10_000
    """Normal features of each stage that the centres are found on."""

    @property
    def learns_online(self) -> bool:
        """The centres stay those of the first images; deviations are of all images."""
        return self.feature_norm != "std"

    @property
    def shape(self) -> Shape:
        """How moments become filters."""
        return Shape(
            filter=self.filter,
            ridge=self.ridge,
            shrinkage=self.shrinkage,
            parents=self.parents,
            has_levels=self.normaliser,
            nearest=self.nearest,
        )


class NocoCf(Detector):
    """Energies of local second moments, stage by stage.

    It learns online: the first images give the centres, all further ones add to the sums.

    Attributes:
        parts: a mixture for each stage, the finest first; one where stages are joined.
        remarks: stages that have fewer centres than asked for.
    """

    batches_at_once = 4  # the more features a centre has at once, the larger its products

    def __init__(self, features: FeatureShape, options: NocoCfOptions) -> None:
        super().__init__()
        self.options = options
        self.stage_channels = features.stage_channels
        widths = features.stage_channels if options.stages == "apart" else (features.channels,)
        self.parts = nn.ModuleList(Mixture(width, options.shape) for width in widths)
        spare = max(0, len(widths) - 2)
        self.num_context = min(options.context, spare)
        self.num_averaged = min(options.averaged, spare - self.num_context)
        self._started = False
        self._generator = torch.Generator()

    @property
    def mixtures(self) -> list[Mixture]:
        """The parts, with their type."""
        return [part for part in self.parts if isinstance(part, Mixture)]

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Find the centres, add up the moments in a second reading, solve; see `Detector.fit`."""
        self.start(generator)
        batch_size = max(1, CHANNELS // bank.channels)
        per_image = math.ceil(self.options.kmeans_positions / len(bank))
        samples: list[list[Tensor]] = [[] for _ in self.parts]
        sizes = [0] * len(self.parts)
        for stages in bank.stage_batches(batch_size):
            for i, maps in enumerate(self._of_parts(stages)):
                B, _, H, W = maps.shape
                sizes[i] += B * H * W
                by_image = rearrange(maps, "b c h w -> b (h w) c")
                drawn = torch.rand(B, H * W, generator=generator).argsort(dim=1)[:, :per_image]
                rows = torch.arange(B).unsqueeze(1)  # (B, 1)
                samples[i].append(by_image[rows, drawn.to(maps.device)].flatten(0, 1).cpu())
        self._begin([torch.cat(parts) for parts in samples], sizes, generator)
        for stages in bank.stage_batches(batch_size):
            self.partial_fit(stages)
        self.solve()
        if monitor is not None:
            monitor(1, {"centres": sum(len(part.centres) for part in self.mixtures)})

    def start(self, generator: torch.Generator) -> None:
        """Forget what was fitted; see `LearnsOnline.start`."""
        self._started = False
        self._generator = generator
        self.remarks = []

    def partial_fit(self, stages: Sequence[Tensor]) -> None:
        """Add normal features to the moments; see `LearnsOnline.partial_fit`.

        The first images after `start` also give the centres, which stay: adding the same images
        in other parts gives the same sums up to rounding, if they start with the same ones.
        """
        found = [rearrange(maps, "b c h w -> (b h w) c") for maps in self._of_parts(stages)]
        if not self._started:
            self._begin([f.cpu() for f in found], [len(f) for f in found], self._generator)
        for part, positions in zip(self.mixtures, found, strict=True):
            part.add(positions)

    def solve(self) -> None:
        """See `LearnsOnline.solve`.

        Raises:
            ModelError: no image was seen.
        """
        if not self._started:
            raise ModelError("no normal feature was seen; fit first")
        for part in self.mixtures:
            part.solve()

    def _begin(
        self, samples: Sequence[Tensor], sizes: Sequence[int], generator: torch.Generator
    ) -> None:
        """Give each part its centres, of a sample of its features and the number of them all."""
        asked = self.options.prototypes
        for part, sample, size in zip(self.mixtures, samples, sizes, strict=True):
            part.start(sample, most_centres(asked, size, part.channels), generator)
        found = [len(part.centres) for part in self.mixtures]
        if min(found) < asked:
            counts = ", ".join(map(str, found))
            self.remarks = [
                f"Centres by stage: {counts}. Some of {asked} would have too few normal features, "
                "or be where another one is."
            ]
        self._started = True

    def forward(self, features: Tensor) -> Tensor:
        """Return maps (B, H, W) of joined features (B, C, H, W), each stage at their grid."""
        return self.score_stages([features])[0]

    def score(self, features: Tensor) -> Scored:
        """Return maps and image scores of joined features, each stage at their grid."""
        return self.score_stages([features])

    def score_stages(self, stages: Sequence[Tensor]) -> Scored:
        """See `Detector.score_stages`; maps have the grid of the finest stage not averaged."""
        energies = []
        for part, maps in zip(self.parts, self._of_parts(stages), strict=True):
            B, D, H, W = maps.shape
            found = part(rearrange(maps, "b c h w -> (b h w) c"))  # (P,)
            energies.append(rearrange(found, "(b h w) -> b h w", b=B, h=H, w=W) / D)
        return scores_of(energies, self.num_context, self.options)

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def _of_parts(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return each part's features, (B, D, H, W), float32, channels last.

        Joined features, as a feature norm makes them, are one stage: its channels are split.
        """
        if self.options.stages == "joined":
            return [join_stages(stages)]
        return split_stages(stages, self.stage_channels, self.num_averaged)


def split_stages(
    stages: Sequence[Tensor], widths: Sequence[int], num_averaged: int
) -> list[Tensor]:
    """Return a map for each stage, the finest averaged to the grid of the first that is not."""
    if len(stages) != len(widths):
        (joined,) = stages
        stages = joined.split(list(widths), dim=1)
    maps = [stage.float() for stage in stages]
    size = maps[num_averaged].shape[2:]
    for i in range(num_averaged):
        if maps[i].shape[2:] != size:
            maps[i] = F.interpolate(maps[i], size, mode="area")
    return [m.contiguous(memory_format=torch.channels_last) for m in maps]


def scores_of(energies: Sequence[Tensor], num_context: int, options: NocoCfOptions) -> Scored:
    """Return maps (B, H, W) and image scores (B,) of the parts' energies per channel.

    Args:
        energies: (B, H_l, W_l) of each part.
        num_context: the last parts, which count for the image only.
        options: their weight, and the share of positions that count.
    """
    H, W = grid_size([rearrange(e, "b h w -> b 1 h w") for e in energies])
    resized = torch.stack(
        [
            e
            if e.shape[1:] == (H, W)
            else F.interpolate(rearrange(e, "b h w -> b 1 h w"), (H, W), mode="bilinear")[:, 0]
            for e in energies
        ]
    )  # (L, B, H, W)
    num_local = len(energies) - num_context
    local = resized[:num_local].mean(dim=0)  # (B, H, W)
    whole = local
    if num_context:
        whole = local + options.context_weight * resized[num_local:].mean(dim=0)
    count = max(1, round(options.top_share * int(H) * int(W)))  # traced sizes are tensors
    highest = whole.sqrt().flatten(1).topk(count, dim=1).values  # (B, count)
    return local.sqrt(), highest.mean(dim=1)


class _Exported(nn.Module):
    """`NocoCf` for a graph: it takes the stages, not joined features."""

    takes_stages = True

    def __init__(self, detector: NocoCf) -> None:
        super().__init__()
        self.head = NocoCf(FeatureShape(detector.stage_channels), detector.options)
        self.head.parts = nn.ModuleList(ExportedMixture(part) for part in detector.mixtures)

    def forward(self, stages: Sequence[Tensor]) -> Scored:
        """Return maps and image scores of the stages' maps."""
        return self.head.score_stages(stages)


METHOD = Method(
    detector=lambda: NocoCf,
    options=NocoCfOptions(),
    experiment={"structured": {"layers": (1, 2, 3, 4)}},
    # Pooled features have no grid: every stage counts alike; their length is nuisance.
    on={"semantic": {"feature_norm": "l2", "averaged": 0, "context": 0}},
)
