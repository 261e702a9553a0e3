"""The options of PNI, apart so that its training knows them too."""

from dataclasses import dataclass
from typing import Annotated, Literal

from configs.options import (
    FeatureOptions,
    Fraction,
    Odd,
    OnlyWith,
    OptionalInt,
    Positive,
    PositiveInt,
    Share,
)

SEVERAL = OnlyWith("mlp_layers", "above 1", lambda layers: layers > 1)
PAPERS = OnlyWith("released", "off", lambda released: not released)


@dataclass(frozen=True, kw_only=True)
class PniOptions(FeatureOptions):
    """PNI: a coreset gated by position and neighbours; the paper's values."""

    coreset_ratio: Share = 0.01
    """Share of the normal features in C_emb, rounded down, at least one (paper)."""
    dist_size: PositiveInt = 2048
    """Members of C_dist, fewer where fewer normal features differ (paper)."""
    projection_dim: PositiveInt = 128
    """Dimensions the coresets are chosen in, by random projection (as PatchCore's code)."""
    channels: OptionalInt = 1024
    """Channels at most: more are averaged in groups of neighbours (paper); none for all."""
    neighbour_channels: OptionalInt = None
    """Of these, channels at most that the network sees of each neighbour, likewise averaged (ours,
    for a smaller network; none, as in the paper, for all)."""
    neighbourhood: Odd = 9
    """Cells along each side of N_p(x), and of the square that a training position votes in
    (paper)."""
    threshold: Literal["dist", "emb"] = "dist"
    """Set of whose uniform probability tau is half: C_dist, whose members the probabilities are of
    (ours), or C_emb (as the paper and the released code write it)."""
    temperature: Positive = 2.0
    """T of the softmax when scoring (paper)."""
    sharpness: Annotated[Positive, PAPERS] = 1.0
    """lambda, a factor of the map (paper)."""
    mlp_layers: PositiveInt = 4
    """Linear layers of the network (paper; released code: 10)."""
    mlp_width: Annotated[PositiveInt, SEVERAL] = 2048
    """Units of all but the last (paper)."""
    dropout: Annotated[Fraction, SEVERAL] = 0.5
    """Share of them dropped in training (released code)."""
    learning_rate: Positive = 1e-3
    """Of Adam (paper)."""
    decay_epochs: PositiveInt = 5
    """Epochs between two divisions of the learning rate by 10 (paper)."""
    batch_size: PositiveInt = 2048
    """Positions per step, at least 2 (paper)."""
    epochs: PositiveInt = 15
    """Passes over the training positions (paper)."""
    validation_share: Fraction = 0.1
    """Positions held out; the epoch of least loss on them is kept, the last with 0 (released
    code)."""
    released: bool = False
    """Do as the released code does: the network sees the position itself and not its right
    neighbour; two gates of their own, whose maps are averaged, that of the neighbours with ranks in
    the place of members; positions vote for C_emb; lambda 0.99; an image's score is the largest of
    its map without 2 cells at the border, which are filled from inside."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it; ignored elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbourhood == 1:
            raise ValueError("--method.neighbourhood 1 has no neighbours: it must be 3 or above")
        if self.batch_size == 1:
            raise ValueError("--method.batch-size 1 has no batch statistics: it must be 2 or above")
