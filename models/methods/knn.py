"""k nearest normal features: DN2 on pooled features, the same at each position on a grid.

Source: "Deep Nearest Neighbor Anomaly Detection" (Bergman, Cohen and Hoshen, 2020): on frozen
features an image's score is its mean distance to the k = 2 nearest normal ones. The distance is the
squared Euclidean one in its authors' released code (`knn_score` of PANDA), the default here.

On a grid the normal features are those of all positions of all images.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from configs.options import FeatureOptions, OptionalInt, PositiveInt
from models.deployment.memory import Memory
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.features.coreset import count_positions, read_positions
from models.features.nearest import check_search, nearest
from models.method import Method


@dataclass(frozen=True, kw_only=True)
class KnnOptions(FeatureOptions):
    """k nearest normal features; DN2 on pooled features, patches on a grid."""

    num_neighbors: PositiveInt = 2
    """Neighbours whose mean distance is the score (DN2: 2)."""
    distance: Literal["squared", "euclidean"] = "squared"
    """Which the mean is of (DN2's released code: squared)."""
    max_positions: OptionalInt = 20_000
    """Normal features kept, drawn at random where there are more (ours); none for all (DN2)."""
    search: Literal["exact", "faiss"] = "exact"
    """Nearest neighbours by one product per block, or by the package faiss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_positions is not None and self.max_positions < self.num_neighbors:
            raise ValueError(
                f"--method.max-positions {self.max_positions} must be at least "
                f"--method.num-neighbors {self.num_neighbors}"
            )


class Knn(Detector):
    """Mean distance to the nearest normal features.

    Attributes:
        memory: (M, C) float32, in the order of the images.
        remarks: that not all normal features were kept.
    """

    sized_by_fit = ("memory",)

    memory: Tensor

    def __init__(self, features: FeatureShape, options: KnnOptions) -> None:
        super().__init__()
        check_search(options.search)
        self.options = options
        self.register_buffer("memory", torch.zeros(0, features.channels))

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Keep the normal features; see `Detector.fit`.

        Raises:
            ModelError: there are fewer than `num_neighbors`.
        """
        count, most = self.options.num_neighbors, self.options.max_positions
        total = count_positions(bank)
        if total < count:
            raise ModelError(
                f"{count} nearest neighbours need as many normal features: there are {total}",
                {"num_neighbors": "lower"},
            )
        rows = torch.arange(total)
        self.remarks = []
        if most is not None and total > most:
            rows = torch.randperm(total, generator=generator)[:most].sort().values
            self.remarks.append(
                f"the memory holds {len(rows):,} of {total:,} normal features, drawn at random "
                "(--method.max-positions none keeps all)"
            )
        self.memory = read_positions(bank, rows).to(self.memory)
        if monitor is not None:
            monitor(1, {"memory": len(rows)})

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean distance to the nearest normal features at each position, (B, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        options = self.options
        distances, _ = nearest(positions, self.memory, options.num_neighbors, search=options.search)
        if options.distance == "squared":
            distances = distances.square()
        return rearrange(distances.mean(dim=1), "(b h w) -> b h w", b=B, h=H, w=W)

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)


class _Exported(nn.Module):
    """`Knn` on `Memory`."""

    def __init__(self, detector: Knn) -> None:
        super().__init__()
        self.memory = Memory(detector.memory)
        self.count = detector.options.num_neighbors
        self.squared = detector.options.distance == "squared"

    def forward(self, features: Tensor) -> Tensor:
        """Return maps (B, H, W) of features (B, C, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        distances, _ = self.memory(positions - self.memory.shift, self.count)  # (P, k)
        scores = (distances.square() if self.squared else distances).mean(dim=1)
        return rearrange(scores, "(b h w) -> b h w", b=B, h=H, w=W)


METHOD = Method(
    detector=lambda: Knn,
    options=KnnOptions(),
    # Ours: with stage 1 every image costs four times as much.
    experiment={"structured": {"layers": (2, 3)}},
    on={"semantic": {"max_positions": None}},  # DN2 keeps every image
)
