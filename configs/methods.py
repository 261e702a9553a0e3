"""The methods' options, and the presets the command line calls by name."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from configs.baselines import (
    KnnConfig,
    MahalanobisConfig,
    PadimConfig,
    PatchCoreConfig,
    StpmConfig,
)
from configs.fine_tuning import DeepSvddConfig, MeanShiftedConfig, PandaConfig
from configs.libraries import AnomalibConfig
from configs.options import FeatureOptions, OptionalInt, require_positive
from configs.simplenet import SIMPLENET, SIMPLENET_SEMANTIC, SimpleNetConfig


@dataclass(frozen=True, kw_only=True)
class NocoConfig(FeatureOptions):
    """NoCo: linear projector, one random objective of fixed norm, distance as the score."""

    solver: Literal["sgd", "closed_form"] = "sgd"
    """Train by AdamW as published, or solve exactly in one pass (options below say whose)."""
    norm: float = 1.0
    """Euclidean norm of the objective G (paper: about 1 is best for both kinds of task)."""
    objective: Literal["randn", "rand", "ones", "mean"] = "randn"
    """How G is drawn before it is scaled (paper's ablation; sgd)."""
    out_dim: OptionalInt = None
    """Outputs of the projector; none for as many as features have channels (paper; sgd)."""
    loss: Literal["distance", "squared"] = "distance"
    """Distance of Z to G, or its square; the score is the same quantity."""
    nu: float = 1e-3
    """Divisor of the loss (released code: 1e-3 structured, 1 semantic; sgd)."""
    radius_init: float = 1e-5
    """The learnable margin r before training (released code; sgd)."""
    radius_weight: float = 0.0
    """Adds radius_weight * r to the loss (released CIFAR script: 1e3; sgd)."""
    learning_rate: float = 1e-4
    """Of AdamW (released code: 1e-4 structured, 1e-3 semantic; sgd)."""
    weight_decay: float = 5e-4
    """Of AdamW (released code; sgd)."""
    amsgrad: bool = True
    """Use AdamW's amsgrad variant (released code; sgd)."""
    batch_size: int = 16
    """Images per step (released code: 16 MVTec, 8 MPDD and VisA, 64 semantic; sgd)."""
    epochs: int = 50
    """Passes over the training features (released code: 50, CIFAR 10, MNIST 20; sgd)."""
    time: tuple[float, ...] = (1e4,)
    """Training times t, s = t / trace(C); each is visited, the last is `last` (closed_form)."""
    prototypes: int = 1
    """Centres of normal features with a second moment each; 1 is the plain method (closed_form)."""
    nearest: int = 3
    """Centres each feature is compared with (closed_form)."""
    kmeans_positions: int = 20_000
    """Normal features the centres are found on (closed_form)."""
    sample_w0: bool = False
    """Draw one initial projector instead of the expectation over it (closed_form)."""

    def __post_init__(self) -> None:
        require_positive(self, "norm", "nu", "learning_rate", "batch_size", "epochs")
        require_positive(self, "prototypes", "nearest", "kmeans_positions")
        if not self.weight_decay >= 0:
            raise ValueError(f"--method.weight-decay {self.weight_decay} cannot be negative")
        if not self.time or list(self.time) != sorted(set(self.time)) or self.time[0] <= 0:
            raise ValueError(f"--method.time {self.time} must be ascending and above 0")
        if self.out_dim is not None and self.out_dim < 1:
            raise ValueError(f"--method.out-dim {self.out_dim} must be at least 1, or none")


MethodConfig = (
    NocoConfig
    | SimpleNetConfig
    | PatchCoreConfig
    | PadimConfig
    | KnnConfig
    | MahalanobisConfig
    | StpmConfig
    | DeepSvddConfig
    | PandaConfig
    | MeanShiftedConfig
    | AnomalibConfig
)

METHODS: dict[str, MethodConfig] = {
    "noco": NocoConfig(),
    # Ours: the exact solution, prototypes for local features, the time chosen without the test set.
    "noco_cf": NocoConfig(
        solver="closed_form",
        time=(1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4, 1e5),
        prototypes=32,
    ),
    **SIMPLENET,
    "patchcore": PatchCoreConfig(),
    "padim": PadimConfig(),
    "knn": KnnConfig(),
    "mahalanobis": MahalanobisConfig(),
    "stpm": StpmConfig(),
    "deep_svdd": DeepSvddConfig(),
    "panda": PandaConfig(),
    "panda_ewc": PandaConfig(variant="ewc", epochs=50),  # released command
    "mean_shifted": MeanShiftedConfig(),
    "anomalib:NAME": AnomalibConfig(),  # NAME stands for any of its models
}
"""Method name on the command line -> its published settings for MVTec."""

STRUCTURED_ONLY = frozenset({"stpm"})
SEMANTIC_ONLY = frozenset({"deep_svdd", "panda", "panda_ewc", "mean_shifted"})
"""Methods whose papers compare one kind of task, and whose score has no meaning in the other."""
STRUCTURED_METHODS = tuple(name for name in METHODS if name not in SEMANTIC_ONLY)
SEMANTIC_METHODS = tuple(name for name in METHODS if name not in STRUCTURED_ONLY)
"""Methods of train_mvtec.py, and of the other two scripts; the first is the default."""

OF_FEATURES = ("precision", "compile", "patch_size")
"""Options of the feature extraction that methods without one have no use for."""
UNUSED: dict[str, tuple[str, ...]] = {
    "stpm": OF_FEATURES,
    "panda": OF_FEATURES,
    "panda_ewc": OF_FEATURES,
    "mean_shifted": OF_FEATURES,
    "deep_svdd": (*OF_FEATURES, "backbone", "weights", "layers", "feature_location"),
    "anomalib:NAME": (*OF_FEATURES, "blur_sigma"),
}
"""Options of the experiment that do nothing for a method: changing them is refused."""

SEMANTIC: dict[str, dict[str, Any]] = {
    "noco": {
        "loss": "squared",
        "nu": 1.0,
        "learning_rate": 1e-3,
        "batch_size": 64,
        "epochs": 10,
    },
    # Pooled features: the norm is nuisance and one centre is enough.
    "noco_cf": {
        "feature_norm": "l2",
        "prototypes": 1,
        "time": (1e1, 1e2, 1e3, 1e4),
        "loss": "squared",
    },
    **SIMPLENET_SEMANTIC,
    "knn": {"max_positions": None},  # DN2 keeps every image
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
    **{
        (dataset, "deep_svdd"): {"network": "mnist"}
        for dataset in ("mnist", "fashion_mnist", "digits")
    },
    ("digits", "noco"): {"epochs": 20},
}
"""What a paper or its released code states for one data set and method."""


def key_of(method: str) -> str:
    """Return a method's key in the tables above: `anomalib:patchcore` stands under anomalib:NAME.

    Raises:
        KeyError: there is no such method.
    """
    library, _, model = method.partition(":")
    key = f"{library}:NAME" if model else method
    if key not in METHODS:
        raise KeyError(method)
    return key


def method_config(method: str, dataset: str, *, semantic: bool) -> MethodConfig:
    """Compose the preset of a method for a data set."""
    changes = {**(SEMANTIC.get(method, {}) if semantic else {}), **PAIRS.get((dataset, method), {})}
    return dataclasses.replace(METHODS[key_of(method)], **changes)
