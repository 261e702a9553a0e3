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
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.detector import Detector, FeatureSource, Monitor
from models.errors import ModelError
from models.backbone.extractor import FrozenExtractor, channels_first
from models.training.mixed_precision import bfloat16_autocast
from models.methods.noco import mean_of_finite
from models.backbone.weights import load_backbone


class Stpm(Detector):
    """Student and teacher on images; anomalous where their pyramids differ.

    The student trains with batch statistics and scores with running ones; the teacher never leaves
    eval mode. A share of the normal images is held out and the epoch of least loss on them is kept,
    as published: no anomaly takes part. `diagnostics` says which epoch that was.

    Args:
        backbone: the teacher, and the architecture of the student.
        learning_rate: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        batch_size: images per step.
        epochs: passes over the training images.
        validation_share: of the normal images, held out; 0 keeps the last epoch.
        mixed_precision: train the student under bfloat16 autocast where a CUDA device computes in
            it; scores are float32.
    """

    takes: ClassVar[Literal["features", "images"]] = "images"

    def __init__(
        self,
        backbone: FrozenExtractor,
        *,
        learning_rate: float = 0.4,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        batch_size: int = 32,
        epochs: int = 100,
        validation_share: float = 0.2,
        mixed_precision: bool = True,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.validation_share = validation_share
        self.mixed_precision = mixed_precision
        self._teacher = (backbone,)  # in a tuple, so that its weights are not part of this head
        self.student = copy.deepcopy(backbone.net).requires_grad_(True)
        self._diagnostics: dict[str, list[float]] = {}
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self,
        bank: FeatureSource,
        *,
        generator: torch.Generator,
        monitor: Monitor | None = None,
    ) -> None:
        """Train the student from random weights; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: too few images to hold any out, or to train on.
        """
        self._initialise(generator)
        training, held = self._hold_out(bank, generator)
        optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        least, kept_epoch, kept = math.inf, self.epochs, None
        for epoch in tqdm(range(1, self.epochs + 1), desc="epochs", leave=False, disable=None):
            self.student.train()
            losses = []
            for images in training.batches(self.batch_size, generator=generator):
                with bfloat16_autocast(images.device, wanted=self.mixed_precision):
                    loss = self._loss(images)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            self.student.eval()
            values = {"loss": mean_of_finite(losses, epoch)}
            if held is not None:
                values["validation_loss"] = self._validate(held, epoch)
                if values["validation_loss"] < least:
                    least, kept_epoch = values["validation_loss"], epoch
                    kept = copy.deepcopy(self.student.state_dict())
            if monitor is not None:
                monitor(epoch, values)
        if kept is not None:
            self.student.load_state_dict(kept)
        self._diagnostics = {"kept_epoch": [float(kept_epoch)]}

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

    def diagnostics(self) -> dict[str, list[float]]:
        """Return the epoch that was kept, as "kept_epoch". Empty before `fit`."""
        return self._diagnostics

    def _initialise(self, generator: torch.Generator) -> None:
        """Give the student random weights, those timm draws for its architecture."""
        (teacher,) = self._teacher
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = load_backbone(
                teacher.backbone, "random", teacher.layers, teacher.feature_location
            )
        self.student.load_state_dict(fresh.net.state_dict())

    def _hold_out(
        self, bank: FeatureSource, generator: torch.Generator
    ) -> tuple[FeatureSource, FeatureSource | None]:
        """Split the images into those trained on and those that choose the epoch."""
        num_held = round(self.validation_share * len(bank))
        if num_held == 0:
            return bank, None
        if num_held == len(bank):
            raise ModelError(
                f"--method.validation-share {self.validation_share} leaves no image to train on"
            )
        order = torch.randperm(len(bank), generator=generator)
        return bank.subset(order[num_held:]), bank.subset(order[:num_held])

    def _loss(self, images: Tensor) -> Tensor:
        """Return the mean over images and positions, summed over the stages."""
        return torch.stack([stage_map.mean() for stage_map in self.stage_maps(images)]).sum()

    @torch.no_grad()
    def _validate(self, held: FeatureSource, epoch: int) -> float:
        losses = [self._loss(images) * len(images) for images in held.batches(self.batch_size)]
        return mean_of_finite(losses, epoch) * len(losses) / len(held)
