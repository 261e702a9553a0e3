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

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from models.features.coreset import (
    count_positions,
    draw_projection,
    greedy_k_centre,
    read_positions,
    read_projected,
)
from models.detector import Detector, FeatureSource, Monitor
from models.errors import ModelError
from models.features.nearest import check_search, direct_distances, nearest


class PatchCore(Detector):
    """Nearest-neighbour distances to a coreset of all positions.

    Args:
        channels: channels of the features.
        coreset_ratio: share of the normal positions kept, rounded down; at least one is, and 1
            keeps all. The paper's tables have 0.01, 0.1 and 0.25; 0.1 is that of the released
            commands for images of 224 pixels.
        num_neighbors: b of eq. 7 (paper: 9). 1 leaves the weight out. Where the memory is smaller
            it is all of it.
        projection_dim: dimensions the coreset is chosen in (released code: 128).
        search: "exact" or "faiss", see `models.features.nearest.nearest`.

    Attributes:
        memory: (M, C) float32, in the order of choice.
        remarks: that fewer positions differ than the ratio asks for.
    """

    memory: Tensor

    def __init__(
        self,
        channels: int,
        *,
        coreset_ratio: float = 0.1,
        num_neighbors: int = 9,
        projection_dim: int = 128,
        search: str = "exact",
    ) -> None:
        super().__init__()
        if not 0 < coreset_ratio <= 1:
            raise ModelError(f"coreset ratio {coreset_ratio} must be above 0 and at most 1")
        if num_neighbors < 1 or projection_dim < 1:
            raise ModelError(
                f"num neighbors {num_neighbors} and projection dim {projection_dim} must be at "
                "least 1"
            )
        check_search(search)
        self.coreset_ratio = coreset_ratio
        self.num_neighbors = num_neighbors
        self.projection_dim = projection_dim
        self.search = search
        self.remarks: list[str] = []
        self.register_buffer("memory", torch.zeros(0, channels))

    def fit(
        self,
        bank: FeatureSource,
        *,
        generator: torch.Generator,
        monitor: Monitor | None = None,
    ) -> None:
        """Choose the coreset, reading the bank twice; see `Detector.fit`.

        The features themselves are never held, only their projection.
        """
        count = max(1, int(count_positions(bank) * self.coreset_ratio))
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
        if self.coreset_ratio == 1:
            return torch.arange(count)
        projection = draw_projection(bank.channels, self.projection_dim, generator)
        points = read_projected(bank, projection)  # (N*H*W, dim)
        return greedy_k_centre(points, count, generator=generator)

    def stopped_at(self, step: int) -> dict[str, Any]:
        """There is one step; see `Detector.stopped_at`."""
        del step
        return {}

    def forward(self, features: Tensor) -> Tensor:
        """Return the distance to the nearest in the memory at each position, (B, H, W)."""
        distances, _ = self._nearest(features)
        return distances

    def score(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return anomaly maps (B, H, W) and the image scores of eq. 7, (B,)."""
        maps, rows = self._nearest(features)  # (B, H, W) each
        peaks, where = maps.flatten(1).max(dim=1)  # (B,) each
        count = min(self.num_neighbors, len(self.memory))
        if count == 1:
            return maps, peaks
        nearest_rows = rows.flatten(1).gather(1, where.unsqueeze(1)).squeeze(1)  # (B,)
        _, neighbours = nearest(self.memory[nearest_rows], self.memory, count, search=self.search)
        positions = rearrange(features, "b c h w -> b (h w) c")
        farthest = positions[torch.arange(len(positions), device=where.device), where]  # (B, C)
        # (B, 1, C) to (B, b, C)
        distances = direct_distances(farthest.unsqueeze(1), self.memory[neighbours]).squeeze(1)
        # 1 - exp(s*) / sum exp(distances), without overflow or cancellation.
        weights = -torch.expm1(peaks - torch.logsumexp(distances, dim=1))  # (B,)
        return maps, weights * peaks

    def _nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return distance and row of the nearest in the memory, (B, H, W) each."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        distances, rows = nearest(positions, self.memory, 1, search=self.search)  # (P, 1) each
        shape = {"b": B, "h": H, "w": W}
        return (
            rearrange(distances, "(b h w) 1 -> b h w", **shape),
            rearrange(rows, "(b h w) 1 -> b h w", **shape),
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take the size of the stored memory, then its values."""
        if (stored := state_dict.get(f"{prefix}memory")) is not None:
            self.memory = self.memory.new_empty(len(stored), self.memory.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *arguments)
