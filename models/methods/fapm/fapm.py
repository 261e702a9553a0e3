"""FAPM: a memory of normal features for each region of the image and each stage of the backbone.

Source: "FAPM: Fast Adaptive Patch Memory for Real-time Industrial Anomaly Detection" (Kim et al.,
ICASSP 2023) and its released code, which scores with stored memories and has no training. A feature
is compared only with normal features of its own region and stage: few, so that it is fast, and of
the right place, so that what is normal elsewhere is found. It needs objects that lie alike.

| paper | here | meaning |
| --- | --- | --- |
| patch | region | one of 7 x 7 parts of the image |
| patch-wise memory | `RegionMemory` | coreset of the normal features of each region of a stage |
| near, far | near, far | small memory, or a large one where a region's features are spread |
| maximum cluster distance | radius | largest distance of a region's feature to its small coreset |
| d_1, ..., d_4 | neighbours | distances to the 4 nearest of the memory, ascending |

The map adds the stages' d_1, the coarse ones repeated to the finest grid. An image's score is that
of its highest position: d_1 times 1 minus the largest softmax of d_1 to d_4, each summed over the
stages. The released code averages 3 x 3 features first, which is the suite's `--patch-size 3`.

The radius that makes a region far is not published. Ours: above the mean over the stage's regions.
Ours too: where a grid does not split evenly, the first regions are a row or a column larger; and
radii and coresets are found on features projected to 128 channels, as PatchCore's are.

The softmax is of distances as they are. Where they are large, as those of features of large norm
are, its weight moves an image's score more than d_1 does; a remark says so.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from configs.options import FeatureOptions, PositiveInt, Share
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.features.coreset import draw_projection, greedy_k_centre
from models.features.matmul import full_precision, linear
from models.features.multiscale import grid_size
from models.features.nearest import nearest
from models.method import Method
from models.methods.fapm.regions import RegionMemory, borders, sources

READ = 16
"""Images read at once."""
HELD = 2**27
"""Entries of the features that a fit holds at once; for further ones it reads the bank again."""
PROJECTION = 128
"""Channels of the features that coresets are chosen in."""
EVEN = 0.9
"""Median weight of normal images, as a share of the largest possible, below which a run says so."""

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class FapmOptions(FeatureOptions):
    """FAPM: memories of normal features for each region and stage."""

    regions: PositiveInt = 7
    """Regions along each side of the image (released code: 7); a stage with fewer positions along a
    side has one for each."""
    near_ratio: Share = 0.1
    """Share of a region's normal features kept, at least `num_neighbors` (released code: 0.1)."""
    far_ratio: Share = 0.2
    """The same of regions whose features are spread (released code: twice as many)."""
    num_neighbors: PositiveInt = 4
    """Nearest features that weight an image's score (released code: 4); 1 for no weight."""
    released: bool = False
    """Repeat coarse positions as the released code does: within a region one after the other in
    reading order, so that its upper right quarter counts for its second row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.far_ratio < self.near_ratio:
            raise ValueError(
                f"--method.far-ratio {self.far_ratio} must be at least --method.near-ratio "
                f"{self.near_ratio}"
            )


class Fapm(Detector):
    """Distances to memories of the same region and stage.

    Pooled features are one region: nearest neighbours of a coreset. It scores grids that have at
    least as many positions along each side as the head has regions.

    Attributes:
        remarks: how many regions are far; that distances are large for the softmax of the scores.
    """

    def __init__(self, features: FeatureShape, options: FapmOptions) -> None:
        super().__init__()
        self.options = options
        self.stage_channels = features.stage_channels
        self.parts = nn.ModuleList(RegionMemory(width) for width in features.stage_channels)

    @property
    def memories(self) -> list[RegionMemory]:
        """The parts, with their type."""
        return [part for part in self.parts if isinstance(part, RegionMemory)]

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Choose each region's memory; see `Detector.fit`.

        As many rows of regions are held at once as `HELD` has room for, at least one.

        Raises:
            ModelError: a region has fewer normal features than `num_neighbors`.
        """
        options = self.options
        shapes = [maps.shape for maps in self._apart(next(iter(bank.stage_batches(1))))]
        sizes = [(H, W) for _, _, H, W in shapes]
        grids = [(min(options.regions, H), min(options.regions, W)) for H, W in sizes]
        self._check_counts(len(bank), sizes, grids)
        projections = [draw_projection(C, PROJECTION, generator) for C in self.stage_channels]
        chosen: list[list[_Chosen]] = [[] for _ in sizes]
        for group in self._groups(len(bank), sizes, grids):
            for (stage, *_), held in zip(group, self._read(bank, group), strict=True):
                for left, right in borders(held.shape[2], grids[stage][1]):
                    vectors = rearrange(held[:, :, left:right], "n h w c -> (n h w) c")
                    chosen[stage].append(self._choose(vectors, projections[stage], generator))
        far = []
        for part, grid, found in zip(self.memories, grids, chosen, strict=True):
            mean = math.fsum(one.radius for one in found) / len(found)
            is_far = [one.radius > mean for one in found]
            part.store(
                grid, [one.far if b else one.near for one, b in zip(found, is_far, strict=True)]
            )
            far.append(f"{sum(is_far)} of {len(found)}")
        self.remarks = []
        if max(max(grid) for grid in grids) > 1:
            self.remarks.append(
                "Regions with a large memory, as their radius is above the mean, stage by stage: "
                f"{', '.join(far)}."
            )
        self._remark_weights(next(iter(bank.stage_batches(READ))))
        if monitor is not None:
            monitor(1, {"memory": sum(part.count for part in self.memories)})

    def forward(self, features: Tensor) -> Tensor:
        """Return maps (B, H, W) of joined features (B, C, H, W), each stage at their grid."""
        return self.score_stages([features])[0]

    def score(self, features: Tensor) -> Scored:
        """Return maps and image scores of joined features, each stage at their grid."""
        return self.score_stages([features])

    def score_stages(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See `Detector.score_stages`; maps have the grid of the finest stage.

        Raises:
            ModelError: a stage has fewer positions along a side than regions.
        """
        with full_precision(stages[0].device):
            return self.scored(stages, bounded=True)

    def scored(self, stages: Sequence[Tensor], *, bounded: bool) -> tuple[Tensor, Tensor]:
        """Return maps (B, H, W) and image scores (B,); `bounded` as `RegionMemory` has it."""
        maps = self._apart(stages)
        H, W = (int(side) for side in grid_size(maps))
        total: Tensor | None = None
        for part, stage in zip(self.memories, maps, strict=True):
            found = part(stage, self.options.num_neighbors, bounded=bounded)  # (B, H_l * W_l, k)
            size = int(stage.shape[2]), int(stage.shape[3])
            if size != (H, W):
                repeated = sources(
                    size, (H, W), part.grid_size, released=self.options.released
                )  # (H * W)
                where = torch.tensor(repeated).to(found.device, non_blocking=True)
                found = found.index_select(1, where)
            total = found if total is None else total + found  # (B, H * W, k)
        assert total is not None
        nearest_of_all = total[..., 0]
        peaks, places = nearest_of_all.max(dim=1, keepdim=True)  # (B, 1) each
        anomaly_maps = rearrange(nearest_of_all, "b (h w) -> b h w", h=H)
        if self.options.num_neighbors == 1:
            return anomaly_maps, peaks[:, 0]
        where = places.unsqueeze(2).expand(-1, 1, total.shape[2])
        neighbours = total.gather(1, where)[:, 0]  # (B, k), ascending
        # 1 - max exp / sum exp, without overflow or cancellation.
        others = torch.exp(neighbours[:, :-1] - neighbours[:, -1:]).sum(dim=1)  # (B,)
        return anomaly_maps, peaks[:, 0] * others / (1 + others)

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    @torch.no_grad()
    def _remark_weights(self, stages: Sequence[Tensor]) -> None:
        """Say so where images' scores are mostly their weights, by some normal images."""
        most = 1 - 1 / self.options.num_neighbors
        maps, scores = self.score_stages(stages)
        peaks = maps.amax(dim=(1, 2))  # (B,)
        weights = (scores / peaks)[peaks > 0]
        if most == 0 or not len(weights) or weights.median() > EVEN * most:
            return
        self.remarks.append(
            f"Distances are large for a softmax: on normal images its weight is "
            f"{float(weights.median()):.2g}, and {most:.2g} where neighbours are equally far, so "
            "image scores say more of the neighbours than of the distance: --method.num-neighbors "
            "1 leaves the weight out, --method.feature-norm l2_per_layer makes distances small."
        )

    def _apart(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return a map for each stage; joined features, as a norm makes them, are split."""
        if len(stages) != len(self.stage_channels):
            (joined,) = stages
            stages = joined.split(list(self.stage_channels), dim=1)
        return [stage.float() for stage in stages]

    def _check_counts(self, images: int, sizes: Sequence[Size], grids: Sequence[Size]) -> None:
        """Refuse regions with too few normal features."""
        count = self.options.num_neighbors
        least = min(
            images * (H // rows) * (W // cols)
            for (H, W), (rows, cols) in zip(sizes, grids, strict=True)
        )
        if least < count:
            raise ModelError(
                f"{count} nearest neighbours need as many normal features in each region, and the "
                f"smallest has {least}",
                {"num_neighbors": "lower", "regions": "lower"},
            )

    def _groups(
        self, images: int, sizes: Sequence[Size], grids: Sequence[Size]
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Yield what is held at once: stage, first row and last of each row of regions."""
        group: list[tuple[int, int, int]] = []
        room = HELD
        for stage, ((H, W), (rows, _)) in enumerate(zip(sizes, grids, strict=True)):
            for top, bottom in borders(H, rows):
                entries = images * (bottom - top) * W * self.stage_channels[stage]
                if group and entries > room:
                    yield group
                    group, room = [], HELD
                group.append((stage, top, bottom))
                room -= entries
        yield group

    def _read(self, bank: FeatureSource, group: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Read rows of regions of all images, (N, h, W_l, C_l) float32 each."""
        held: list[Tensor] = []
        start = 0
        for stages in bank.stage_batches(READ):
            maps = self._apart(stages)
            bands = [
                rearrange(maps[stage][:, :, top:bottom], "b c h w -> b h w c")
                for stage, top, bottom in group
            ]
            if not held:
                held = [band.new_empty(len(bank), *band.shape[1:]) for band in bands]
            for whole, band in zip(held, bands, strict=True):
                whole[start : start + len(band)] = band
            start += len(bands[0])
        return held

    def _choose(
        self, vectors: Tensor, projection: Tensor | None, generator: torch.Generator
    ) -> "_Chosen":
        """Return both coresets of a region's features (P, C), and the radius of the first."""
        options = self.options
        points = vectors
        if projection is not None:
            with full_precision(vectors.device):
                points = linear(vectors, projection.to(vectors).T)  # (P, PROJECTION)
        near, far = (
            max(options.num_neighbors, int(ratio * len(vectors)))
            for ratio in (options.near_ratio, options.far_ratio)
        )
        order = greedy_k_centre(points, far, generator=generator)
        # Where fewer differ all others are copies of these, and as near: some fill up.
        order = order[torch.arange(max(len(order), options.num_neighbors)) % len(order)]
        radius = nearest(points, points[order[:near]], 1)[0].max()
        return _Chosen(vectors[order[:near]], vectors[order[:far]], float(radius))


@dataclass(frozen=True)
class _Chosen:
    """The small and the large coreset of a region, (M, C) each, and the radius of the first."""

    near: Tensor
    far: Tensor
    radius: float


class _Exported(nn.Module):
    """`Fapm` for a graph: it takes the stages, not joined features."""

    takes_stages = True

    def __init__(self, detector: Fapm) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, stages: Sequence[Tensor]) -> Scored:
        """Return maps and image scores of the stages' maps."""
        return self.detector.scored(stages, bounded=False)


METHOD = Method(
    detector=lambda: Fapm,
    options=FapmOptions(),
    published_as="FAPM",
    # Released code: on images of 256, cropped to 224, and maps blurred by 4 pixels.
    experiment={"structured": {"layers": (2, 3)}},
    # Ours: the paper has no pooled features; their distances are too large for its softmax.
    on={"semantic": {"num_neighbors": 1}},
)
