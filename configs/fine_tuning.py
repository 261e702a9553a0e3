"""Options of the methods that train a network on the images themselves, for semantic data."""

from dataclasses import dataclass
from typing import Literal

from configs.options import OptionalFloat, OptionalPath, require_positive


@dataclass(frozen=True, kw_only=True)
class PandaConfig:
    """PANDA: the backbone's last stages, trained to bring normal images to their mean."""

    variant: Literal["early_stopping", "ewc"] = "early_stopping"
    """A fixed number of epochs, or an elastic penalty on leaving the pretrained weights."""
    ewc_weight: float = 1e4
    """Of that penalty (released code, for its own Fisher file; ewc)."""
    fisher_file: OptionalPath = None
    """Fisher diagonal, .safetensors or .pth; none computes it on the normal images (ewc)."""
    fisher_images: int = 1000
    """Normal images it is computed on (ours; ewc)."""
    learning_rate: float = 1e-2
    """Of SGD (released code)."""
    momentum: float = 0.9
    """Of SGD (released code)."""
    weight_decay: float = 5e-5
    """Of SGD (released code)."""
    clip_norm: OptionalFloat = 1e-3
    """Largest norm of the gradient (released code)."""
    batch_size: int = 32
    """Images per step (released code)."""
    epochs: int = 15
    """Passes over the training images (released code: 15; panda_ewc 50)."""
    num_neighbors: int = 2
    """Neighbours whose squared distances are the score (released code)."""
    trained_stages: int = 2
    """Stages that train, counted from the last (released code: layer3 and layer4)."""
    mixed_precision: bool = True
    """Train in bfloat16 where a CUDA device computes in it; ignored elsewhere."""

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "batch_size", "epochs", "num_neighbors")
        require_positive(self, "clip_norm", "trained_stages", "fisher_images")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--method.momentum {self.momentum} must lie in 0 to 1")
        if not (self.weight_decay >= 0 and self.ewc_weight >= 0):
            raise ValueError("--method.weight-decay and --method.ewc-weight cannot be negative")


@dataclass(frozen=True, kw_only=True)
class MeanShiftedConfig:
    """Mean-shifted contrastive loss: two views of an image attract, seen from the normals' mean."""

    temperature: float = 0.25
    """Of the contrastive loss (paper)."""
    angular: bool = False
    """Add the angular center loss (released code: off)."""
    learning_rate: float = 1e-5
    """Of SGD (released code)."""
    weight_decay: float = 5e-5
    """Of SGD (released code)."""
    batch_size: int = 64
    """Images per step, each in two views (released code)."""
    epochs: int = 20
    """Passes over the training images (released code)."""
    num_neighbors: int = 2
    """Neighbours whose distances are the score (released code)."""
    trained_stages: int = 2
    """Stages that train, counted from the last (released code: 2 of a ResNet152)."""
    mixed_precision: bool = True
    """Train in bfloat16 where a CUDA device computes in it; ignored elsewhere."""

    def __post_init__(self) -> None:
        require_positive(self, "temperature", "learning_rate", "batch_size", "epochs")
        require_positive(self, "num_neighbors", "trained_stages")
        if not self.weight_decay >= 0:
            raise ValueError(f"--method.weight-decay {self.weight_decay} cannot be negative")


@dataclass(frozen=True, kw_only=True)
class DeepSvddConfig:
    """Deep SVDD: a LeNet from random weights, drawn to a fixed centre."""

    network: Literal["cifar", "mnist"] = "cifar"
    """32 x 32 in colour or 28 x 28 in grey (paper, section 4.2)."""
    objective: Literal["one_class", "soft_boundary"] = "one_class"
    """Equation 4, or equation 3 with a radius."""
    nu: float = 0.1
    """Share of normal images allowed outside the soft boundary (paper: 0.1 or 0.01)."""
    warmup_epochs: int = 10
    """Epochs before its radius leaves 0 (released code)."""
    leakiness: float = 0.1
    """Slope of the leaky ReLU below 0 (paper; released code: 0.01)."""
    learning_rate: float = 1e-4
    """Of Adam before the milestones, a tenth of it after (paper)."""
    milestone: int = 150
    """Epochs before the learning rate drops (paper; released code: 50)."""
    weight_decay: float = 1e-6
    """Of Adam (paper; released code: 0.5e-6)."""
    batch_size: int = 200
    """Images per step (paper)."""
    epochs: int = 250
    """Passes over the training images (paper: 150 + 100; released code: 150)."""
    pretrain_epochs: int = 350
    """Passes of the autoencoder before (paper: 250 + 100)."""
    pretrain_milestone: int = 250
    """Epochs before its learning rate drops (paper)."""
    pretrain_weight_decay: float = 1e-6
    """Of its Adam (paper)."""

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "batch_size", "epochs")
        if not 0 < self.nu < 1:
            raise ValueError(f"--method.nu {self.nu} must lie between 0 and 1")
        for name in (
            "leakiness", "weight_decay", "pretrain_weight_decay", "warmup_epochs", "milestone",
            "pretrain_epochs", "pretrain_milestone",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                option = name.replace("_", "-")
                raise ValueError(f"--method.{option} {getattr(self, name)} cannot be negative")
