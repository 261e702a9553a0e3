"""Options of AnomalyNCD, which tells the kinds of defects of a product apart."""

from dataclasses import dataclass
from typing import Annotated

from configs.options import (
    Bound,
    Fraction,
    MethodOptions,
    NotNegative,
    NotNegativeInt,
    OptionalFraction,
    Positive,
    PositiveInt,
)

NotOne = Annotated[int, Bound("0, or 2 or above", lambda value: value == 0 or value >= 2)]


@dataclass(frozen=True, kw_only=True)
class AnomalyNcdOptions(MethodOptions):
    """AnomalyNCD; the values of its paper and its released code.

    Raises:
        ValueError: a value is beyond its bounds, or two contradict each other.
    """

    backbone: str = "vit_base_patch8_224.dino"
    """A timm vision transformer with a class token."""
    weights: str = "auto"
    """Of the backbone: auto, FILE, or random, which measures no method and is for tests."""
    image_size: PositiveInt = 224
    """Pixels of a side of what the backbone sees of a piece."""
    resize: PositiveInt = 256
    """Pixels of a piece's shorter side before it is cropped to the image size."""
    mask_layers: NotNegativeInt = 9
    """Last blocks in which the class token sees only the patches inside the mask; 0 for none."""
    trained_blocks: PositiveInt = 1
    """Last blocks that are trained; all before them stay frozen (released: block 11 of 0 to 11)."""
    heads: PositiveInt = 4
    """Classifiers trained side by side; the one of least loss without labels counts."""
    batch_size: PositiveInt = 32
    """Pieces per step, each in two views."""
    epochs: PositiveInt = 50
    """Passes; one draws as many pieces as there are."""
    learning_rate: Positive = 0.003
    """Of SGD in the first epoch; it falls to a thousandth along a cosine."""
    momentum: Fraction = 0.9
    """Of SGD."""
    weight_decay: NotNegative = 5e-5
    """Of SGD, on matrices only."""
    sup_weight: Fraction = 0.3
    """Share of the losses on labelled pieces; those without labels have the rest."""
    entropy_weight: NotNegative = 4.0
    """Weight of the loss that wants kinds to be used alike."""
    anomaly_threshold: OptionalFraction = 0.5
    """Pieces that score below it are drawn to one kind, the normal one, by the difference; none
    draws no piece."""
    teacher_temperature: Positive = 0.04
    """Of the softmax that one view's target is made by, after the warm-up."""
    warmup_teacher_temperature: Positive = 0.07
    """The same in the first epochs."""
    warmup_epochs: NotNegativeInt = 40
    """Over which the teacher's temperature changes; at most the epochs."""
    repeat_times: PositiveInt = 4
    """Epochs that each temperature of the warm-up lasts; the last one may last fewer."""
    merge_temperature: Positive = 50.0
    """Of the softmax over the pieces of one image, in pixels: of the roots of their masks' areas
    (released: 100 for MVTec AD, 50 for others)."""
    stored_views: NotOne = 0
    """Augmented views of each piece that are made once. 0, as published, makes two new ones in each
    epoch: all blocks run in each step, 12 of a ViT-B. N of 2 or more run the frozen blocks once for
    each of N views, keep the tokens in half precision in a temporary folder (1.2 MB a view of a
    ViT-B/8), and draw two of them in each epoch: 1 block of 12 runs in a step."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it; predictions are float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size > self.resize:
            raise ValueError(
                f"--method.image-size {self.image_size} is larger than --method.resize "
                f"{self.resize}, which it is cut from: raise the latter"
            )
        if self.batch_size < 2:
            raise ValueError(
                "--method.batch-size 1 must be at least 2: a batch has a piece with a label and "
                "one without"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"--method.warmup-epochs {self.warmup_epochs} is more than --method.epochs "
                f"{self.epochs}: the teacher would not reach its temperature; lower the former"
            )
