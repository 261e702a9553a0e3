"""k nearest normal features: DN2 on pooled features, the same at each position on a grid.

Source: "Deep Nearest Neighbor Anomaly Detection" (Bergman, Cohen and Hoshen, 2020): on frozen
features an image's score is its mean distance to the k = 2 nearest normal ones. The distance is the
squared Euclidean one in its authors' released code (`knn_score` of PANDA), the default here.

On a grid the normal features are those of all positions of all images.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from models.features.coreset import count_positions, read_positions
from models.detector import Detector, FeatureSource, Monitor
from models.errors import ModelError
from models.features.nearest import check_search, nearest

DISTANCES = ("squared", "euclidean")


class Knn(Detector):
    """Mean distance to the nearest normal features.

    Args:
        channels: channels of the features.
        num_neighbors: k (DN2: 2).
        distance: "squared" or "euclidean".
        max_positions: normal features kept, drawn at random where there are more; None for all.
        search: "exact" or "faiss", see `models.features.nearest.nearest`.

    Attributes:
        memory: (M, C) float32, in the order of the images.
        remarks: that not all normal features were kept.
    """

    memory: Tensor

    def __init__(
        self,
        channels: int,
        *,
        num_neighbors: int = 2,
        distance: str = "squared",
        max_positions: int | None = 20_000,
        search: str = "exact",
    ) -> None:
        super().__init__()
        if num_neighbors < 1:
            raise ModelError(f"num neighbors {num_neighbors} must be at least 1")
        if max_positions is not None and max_positions < num_neighbors:
            raise ModelError(
                f"max positions {max_positions} must be at least num neighbors {num_neighbors}"
            )
        if distance not in DISTANCES:
            raise ModelError(f"distance {distance!r} is not one of {', '.join(DISTANCES)}")
        check_search(search)
        self.num_neighbors = num_neighbors
        self.distance = distance
        self.max_positions = max_positions
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
        """Keep the normal features; see `Detector.fit`.

        Raises:
            ModelError: there are fewer than `num_neighbors`.
        """
        total = count_positions(bank)
        if total < self.num_neighbors:
            raise ModelError(
                f"num neighbors {self.num_neighbors} needs as many normal features: there are "
                f"{total}"
            )
        rows = torch.arange(total)
        self.remarks = []
        if self.max_positions is not None and total > self.max_positions:
            rows = torch.randperm(total, generator=generator)[: self.max_positions].sort().values
            self.remarks.append(
                f"the memory holds {len(rows):,} of {total:,} normal features, drawn at random "
                "(--method.max-positions none keeps all)"
            )
        self.memory = read_positions(bank, rows).to(self.memory)
        if monitor is not None:
            monitor(1, {"memory": len(rows)})

    def stopped_at(self, step: int) -> dict[str, Any]:
        """There is one step; see `Detector.stopped_at`."""
        del step
        return {}

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean distance to the nearest normal features at each position, (B, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        distances, _ = nearest(positions, self.memory, self.num_neighbors, search=self.search)
        if self.distance == "squared":
            distances = distances.square()
        return rearrange(distances.mean(dim=1), "(b h w) -> b h w", b=B, h=H, w=W)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take the size of the stored memory, then its values."""
        if (stored := state_dict.get(f"{prefix}memory")) is not None:
            self.memory = self.memory.new_empty(len(stored), self.memory.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *arguments)
