"""The methods' options, and the presets the command line calls by name."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from configs.options import OptionalInt, require_positive
from configs.simplenet import SIMPLENET, SIMPLENET_SEMANTIC, SimpleNetConfig


@dataclass(frozen=True, kw_only=True)
class NocoConfig:
    """NoCo: linear projector, one random objective of fixed norm, distance as the score."""

    norm: float = 1.0
    """Euclidean norm of the objective G (paper: about 1 is best for both kinds of task)."""
    objective: Literal["randn", "rand", "ones", "mean"] = "randn"
    """How G is drawn before it is scaled (paper's ablation of objective types; default randn)."""
    out_dim: OptionalInt = None
    """Outputs of the projector; none for as many as features have channels (paper)."""
    loss: Literal["distance", "squared"] = "distance"
    """Distance of Z to G, or its square; the score is the same quantity."""
    nu: float = 1e-3
    """Divisor of the loss (released code: 1e-3 structured, 1 semantic)."""
    radius_init: float = 1e-5
    """The learnable margin r before training (released code)."""
    radius_weight: float = 0.0
    """Adds radius_weight * r to the loss (released CIFAR script: 1e3)."""
    learning_rate: float = 1e-4
    """Of AdamW (released code: 1e-4 structured, 1e-3 semantic)."""
    weight_decay: float = 5e-4
    """Of AdamW (released code)."""
    amsgrad: bool = True
    """Use AdamW's amsgrad variant (released code)."""
    batch_size: int = 16
    """Images per step (released code: 16 MVTec, 8 MPDD and VisA, 64 semantic)."""
    epochs: int = 50
    """Passes over the training features (released code: 50, CIFAR 10, MNIST 20)."""

    def __post_init__(self) -> None:
        require_positive(self, "norm", "nu", "learning_rate", "batch_size", "epochs")
        if self.out_dim is not None and self.out_dim < 1:
            raise ValueError(f"--method.out-dim {self.out_dim} must be at least 1, or none")


MethodConfig = NocoConfig | SimpleNetConfig

METHODS: dict[str, MethodConfig] = {
    "noco": NocoConfig(),
    **SIMPLENET,
}
"""Method name on the command line -> its published settings for MVTec."""

SEMANTIC: dict[str, dict[str, Any]] = {
    "noco": {
        "loss": "squared",
        "nu": 1.0,
        "learning_rate": 1e-3,
        "batch_size": 64,
        "epochs": 10,
    },
    **SIMPLENET_SEMANTIC,
}
"""What the released semantic scripts change, whatever the data set."""

PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("mpdd", "noco"): {"batch_size": 8},
    ("visa", "noco"): {"batch_size": 8},
    # The released CIFAR script adds 1e3 * r to the loss; it serves these data sets.
    ("cifar10", "noco"): {"radius_weight": 1e3},
    ("cifar100", "noco"): {"radius_weight": 1e3},
    ("cifar100_coarse", "noco"): {"radius_weight": 1e3},
    ("cats_vs_dogs", "noco"): {"radius_weight": 1e3},
    ("mnist", "noco"): {"epochs": 20},
    ("fashion_mnist", "noco"): {"epochs": 20},
    ("digits", "noco"): {"epochs": 20},
}
"""What a paper or its released code states for one data set and method."""


def method_config(method: str, dataset: str, *, semantic: bool) -> MethodConfig:
    """Compose the preset of a method for a data set."""
    changes = {**(SEMANTIC.get(method, {}) if semantic else {}), **PAIRS.get((dataset, method), {})}
    return dataclasses.replace(METHODS[method], **changes)
