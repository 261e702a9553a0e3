"""Options of the methods we compare with; beside each number, where it comes from."""

from dataclasses import dataclass
from typing import Literal

from configs.options import FeatureOptions, OptionalFloat, OptionalInt, require_positive


@dataclass(frozen=True, kw_only=True)
class PatchCoreConfig(FeatureOptions):
    """PatchCore: a coreset of normal patch features, distance to the nearest."""

    coreset_ratio: float = 0.1
    """Share of the normal features kept (released commands: 0.1; paper: 0.01, 0.1, 0.25)."""
    num_neighbors: int = 9
    """Neighbours of the nearest kept feature that re-weight the image score; 1 for none (eq. 7)."""
    projection_dim: int = 128
    """Dimensions the coreset is chosen in, by random projection (released code: 128)."""
    search: Literal["exact", "faiss"] = "exact"
    """Nearest neighbours by one product per block, or by the package faiss."""

    def __post_init__(self) -> None:
        require_positive(self, "coreset_ratio", "num_neighbors", "projection_dim")
        if not self.coreset_ratio <= 1:
            raise ValueError(f"--method.coreset-ratio {self.coreset_ratio} cannot exceed 1")


@dataclass(frozen=True, kw_only=True)
class PadimConfig(FeatureOptions):
    """PaDiM: one Gaussian per position over a random subset of the channels."""

    dims: OptionalInt = 550
    """Channels drawn at random (paper: 100 of ResNet18's, 550 of WideResNet50's); none for all."""
    regularization: float = 0.01
    """Added to the diagonal of each covariance (paper: 0.01)."""

    def __post_init__(self) -> None:
        require_positive(self, "dims", "regularization")


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FeatureOptions):
    """k nearest normal features; DN2 on pooled features, patches on a grid."""

    num_neighbors: int = 2
    """Neighbours whose mean distance is the score (DN2: 2)."""
    distance: Literal["squared", "euclidean"] = "squared"
    """Which the mean is of (DN2's released code: squared)."""
    max_positions: OptionalInt = 20_000
    """Normal features kept, drawn at random where there are more (ours); none for all (DN2)."""
    search: Literal["exact", "faiss"] = "exact"
    """Nearest neighbours by one product per block, or by the package faiss."""

    def __post_init__(self) -> None:
        require_positive(self, "num_neighbors", "max_positions")


@dataclass(frozen=True, kw_only=True)
class MahalanobisConfig(FeatureOptions):
    """One Gaussian over all normal features, its covariance shrunk."""

    shrinkage: OptionalFloat = None
    """Weight of the scaled identity in the covariance; none for Ledoit and Wolf's optimum."""

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise ValueError(f"--method.shrinkage {self.shrinkage} must lie in 0 to 1, or be none")


@dataclass(frozen=True, kw_only=True)
class StpmConfig:
    """STPM: a student learns the frozen teacher's pyramid on normal images."""

    learning_rate: float = 0.4
    """Of SGD (paper, section 4)."""
    momentum: float = 0.9
    """Of SGD (paper)."""
    weight_decay: float = 1e-4
    """Of SGD (paper)."""
    batch_size: int = 32
    """Images per step (paper)."""
    epochs: int = 100
    """Passes over the training images (paper)."""
    validation_share: float = 0.2
    """Normal training images held out; the epoch of least loss on them is kept (paper: 0.2)."""
    mixed_precision: bool = True
    """Train in bfloat16 where a CUDA device computes in it; ignored elsewhere."""

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "batch_size", "epochs")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--method.momentum {self.momentum} must lie in 0 to 1")
        if not self.weight_decay >= 0:
            raise ValueError(f"--method.weight-decay {self.weight_decay} cannot be negative")
        if not 0 <= self.validation_share < 1:
            raise ValueError(
                f"--method.validation-share {self.validation_share} must lie in 0 to 1"
            )
