"""CutPaste's options, and what they may be together."""

from dataclasses import dataclass
from typing import Annotated, Literal

from configs.options import (
    Fraction,
    MethodOptions,
    NotNegative,
    NotNegativeInt,
    OnlyWith,
    OptionalInt,
    Positive,
    PositiveInt,
)
from models.errors import ModelError

PATCHES = OnlyWith("representation", "patch", lambda chosen: chosen == "patch")
IMAGES = OnlyWith("representation", "image", lambda chosen: chosen == "image")


@dataclass(frozen=True, kw_only=True)
class CutpasteOptions(MethodOptions):
    """CutPaste: normal images against images with a piece pasted, then a Gaussian."""

    representation: Literal["image", "patch"] = "image"
    """Of whole images, the paper's for detection; or of windows, the paper's for localisation."""
    classes: Literal["patch", "scar", "three_way"] = "three_way"
    """What normal views are told from: patches, scars, or each as a class of its own (paper)."""
    width: PositiveInt = 64
    """Channels of the network's first stage, doubled by each that follows (paper: ResNet-18)."""
    head_layers: NotNegativeInt = 1
    """Hidden layers of the head before the last one of 128 units (reimplementation: 1, another: 8;
    the paper states none)."""
    head_width: PositiveInt = 512
    """Units of these layers (reimplementations)."""
    shift: Annotated[Fraction, IMAGES] = 0.04
    """Largest translation of a training image, a share of its side (ours; paper: not stated)."""
    jitter: Fraction = 0.1
    """Strength of the colour jitter of a training image; that of what is pasted is the paper's 0.1
    (reimplementation: 0.1)."""
    crop: Annotated[PositiveInt, PATCHES] = 64
    """Side in pixels of the crops that it trains on (paper)."""
    window: Annotated[PositiveInt, PATCHES] = 32
    """Side in pixels of the windows that are scored (paper)."""
    stride: Annotated[PositiveInt, PATCHES] = 4
    """Pixels between two windows (paper)."""
    spread: Annotated[Positive, PATCHES] = 10.0
    """Standard deviation, in pixels, of the Gaussian by which a window's score goes back to its
    pixels (reimplementation)."""
    density: Annotated[Literal["one", "per_position"], PATCHES] = "one"
    """One Gaussian of all windows, or one for each position (paper: for objects in one place)."""
    learning_rate: Positive = 0.03
    """Of SGD, at the start of one half cosine to 0 (paper)."""
    momentum: Fraction = 0.9
    """Of SGD (paper)."""
    weight_decay: NotNegative = 3e-5
    """Of SGD (paper)."""
    batch_size: PositiveInt = 32
    """Images per step, each in two or three views (paper: 64 or 96 views)."""
    steps_per_epoch: PositiveInt = 256
    """Updates of an epoch, over images that are passed again and again (paper)."""
    epochs: PositiveInt = 256
    """Of so many updates (paper; its Table 7: 128 do as well)."""
    schedule_epochs: OptionalInt = None
    """Epochs over which the learning rate falls to 0; none for all of `epochs`."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


def check(options: CutpasteOptions) -> None:
    """Check what the options are together.

    Raises:
        ModelError: no window sees some pixels, or nothing is learned in the last epochs.
    """
    if options.stride > options.window:
        raise ModelError(
            f"windows of {options.window} pixels every {options.stride} leave pixels between "
            "them that none sees",
            {"stride": "lower", "window": "raise"},
        )
    if options.schedule_epochs is not None and options.schedule_epochs < options.epochs:
        raise ModelError(
            f"the learning rate is 0 after {options.schedule_epochs} of {options.epochs} epochs",
            {"schedule_epochs": "raise", "epochs": "lower"},
        )
