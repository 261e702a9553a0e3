"""Experiments on semantic data: an image of another class is the anomaly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.cache import cache_folder
from configs.experiment import Experiment
from configs.methods import method_config

# NoCo's semantic pipeline: ResNet152, last stage, 256 by Pillow's bilinear filter, crop 224.
RESNET152 = {"backbone": "resnet152.tv_in1k", "layers": (4,)}
IMAGES = {"image_size": 256, "crop_size": 224, "resize": "bilinear_shorter"}
# Digits must run where nothing can be downloaded, and 8 x 8 pixels need no 256.
SMALL_IMAGES = {"image_size": 96, "crop_size": None, "resize": "bilinear_shorter"}

COLOUR: dict[str, dict[str, Any]] = {
    "cifar10": {"data_root": Path("data/cifar10"), **RESNET152, **IMAGES},
    "cifar100": {"data_root": Path("data/cifar100"), **RESNET152, **IMAGES},
    "cifar100_coarse": {"data_root": Path("data/cifar100"), **RESNET152, **IMAGES},
    "cats_vs_dogs": {"data_root": Path("data/cats_vs_dogs"), **RESNET152, **IMAGES},
    "folder": {"data_root": Path("data/folder"), **RESNET152, **IMAGES},
}
"""Data sets of train_cifar10.py."""

GREY: dict[str, dict[str, Any]] = {
    "digits": {
        "backbone": "tf_efficientnet_lite0",
        "layers": (4,),
        **SMALL_IMAGES,
    },
    "mnist": {"data_root": Path("data/mnist"), **RESNET152, **IMAGES},
    "fashion_mnist": {"data_root": Path("data/fashion_mnist"), **RESNET152, **IMAGES},
}
"""Data sets of train_mnist.py; the first is the default and needs no download."""

DATASETS = COLOUR | GREY

# Deep SVDD (paper, section 4.2) trains a LeNet of its own on images of the data sets' own size.
LENET_IMAGES: dict[bool, dict[str, Any]] = {
    grey: {"backbone": "lenet", "layers": (0,), "image_size": size, "crop_size": None}
    for grey, size in ((False, 32), (True, 28))
}
"""Whether the images are grey -> what Deep SVDD changes."""

NO_ROTATIONS = frozenset({"digits", "mnist"})
"""Where a turned image is no anomaly (0, 8; 6 and 9), so that nothing can be chosen on it."""


@dataclass(frozen=True, kw_only=True)
class SemanticExperiment(Experiment):
    """Globally pooled features, a 1 x 1 grid; the score is the map itself."""

    protocol: Literal["one-vs-rest", "leave-one-out"] = "one-vs-rest"
    """One class is normal and the rest anomalous, or all classes but one are normal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select == "synthetic" and self.dataset in NO_ROTATIONS:
            raise ValueError(
                "--select synthetic makes semantic anomalies by rotation, and a turned digit is no "
                "anomaly (0, 8; 6 and 9): use --select last"
            )


def semantic_experiment(dataset: str, method: str) -> SemanticExperiment:
    """Compose the preset of a data set and a method."""
    entry = {"data_root": cache_folder(), **DATASETS[dataset]}  # digits have no folder of their own
    if method == "deep_svdd":
        entry |= LENET_IMAGES[dataset in GREY]
    if method == "noco_cf" and dataset not in NO_ROTATIONS:
        entry["select"] = "synthetic"
    return SemanticExperiment(
        dataset=dataset,
        method_name=method,
        method=method_config(method, dataset, semantic=True),
        **entry,
    )
