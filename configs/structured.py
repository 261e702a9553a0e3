"""Experiments on structured data: a defect is a part of the image."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.cache import cache_folder
from configs.experiment import Experiment
from configs.methods import key_of, method_config, require_positive
from configs.simplenet import SIMPLENET_STRUCTURED

# The published pipeline: NoCo resizes MVTec with OpenCV, MPDD and VisA with Lanczos; crop 224.
WIDE_RESNET = {"backbone": "wide_resnet50_2.tv_in1k", "layers": (1, 2, 3)}
MVTEC_IMAGES = {"image_size": 256, "crop_size": 224, "resize": "opencv_square"}
LANCZOS_IMAGES = {"image_size": 256, "crop_size": 224, "resize": "lanczos_shorter"}
# No published crop binds a user's own images, and a crop can cut defects away.
WHOLE_IMAGES = {"image_size": 224, "crop_size": None, "resize": "opencv_square"}

DATASETS: dict[str, dict[str, Any]] = {
    "mvtec": {"data_root": Path("data/mvtec"), **WIDE_RESNET, **MVTEC_IMAGES},
    "mpdd": {"data_root": Path("data/mpdd"), **WIDE_RESNET, **LANCZOS_IMAGES},
    "visa": {"data_root": Path("data/visa"), **WIDE_RESNET, **LANCZOS_IMAGES},
    "folder": {"data_root": Path("data/folder"), **WIDE_RESNET, **WHOLE_IMAGES},
    # The demo has to run where nothing can be downloaded.
    "demo": {
        "backbone": "tf_efficientnet_lite0",
        "layers": (1, 2, 3),
        **WHOLE_IMAGES,
    },
}

EXPERIMENT_CHANGES: dict[str, dict[str, Any]] = {
    # Prototypes are measured on the strides 8 and 16; the stem's neighbour adds cost, not accuracy.
    "noco_cf": {"layers": (2, 3), "select": "synthetic"},
    **SIMPLENET_STRUCTURED,
    "patchcore": {"layers": (2, 3)},  # paper, section 4.2
    "knn": {"layers": (2, 3)},  # ours: with stage 1 every image costs four times as much
    "padim": {"patch_size": 1},  # paper: the stages' maps as they are
    # Paper: whole images of 256, the product of the maps unblurred.
    "stpm": {"image_size": 256, "crop_size": None, "patch_size": 1, "blur_sigma": 0.0},
    "anomalib:NAME": {"layers": (2, 3), "patch_size": 1, "blur_sigma": 0.0},
}
"""What a method changes in the experiment itself: layers, sizes."""


@dataclass(frozen=True, kw_only=True)
class StructuredExperiment(Experiment):
    """Anomaly maps on the grid of patch features; image score = maximum of the map."""

    patch_size: int = 3
    """Side of the neighbourhood each feature is averaged over (papers: 3)."""
    blur_sigma: float = 4.0
    """Gaussian blur of the anomaly map, in pixels (papers: 4)."""
    visa_split: Literal["auto", "csv", "last100"] = "auto"
    """VisA: the official 1-class csv, or NoCo's last 100 normals; auto takes the csv if present."""
    save_maps: bool = False
    """Keep every anomaly map, and the masks, in the run folder (large)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "patch_size")
        if self.patch_size % 2 == 0:
            raise ValueError(f"--patch-size {self.patch_size} must be odd")
        if not 0 <= self.blur_sigma < math.inf:
            raise ValueError(f"--blur-sigma {self.blur_sigma} must be 0 (no blur) or above")


def structured_experiment(dataset: str, method: str) -> StructuredExperiment:
    """Compose the preset of a data set and a method."""
    changes = EXPERIMENT_CHANGES.get(key_of(method), {})
    entry = {"data_root": cache_folder(), **DATASETS[dataset], **changes}
    if DATASETS[dataset]["crop_size"] is None and changes.get("crop_size"):
        entry |= {"image_size": changes["crop_size"], "crop_size": None}  # images stay whole
    return StructuredExperiment(
        dataset=dataset,
        method_name=method,
        method=method_config(method, dataset, semantic=False),
        **entry,
    )
