"""PatchCore: distance to the nearest of a coreset of normal patch features.

Source: "Towards Total Recall in Industrial Anomaly Detection" (Roth et al., CVPR 2022) and its
released code, whose commands differ from the paper in one point: they score an image by its largest
patch score, without the weight of eq. 7. That is `num_neighbors = 1` here.

| paper | here | meaning |
| --- | --- | --- |
| M, M_C | memory | coreset of the normal features, (M, C) |
| m^test | positions | features of a test image |
| s* (eq. 6) | peaks | largest distance of a position to its nearest in the memory |
| m* | nearest_rows | that nearest one |
| N_b(m*) | neighbours | the b nearest to m* in the memory, itself included |
| s (eq. 7) | image scores | (1 - exp(s*) / sum over N_b of exp ||m^test - m||) s* |
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from configs.options import FeatureOptions, PositiveInt, Share
from models.deployment.memory import Memory
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.features.coreset import (
    count_positions,
    draw_projection,
    greedy_k_centre,
    read_positions,
    read_projected,
)
from models.features.nearest import check_search, direct_distances, nearest
from models.method import Method


@dataclass(frozen=True, kw_only=True)
class PatchCoreOptions(FeatureOptions):
    """PatchCore: a coreset of normal patch features, distance to the nearest."""

    coreset_ratio: Share = 0.1
    """Share of the normal features kept, rounded down, at least one; 1 keeps all (released commands
    for images of 224 pixels: 0.1; paper: 0.01, 0.1, 0.25)."""
    num_neighbors: PositiveInt = 9
    """Neighbours of the nearest kept feature that re-weight the image score; 1 for none (eq. 7)."""
    projection_dim: PositiveInt = 128
    """Dimensions the coreset is chosen in, by random projection (released code: 128)."""
    search: Literal["exact", "faiss"] = "exact"
    """Nearest neighbours by one product per block, or by the package faiss."""


class PatchCore(Detector):
    """Nearest-neighbour distances to a coreset of all positions.

    Where the memory is smaller than `num_neighbors` all of it are neighbours.

    Attributes:
        memory: (M, C) float32, in the order of choice.
        remarks: that fewer positions differ than the ratio asks for.
    """

    sized_by_fit = ("memory",)

    memory: Tensor

    def __init__(self, features: FeatureShape, options: PatchCoreOptions) -> None:
        super().__init__()
        check_search(options.search)
        self.options = options
        self.register_buffer("memory", torch.zeros(0, features.channels))

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Choose the coreset, reading the bank twice; see `Detector.fit`.

        The features themselves are never held, only their projection.
        """
        count = max(1, int(count_positions(bank) * self.options.coreset_ratio))
        chosen = self._choose(bank, count, generator)
        self.memory = read_positions(bank, chosen).to(self.memory)
        self.remarks = []
        if len(chosen) < count:
            self.remarks.append(
                f"the coreset has {len(chosen):,} features instead of {count:,}: all other normal "
                "features are copies of these"
            )
        if monitor is not None:
            monitor(1, {"memory": len(chosen)})

    def _choose(self, bank: FeatureSource, count: int, generator: torch.Generator) -> Tensor:
        """Return the positions of the coreset, (count,) or fewer."""
        if self.options.coreset_ratio == 1:
            return torch.arange(count)
        projection = draw_projection(bank.channels, self.options.projection_dim, generator)
        points = read_projected(bank, projection)  # (N*H*W, dim)
        return greedy_k_centre(points, count, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """Return the distance to the nearest in the memory at each position, (B, H, W)."""
        distances, _ = self._nearest(features)
        return distances

    def score(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return anomaly maps (B, H, W) and the image scores of eq. 7, (B,)."""
        maps, rows = self._nearest(features)  # (B, H, W) each
        peaks, where = maps.flatten(1).max(dim=1)  # (B,) each
        count = min(self.options.num_neighbors, len(self.memory))
        if count == 1:
            return maps, peaks
        nearest_rows = rows.flatten(1).gather(1, where.unsqueeze(1)).squeeze(1)  # (B,)
        _, neighbours = nearest(
            self.memory[nearest_rows], self.memory, count, search=self.options.search
        )
        positions = rearrange(features, "b c h w -> b (h w) c")
        farthest = positions[torch.arange(len(positions), device=where.device), where]  # (B, C)
        # (B, 1, C) to (B, b, C)
        distances = direct_distances(farthest.unsqueeze(1), self.memory[neighbours]).squeeze(1)
        # 1 - exp(s*) / sum exp(distances), without overflow or cancellation.
        weights = -torch.expm1(peaks - torch.logsumexp(distances, dim=1))  # (B,)
        return maps, weights * peaks

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def _nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return distance and row of the nearest in the memory, (B, H, W) each."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        distances, rows = nearest(
            positions, self.memory, 1, search=self.options.search
        )  # (P, 1) each
        shape = {"b": B, "h": H, "w": W}
        return (
            rearrange(distances, "(b h w) 1 -> b h w", **shape),
            rearrange(rows, "(b h w) 1 -> b h w", **shape),
        )


class _Exported(nn.Module):
    """`PatchCore` on `Memory`, with the image scores of eq. 7."""

    def __init__(self, detector: PatchCore) -> None:
        super().__init__()
        self.memory = Memory(detector.memory)
        self.count = min(detector.options.num_neighbors, len(detector.memory))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return maps and image scores of features (B, C, H, W)."""
        B, C, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c") - self.memory.shift  # (P, C)
        distances, rows = self.memory(positions, 1)  # (P, 1) each
        maps = rearrange(distances, "(b h w) 1 -> b h w", b=B, h=H, w=W)
        peaks, where = maps.flatten(1).max(dim=1, keepdim=True)  # (B, 1) each
        if self.count == 1:
            return maps, peaks[:, 0]
        nearest = rearrange(rows, "(b p) 1 -> b p", p=H * W).gather(1, where)[:, 0]  # (B,)
        _, neighbours = self.memory(self.memory.memory[nearest], self.count)  # (B, b)
        by_image = rearrange(positions, "(b p) c -> b p c", p=H * W)
        farthest = by_image.gather(1, where.unsqueeze(2).expand(-1, 1, C))[:, 0]  # (B, C)
        distances = self.memory.distances(farthest, neighbours)  # (B, b)
        weights = 1 - torch.exp(peaks[:, 0] - torch.logsumexp(distances, dim=1))  # (B,)
        return maps, weights * peaks[:, 0]


METHOD = Method(
    detector=lambda: PatchCore,
    options=PatchCoreOptions(),
    published_as="PatchCore",
    experiment={"structured": {"layers": (2, 3)}},  # paper, section 4.2
)
