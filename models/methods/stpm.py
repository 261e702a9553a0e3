"""STPM: a student network learns the frozen teacher's feature pyramid on normal images.

Source: "Student-Teacher Feature Pyramid Matching for Anomaly Detection" (Wang et al., BMVC 2021).
Teacher: a pretrained network, stages 1 to 3; student: the same architecture from random weights.
The score multiplies the stages' maps, so a position is anomalous where all scales disagree.

| paper | here | meaning |
| --- | --- | --- |
| F_t, F_s | teacher, student | maps (B, C_l, H_l, W_l) of stage l, unit length at each position |
| l_l(I_k)_ij | stage maps | half the squared distance of the two, eq. 1 |
| L | loss | mean over positions, summed over stages, eq. 2 and 3 |
| Omega(J) | map | product of the stages' maps, each upsampled to the image, eq. 4 |
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.options import Fraction, MethodOptions, NotNegative, Positive, PositiveInt
from models.backbone.extractor import channels_first
from models.backbone.rewriting import accelerated
from models.backbone.weights import load_backbone
from models.deployment.memory import normalised_pixels
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.method import Method
from models.training.hold_out import hold_out
from models.training.loop import Loop

EXAMPLE_SIDE = 224
"""Pixels of the image by which networks are rewritten for export."""


@dataclass(frozen=True, kw_only=True)
class StpmOptions(MethodOptions):
    """STPM: a student learns the frozen teacher's pyramid on normal images."""

    learning_rate: Positive = 0.4
    """Of SGD (paper, section 4)."""
    momentum: Fraction = 0.9
    """Of SGD (paper)."""
    weight_decay: NotNegative = 1e-4
    """Of SGD (paper)."""
    batch_size: PositiveInt = 32
    """Images per step (paper)."""
    epochs: PositiveInt = 100
    """Passes over the training images (paper)."""
    validation_share: Fraction = 0.2
    """Normal training images held out; the epoch of least loss on them is kept (paper: 0.2), the
    last with 0."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


class Stpm(Detector):
    """Student and teacher on images; anomalous where their pyramids differ.

    The student trains with batch statistics and scores with running ones; the teacher never leaves
    eval mode. A share of the normal images is held out and the epoch of least loss on them is kept,
    as published: no anomaly takes part. `diagnostics` says which epoch that was, "kept_epoch".
    """

    def __init__(self, features: FeatureShape, options: StpmOptions) -> None:
        super().__init__()
        assert features.backbone is not None
        self.options = options
        # In a tuple, so that its weights are not part of this head.
        self._teacher = (features.backbone,)
        self.student = copy.deepcopy(features.backbone.net).requires_grad_(True)
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the student from random weights; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: too few images to hold any out, or to train on.
        """
        options = self.options
        self._initialise(generator)
        training, held = self._hold_out(bank, generator)
        optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=options.learning_rate,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        loop = Loop(
            module=self.student,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            mixed_precision=options.mixed_precision,
        )
        trained = loop.run(
            lambda: training.batches(options.batch_size, generator=generator),
            lambda images: {"loss": self._loss(images)},
            monitor=monitor,
            validate=None if held is None else functools.partial(self._validate, held),
        )
        self.diagnostics = {"kept_epoch": [float(trained.epoch)]}

    def stage_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield half the squared distance of teacher and student, (B, H_l, W_l), of each stage."""
        (teacher,) = self._teacher
        pixels = teacher.pixels(images)
        with torch.no_grad():
            taught = channels_first(teacher.net, teacher.net(pixels))
        learning = channels_first(self.student, self.student(pixels))
        for wanted, learned in zip(taught, learning, strict=True):
            difference = F.normalize(wanted.float(), dim=1) - F.normalize(learned.float(), dim=1)
            yield difference.square().sum(dim=1) / 2  # (B, H_l, W_l)

    def forward(self, images: Tensor) -> Tensor:
        """Return the product of the stages' maps at the size of the images, (B, S, S)."""
        product = torch.ones(len(images), *images.shape[2:], device=images.device)
        for stage_map in self.stage_maps(images):
            whole = F.interpolate(stage_map[:, None], images.shape[2:], mode="bilinear")
            product = product * whole[:, 0]  # (B, S, S)
        return product

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch, and the last one counts; see `Detector.stopped_at`."""
        return {"epochs": step, "validation_share": 0.0}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def _initialise(self, generator: torch.Generator) -> None:
        """Give the student random weights, those timm draws for its architecture."""
        (teacher,) = self._teacher
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # a GPU's stays as it is
            fresh = load_backbone(
                teacher.backbone, "random", teacher.layers, teacher.feature_location
            )
        self.student.load_state_dict(fresh.net.state_dict())

    def _hold_out(
        self, bank: FeatureSource, generator: torch.Generator
    ) -> tuple[FeatureSource, FeatureSource | None]:
        """Split the images into those trained on and those that choose the epoch."""
        training, held = hold_out(bank, self.options.validation_share, generator)
        if len(training) == 0:
            raise ModelError(
                f"the validation share {self.options.validation_share} leaves no image to train on",
                {"validation_share": "lower"},
            )
        return training, held

    def _loss(self, images: Tensor) -> Tensor:
        """Return the mean over images and positions, summed over the stages."""
        return torch.stack([stage_map.mean() for stage_map in self.stage_maps(images)]).sum()

    def _validate(self, held: FeatureSource) -> Tensor:
        batches = held.batches(self.options.batch_size)
        losses = [self._loss(images) * len(images) for images in batches]
        return torch.stack(losses).double().sum() / len(held)


class _Exported(nn.Module):
    """`Stpm` with teacher and student side by side."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Stpm) -> None:
        super().__init__()
        (teacher,) = detector._teacher
        self.register_buffer("mean", teacher.mean)
        self.register_buffer("std", teacher.std)
        # Of any size: it shows which layer follows which.
        pixels = torch.zeros(1, 3, EXAMPLE_SIDE, EXAMPLE_SIDE)
        self.teacher = accelerated(teacher.net, pixels)
        self.student = accelerated(detector.student, pixels)

    def forward(self, images: Tensor) -> Tensor:
        """Return maps (B, S, S) of uint8 images (B, 3, S, S)."""
        pixels = normalised_pixels(images, self.mean, self.std)
        pyramids = [channels_first(net, net(pixels)) for net in (self.teacher, self.student)]
        maps = []
        for wanted, learned in zip(*pyramids, strict=True):
            difference = F.normalize(wanted, dim=1) - F.normalize(learned, dim=1)
            stage_map = difference.square().sum(dim=1, keepdim=True) / 2  # (B, 1, H_l, W_l)
            maps.append(F.interpolate(stage_map, images.shape[2:], mode="bilinear"))
        return torch.cat(maps, dim=1).prod(dim=1)  # (B, S, S)


METHOD = Method(
    detector=lambda: Stpm,
    options=StpmOptions(),
    tasks=frozenset({"structured"}),
    takes=frozenset({"images"}),
    published_as="STPM",
    # Paper: whole images of 256, the product of the maps unblurred.
    experiment={
        "structured": {"image_size": 256, "crop_size": None, "patch_size": 1, "blur_sigma": 0.0}
    },
)
