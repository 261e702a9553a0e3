"""Every method under toy options, and what it is built, fitted and scored on."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from configs.options import MethodOptions
from models.building import build_detector, build_extractor
from models.detector import Extractor
from models.method import find_methods
from tests.models.banks import Bank, StagedBank, Stages, draw_images, seeded

NEED_FILES = ("anomalib:NAME", "saa")
"""Methods that no test has without a library, or networks, of the user's."""
FOUND = find_methods("structured") | find_methods("semantic")
METHODS = {name: method for name, method in FOUND.items() if name not in NEED_FILES}
BACKBONE = "test_resnet"
STAGES = (3, 5)
SHORT = {
    **{"epochs": 2, "pretrain_epochs": 1, "batch_size": 4, "report_every": 1},
    **{"time": (3.0, 10.0, 30.0), "prototypes": 3, "dims": 4, "max_positions": 40},
    "bottleneck": 2,
    "discriminator_width": 4,
    "memory_images": 3,
    "regions": 2,
    **{"coreset_ratio": 0.1, "dist_size": 9, "neighbourhood": 3, "mlp_width": 8},
    "temperature": 0.1,
    **{"patch_sizes": (16, 8), "strides": (8, 4), "samples_per_image": 1},
    **{"grid": 5, "encoder_layers": 1, "decoder_layers": 1, "feed_forward": 16},
    **{"blocks": 2, "width": 8, "train_views": 3, "views_per_step": 2, "test_views": 2, "steps": 2},
    **{"network_size": 32, "images_per_epoch": 8, "code_dim": 5, "samples": 2},
    **{"region_sizes": (4, 8), "items": 3},
    **{"steps_per_epoch": 2, "head_width": 8},
    **{"base_width": 8, "channel_multipliers": (1, 2), "attention_factors": (2,), "heads": 2},
    **{"diffusion_steps": 40, "start_step": 20, "sampling_step": 10},
    # With images held out the epoch of least loss on them is kept, which no shorter fit is.
    "validation_share": 0.0,
}
FURTHER: dict[str, list[dict[str, Any]]] = {
    "noco": [{"loss": "squared", "objective": "mean"}],
    "noco_exact": [
        {"loss": "squared"},
        {"prototypes": 1},
        {"prototypes": 1, "sample_w0": True},
        {"prototypes": 1, "feature_norm": "std"},
    ],
    "noco_cf": [
        {"filter": "flow", "parents": 2},
        {"normaliser": False, "shrinkage": 0.0, "nearest": 1},
        {"stages": "joined"},
        {"feature_norm": "l2_per_layer"},
    ],
    "uniad": [
        {"grid": None, "neighbourhood": 1, "image_score": "mean"},
        {"neighbourhood": None, "dropout": 0.0, "jitter": 0.0, "feature_norm": "std"},
    ],
    "differnet": [{"train_views": 1, "views_per_step": 1, "test_views": 1, "scales": 2}],
    "glow": [
        {"levels": 2, "noise": 0.0, "warmup_epochs": 0},
        {"image_score": "max", "feature_norm": "l2_per_layer"},
    ],
    "glow_images": [{"score": "typicality", "levels": 2}],
    "autoencoder": [{"loss": "l2", "crops": False, "image_score": "mean"}],
    "vae": [{"samples": 0, "image_score": "mean"}],
    "cutpaste": [
        {"representation": "patch", "classes": "scar", "crop": 24, "window": 16, "stride": 6},
        {"representation": "patch", "density": "per_position", "crop": 24, "window": 16},
    ],
    "riad": [{"copies": 2, "milestone": 1, "scales": 2, "image_score": "mean"}],
    "mnad": [{"memory": False}, {"image_score": "max", "mixing": 0.4}],
    "draem": [{"sspcab": True, "smooth_maps": True}],
    "edgrec": [{"released": True}],
    "memseg": [{"released": True, "foreground": "otsu", "scale_stages": False}],
    "ddad": [
        {"adaptation_epochs": 1, "eta": 0.0, "released_steps": True},
        {"dropout": 0.3, "pixel_weight": 7.0},
    ],
    "knn": [{"distance": "euclidean"}],
    "patchcore": [{"num_neighbors": 1}],
    "pni": [
        {"released": True, "channels": 5, "neighbour_channels": 3, "threshold": "emb"},
        {"mlp_layers": 1, "dist_size": 99, "feature_norm": "std"},
    ],
    "fapm": [
        {"num_neighbors": 1, "feature_norm": "l2_per_layer"},
        {"released": True, "far_ratio": 0.5},
    ],
    "simplenet": [{"adaptor": "mlp", "report_every": 2, "epochs": 3}],
    "nc_disc": [{"hidden": 9, "adaptor_bias": True, "feature_norm": "l2"}],
    # Trained so slowly that the radius of a fit before would count, were it left.
    "deep_svdd": [{"objective": "soft_boundary", "warmup_epochs": 1, "learning_rate": 1e-6}],
    "mean_shifted": [{"angular": True}],
    "mspba": [
        {"cluster_start": 2, "clusters": 3, "cluster_patches": 20, "max_positions": None},
        {"cluster_start": 1, "cluster_patches": 60, "released": True, "pixels": "backbone"},
    ],
}
CASES = {
    " ".join([name, *map(str, changes.values())]): (name, changes)
    for name in METHODS
    for changes in ({}, *FURTHER.get(name, []))
}


def draw_stages(count, seed=1):
    return [
        torch.randn(count, channels, side, side, generator=seeded(seed)).contiguous(
            memory_format=torch.channels_last
        )
        for channels, side in zip(STAGES, (6, 3), strict=True)
    ]


@dataclass(frozen=True)
class Case:
    """A method under some options, what it is built and fitted on, and a batch to be scored."""

    name: str
    options: MethodOptions
    extractor: Extractor | Stages
    bank: Bank
    stages: list[torch.Tensor]

    def made(self, **changes):
        return build_detector(self.name, self.extractor, replace(self.options, **changes))

    def fitted(self, **changes):
        detector = self.made(**changes)
        detector.fit(self.bank, generator=seeded())
        return detector

    @torch.inference_mode()
    def scored(self, detector):
        return [part for part in detector.score_stages(self.stages) if part is not None]

    @property
    def steps(self):
        """Numbers of the steps that a monitor is told of."""
        times = getattr(self.options, "time", (0,))
        last = getattr(self.options, "epochs", len(times))
        every = getattr(self.options, "report_every", 1)
        return [step for step in range(1, last + 1) if step % every == 0 or step == last]

    @property
    def is_random(self):
        one = getattr(self.options, "prototypes", 0) == 1
        plain = one and not getattr(self.options, "sample_w0", False)
        return not plain and self.name != "mahalanobis"


def prepared(name, changes, weights):
    method = METHODS[name]
    known = {entry.name for entry in fields(method.options)}
    short = {option: value for option, value in SHORT.items() if option in known}
    options = replace(method.options, **short | changes)
    if "images" not in method.takes:
        return Case(name, options, Stages(*STAGES), StagedBank(draw_stages(7)), draw_stages(4, 2))
    if "features" in method.takes:
        drawn = [draw_images(count, seed=seed, side=64) for count, seed in ((8, 1), (4, 2))]
        extractor = build_extractor(method, BACKBONE, (2, 3), weights=str(weights), patch_size=1)
        train, test = ([part.clone() for part in extractor.stage_maps(some)] for some in drawn)
        return Case(name, options, extractor, StagedBank(train), test)
    backbone = method.experiment.get("semantic", {}).get("backbone", BACKBONE)
    is_pooled = "structured" not in method.tasks
    extractor = build_extractor(
        method, backbone, (2, 4), weights=str(weights), pool="mean" if is_pooled else None
    )
    return Case(name, options, extractor, Bank(draw_images(7)), [draw_images(4, seed=2)])
