"""DDAD's options, and what they may be together."""

from dataclasses import dataclass
from typing import Annotated

from configs.options import (
    Bound,
    Fraction,
    MethodOptions,
    NotNegative,
    NotNegativeInt,
    OnlyWith,
    Positive,
    PositiveInt,
)
from models.errors import ModelError

ADAPTED = OnlyWith("adaptation_epochs", "above 0", lambda count: count > 0)
ETA = Bound("in 0 to 1", lambda value: 0 <= value <= 1)
EVEN = Bound("even and above 0", lambda value: value > 0 and value % 2 == 0)


@dataclass(frozen=True, kw_only=True)
class DdadOptions(MethodOptions):
    """DDAD: a diffusion model rebuilds the image; features and pixels tell what differs."""

    conditioning: NotNegative = 3.0
    """How strongly each step is drawn towards the image, the same for all categories (ours; paper:
    0 to 11 by category)."""
    start_step: PositiveInt = 250
    """Time to which an image is noised before it is rebuilt (paper)."""
    sampling_step: PositiveInt = 25
    """Times between two looks of the network (paper: 10 steps)."""
    eta: Annotated[float, ETA] = 1.0
    """Fresh noise of each step: 0 for none, 1 for as much as DDPM has (paper)."""
    released_steps: bool = False
    """Count the times as the released code does: noise to the start, and a first look a step
    before it."""
    pixel_weight: NotNegative = 1.0
    """Of the pixels' distance beside the features' (paper: 1, on VisA 7)."""
    diffusion_steps: PositiveInt = 1000
    """Times from an image to noise (paper)."""
    base_width: Annotated[int, EVEN] = 64
    """Channels of the U-Net's first level (paper; its small model: 32)."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    """Channels of each level over those of the first; each level halves the maps (paper)."""
    blocks: PositiveInt = 2
    """Residual blocks of each level (paper)."""
    attention_factors: tuple[int, ...] = (8, 16, 32)
    """How many times smaller than the image the maps are that attend to themselves (paper: maps of
    32, 16 and 8 pixels of 256); the smallest always do."""
    heads: PositiveInt = 4
    """Of the attention (paper; its small model: 2)."""
    dropout: Fraction = 0.0
    """Of the residual blocks (paper; its small model: 0.3)."""
    learning_rate: Positive = 3e-4
    """Of Adam (paper)."""
    weight_decay: NotNegative = 0.05
    """Of Adam, added to the gradient (paper)."""
    batch_size: PositiveInt = 32
    """Images per step (paper; its small model: 16)."""
    epochs: PositiveInt = 2000
    """Passes over the training images (ours; paper: 1000 to 3000 by category, most often 2000)."""
    adaptation_epochs: NotNegativeInt = 0
    """Passes in which a copy of the backbone learns what rebuilt images look like; 0 for none
    (ours; paper: 0 to 16 by category)."""
    adaptation_learning_rate: Annotated[Positive, ADAPTED] = 1e-4
    """Of its AdamW (paper)."""
    adaptation_conditioning: Annotated[NotNegative, ADAPTED] = 3.0
    """How strongly an image is drawn towards another one there (paper)."""
    adaptation_weight: Annotated[NotNegative, ADAPTED] = 0.1
    """Of what keeps the copy near the backbone (paper)."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


def check(options: DdadOptions) -> None:
    """Check what the options are together.

    Raises:
        ModelError: there are no such steps, or no such network.
    """
    last = options.start_step + options.released_steps
    if last > options.diffusion_steps:
        raise ModelError(
            f"images cannot be noised to time {last} of {options.diffusion_steps}",
            {"start_step": "lower", "diffusion_steps": "raise"},
        )
    if options.sampling_step > options.start_step:
        raise ModelError(
            f"from time {options.start_step} no step of {options.sampling_step} can be taken",
            {"sampling_step": "lower"},
        )
    multipliers = options.channel_multipliers
    if not multipliers or min(multipliers) < 1:
        raise ModelError(
            f"the U-Net needs a number above 0 for each level, not {multipliers}",
            {"channel_multipliers": "change"},
        )
    factors = [2**level for level in range(len(multipliers))]
    for factor in options.attention_factors:
        if factor not in factors:
            raise ModelError(
                f"no map of the U-Net is {factor} times smaller than the image; they are "
                f"{', '.join(map(str, factors))} times",
                {"attention_factors": "choose of these as"},
            )
    for factor in {*options.attention_factors, factors[-1]}:
        channels = options.base_width * multipliers[factors.index(factor)]
        if channels % options.heads:
            raise ModelError(
                f"{channels} channels cannot be split among {options.heads} heads",
                {"heads": "choose a divisor as"},
            )
