"""SimpleNet's options and presets: the paper's, the released code's, and with constrained norm."""

from dataclasses import dataclass
from typing import Any, Literal

from configs.options import FeatureOptions, OptionalFloat, OptionalInt, require_positive


@dataclass(frozen=True, kw_only=True)
class SimpleNetConfig(FeatureOptions):
    """SimpleNet: linear adaptor, Gaussian noise, and a discriminator whose logit is the score."""

    adaptor: Literal["linear", "none", "mlp"] = "linear"
    """Of the features (paper: linear; Table 3 compares none and one hidden layer)."""
    adaptor_bias: bool = False
    """Give the adaptor a bias (paper: no; released code: yes)."""
    norm: OptionalFloat = None
    """Put adapted features on a sphere of this radius; none is SimpleNet, nc_disc has 1."""
    sigma: float = 0.015
    """Standard deviation of the noise per entry (paper; Fig. 5)."""
    hidden: OptionalInt = None
    """Hidden units of the discriminator; none for as many as channels (released code: 1024)."""
    last_bias: bool = True
    """Give the discriminator's last layer a bias (released code: no)."""
    init: Literal["default", "xavier"] = "default"
    """Initial weights: PyTorch's default or Xavier-normal (released code)."""
    loss: Literal["truncated_l1", "cross_entropy"] = "truncated_l1"
    """Of the discriminator (paper: truncated_l1; Table 3 compares cross_entropy)."""
    threshold: float = 0.5
    """th of the truncated L1 loss (paper)."""
    learning_rate: float = 2e-4
    """Of the discriminator's Adam (paper)."""
    adaptor_learning_rate: float = 1e-4
    """Of the adaptor (paper)."""
    weight_decay: float = 1e-5
    """Of the discriminator's Adam (paper)."""
    adaptor_weight_decay: float = 1e-5
    """Of the adaptor (paper; released code: 1e-2, AdamW's default)."""
    adaptor_optimizer: Literal["adam", "adamw"] = "adam"
    """Of the adaptor (paper: adam; released code: adamw)."""
    batch_size: int = 4
    """Images per step (paper; released code: 8; semantic: 64, see SIMPLENET_SEMANTIC)."""
    epochs: int = 160
    """Passes over the training features (paper; released code: 40 x 4)."""
    report_every: int = 1
    """Epochs between two reports, and two evaluations where the test set is watched (released
    code: 4)."""
    mixed_precision: bool = True
    """Train the head in bfloat16 where a CUDA device computes in it; ignored elsewhere."""

    def __post_init__(self) -> None:
        require_positive(self, "norm", "sigma", "hidden", "threshold", "batch_size", "epochs")
        require_positive(self, "learning_rate", "adaptor_learning_rate", "report_every")
        for name in ("weight_decay", "adaptor_weight_decay"):
            if not getattr(self, name) >= 0:
                option = name.replace("_", "-")
                raise ValueError(f"--method.{option} {getattr(self, name)} cannot be negative")


SIMPLENET = {
    "simplenet": SimpleNetConfig(),
    # The released code where it differs; its adaptor's AdamW has PyTorch's default weight decay.
    "simplenet_released": SimpleNetConfig(
        adaptor_bias=True,
        adaptor_optimizer="adamw",
        adaptor_weight_decay=1e-2,
        hidden=1024,
        last_bias=False,
        init="xavier",
        batch_size=8,
        report_every=4,
    ),
    "nc_disc": SimpleNetConfig(norm=1.0),  # the suite's own
}
"""Method name on the command line -> its settings."""

# An image is one position here: a batch of 4 has no batch statistics. 64 is NoCo's semantic batch.
SIMPLENET_SEMANTIC: dict[str, dict[str, Any]] = {name: {"batch_size": 64} for name in SIMPLENET}
"""What semantic data change."""

SIMPLENET_STRUCTURED: dict[str, dict[str, Any]] = {
    "simplenet": {"layers": (2, 3)},  # paper: 28 x 28 grid
    "simplenet_released": {
        "layers": (2, 3),
        "image_size": 329,
        "crop_size": 288,  # 36 x 36 grid
        "resize": "bilinear_shorter",  # torchvision's Resize
    },
    "nc_disc": {"layers": (2, 3)},
}
"""What the methods change in a structured experiment beside their own options."""
