"""MemSeg: a network that sees how images differ from normal ones learns to find drawn anomalies.

Source: "MemSeg: A semi-supervised method for image surface defect detection using differences and
commonalities" (Yang, Wu, Liu and Feng, 2022, arXiv 2205.00908). Its authors released no code;
values below are those of the public reimplementation (TooTouch/MemSeg), and of the paper only where
that quotes it. Features of some normal images are remembered. Of an image's features and their
squared difference to the nearest remembered image's, a decoder makes the mask of what was drawn.

| paper | here | meaning |
| --- | --- | --- |
| M | memory_0, ... | features of remembered images, of each stage but the first and the last |
| DI | differences | squared, to the nearest remembered image |
| CI | joined | features and differences |
| M_p, M_n | perlin_mask, find_foreground | where an anomaly may be drawn |
| delta | OPACITY | of what is drawn |
| S_hat | forward | probability that a pixel is anomalous |

The nearest is that of least mean squared difference, summed over the stages. The first of
`--layers` joins the decoder late, the last is where it starts; with two there is no early one.

Ours: each stage's maps are divided by their standard deviation in the memory (`scale_stages`).
Products of squared differences weigh what the decoder sees; those of the unscaled outputs of an
EfficientNet-Lite0's blocks reach a million (measured), and little is learned from them. Ours too:
everything but the last stage stays as it was pretrained. The reimplementation also trains the stem
while the memory stays that of the pretrained one, and lets the statistics of all norms move, so
that images and memory drift apart; `released` repeats this, and its grid of 8 x 8 parts with
DRAEM's augmenters where the paper mirrors, turns and recolours an image and has 4 x 8. Not
repeated: thresholds of the foreground chosen by hand for nine categories of MVTec AD, and the step
chosen by the test set (`--select best_test` does that). Anomalies are drawn after the crop.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import (
    Fraction,
    MethodOptions,
    NotNegative,
    OptionalImages,
    OptionalInt,
    Positive,
    PositiveInt,
)
from models.deployment.memory import normalised_pixels
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.method import Method
from models.methods.memseg.drawing import draw_training_image
from models.methods.memseg.exported import Exported
from models.methods.memseg.memory import deviations, squared_differences
from models.methods.memseg.networks import Decoder, Fusion, PartlyTrained
from models.training.convolutions import initialise
from models.training.drawn import drawn_batches
from models.training.focal import focal_loss
from models.training.loop import Loop, Losses
from models.training.rates import warmed_cosine
from models.training.textures import texture_remark, textures_of

GAMMA = 4.0
"""Of the focal loss (reimplementation)."""
WARMUP = 0.1
"""Part of the steps in which the learning rate rises (reimplementation)."""
READ = 8
"""Images whose features are remembered at once."""


@dataclass(frozen=True, kw_only=True)
class MemsegOptions(MethodOptions):
    """MemSeg: drawn anomalies are segmented by how they differ from remembered images."""

    anomaly_source: OptionalImages = None
    """Folder of textures to draw, with all below it (paper: DTD); none for the suite's own set,
    which needs no download."""
    anomalous_share: Fraction = 0.5
    """Of the training images that get an anomaly (reimplementation: every second one)."""
    foreground: Literal["all", "otsu"] = "all"
    """Where anomalies may be drawn: anywhere, or (objects) on what Otsu's threshold parts from the
    background."""
    memory_images: PositiveInt = 30
    """Normal images that are remembered (reimplementation); all, where there are fewer."""
    scale_stages: bool = True
    """Divide each stage's maps by their standard deviation in the memory (ours; reimplementation:
    off), so that any backbone does."""
    l1_weight: NotNegative = 0.6
    """Of the absolute difference of probability and mask (reimplementation)."""
    focal_weight: NotNegative = 0.4
    """Of the focal loss (reimplementation)."""
    score_pixels: PositiveInt = 100
    """Highest pixels of the map whose mean is an image's score (reimplementation)."""
    released: bool = False
    """Train the stem too and let all norms' statistics move, and disorder images as the
    reimplementation does."""
    learning_rate: Positive = 3e-3
    """Of AdamW, after a tenth of the steps in which it rises; then it falls by a cosine
    (reimplementation; as we remember the paper: 0.04)."""
    least_learning_rate: NotNegative = 1e-4
    """Where it starts and ends (reimplementation)."""
    weight_decay: NotNegative = 5e-4
    """Of AdamW (reimplementation)."""
    batch_size: PositiveInt = 8
    """Images per step (reimplementation)."""
    steps_per_epoch: PositiveInt = 100
    """Steps of an epoch, in which the training images are passed as often as it takes
    (reimplementation: it looks at the scores after so many)."""
    epochs: PositiveInt = 50
    """Of that many steps (reimplementation: 5000 steps in all)."""
    schedule_epochs: OptionalInt = None
    """Epochs over which the learning rate rises and falls; none for all of `epochs`."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


class Memseg(Detector):
    """A memory of normal features, and a decoder that is trained on drawn anomalies.

    Attributes:
        encoder: a copy of the backbone.
        memory_0: features of the finest remembered stage at each position of each remembered image,
            (M * H * W, C); memory_1 and further those of the next ones.
        remembered: M, one number.
        scales: that each stage's maps are divided by.
        remarks: which textures were drawn, and whether fewer images are remembered.
    """

    remembered: Tensor
    scales: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, features: FeatureShape, options: MemsegOptions) -> None:
        super().__init__()
        assert features.backbone is not None
        self.options = options
        # In a tuple, so that its weights are not part of this head.
        self._backbone = (features.backbone,)
        self.encoder = PartlyTrained(features.backbone, stem_too=options.released)
        channels = features.backbone.stage_channels
        self.has_stem = len(channels) > 2
        widths = channels[1:-1] if self.has_stem else channels[:1]
        self.fusion = Fusion(widths)
        self.decoder = Decoder(channels[0] if self.has_stem else None, widths, channels[-1])
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(features.backbone, name).clone(), persistent=False)
        self.sized_by_fit = tuple(f"memory_{index}" for index in range(len(widths)))
        for name, width in zip(self.sized_by_fit, widths, strict=True):
            self.register_buffer(name, torch.zeros(0, width))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.int64))
        self._count = 0  # what `remembered` holds: to read that waits for the device
        self.register_buffer("scales", torch.ones(len(channels)))
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Remember some images, then train; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: there are no textures.
        """
        options = self.options
        textures = textures_of(options.anomaly_source)
        self.remarks = [texture_remark(textures)]
        self.encoder.net.load_state_dict(self._backbone[0].net.state_dict())
        initialise(self.fusion, generator)
        initialise(self.decoder, generator)
        self._remember(bank, generator)

        def draw(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            return draw_training_image(
                image,
                textures,
                rng,
                anomalous=options.anomalous_share,
                foreground=options.foreground,
                released=options.released,
            )

        def batches() -> Iterator[tuple[Tensor, ...]]:
            passes = (
                drawn_batches(bank, options.batch_size, draw, generator) for _ in itertools.count()
            )
            return itertools.islice(itertools.chain.from_iterable(passes), options.steps_per_epoch)

        Loop(
            module=self,
            optimizer=torch.optim.AdamW(
                [p for p in self.parameters() if p.requires_grad],
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
            ),
            epochs=options.epochs,
            generator=generator,
            rate=self._rate,
            steps=options.steps_per_epoch,
            mixed_precision=options.mixed_precision,
        ).run(batches, lambda batch: self.losses(*batch[1:]), monitor=monitor)

    def losses(self, images: Tensor, masks: Tensor) -> Losses:
        """Return the terms of the loss, each a scalar.

        Args:
            images: (B, 3, S, S) uint8.
            masks: (B, S, S) bool: where they are anomalous.
        """
        options = self.options
        logits = self._logits(images, self._memories()).float()
        found = {
            "l1": options.l1_weight * F.l1_loss(logits.softmax(dim=1)[:, 1], masks.float()),
            "focal": options.focal_weight * focal_loss(logits, masks, gamma=GAMMA),
        }
        return {"loss": found["l1"] + found["focal"], **found}

    def forward(self, images: Tensor) -> Tensor:
        """Return the probability that a pixel is anomalous, (B, S, S), of uint8 (B, 3, S, S)."""
        return self.score(images)[0]

    def score(self, images: Tensor) -> Scored:
        """Return these maps, and the means of their highest pixels, (B,).

        Raises:
            ModelError: the images are not of the size that was remembered, or nothing was.
        """
        return self.scored(images, self._memories())

    def scored(self, images: Tensor, memories: Sequence[Tensor]) -> Scored:
        """Return what `score` does, by memories (M, H_l * W_l * C_l) of the stages."""
        maps = self._logits(images, memories).softmax(dim=1)[:, 1]  # (B, S, S)
        pixels = maps.flatten(1)
        count = min(self.options.score_pixels, pixels.shape[1])
        return maps, pixels.topk(count, dim=1).values.mean(dim=1)

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step, "schedule_epochs": self._schedule_epochs}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return Exported(self, self._memories())

    @property
    def _schedule_epochs(self) -> int:
        return self.options.schedule_epochs or self.options.epochs

    def _rate(self, passed: float) -> float:
        """Return the factor of the learning rate in the step after `passed` epochs."""
        least = self.options.least_learning_rate / self.options.learning_rate
        part = (passed + 1 / self.options.steps_per_epoch) / self._schedule_epochs
        return warmed_cosine(part, warmup=WARMUP, least=least)

    @torch.no_grad()
    def _remember(self, bank: FeatureSource, generator: torch.Generator) -> None:
        """Keep the features of images drawn at random, and the scales of all stages."""
        wanted = self.options.memory_images
        if len(bank) < wanted:
            self.remarks.append(
                f"all {len(bank)} images are remembered: there are fewer than "
                f"--method.memory-images {wanted}"
            )
        rows = torch.randperm(len(bank), generator=generator)[:wanted]
        self.scales.fill_(1)
        if self.options.scale_stages:
            chosen = bank.subset(rows)
            self.scales.copy_(deviations(self._maps(one) for one in chosen.batches(READ)))
        found: list[list[Tensor]] = []
        for images in bank.subset(rows).batches(READ):
            _, levels, _ = self._stages(images)
            found.append([rearrange(one, "b c h w -> (b h w) c") for one in levels])
        for name, parts in zip(self.sized_by_fit, zip(*found, strict=True), strict=True):
            setattr(self, name, torch.cat(parts).float())
        self._count = len(rows)
        self.remembered.fill_(self._count)

    def _memories(self) -> list[Tensor]:
        """Return the remembered features of the stages, (M, H_l * W_l * C_l) each."""
        if self._count == 0:
            raise ModelError("there are no remembered images to compare with: fit or load first")
        return [self.get_buffer(name).view(self._count, -1) for name in self.sized_by_fit]

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        """Also take how many images are remembered."""
        super()._load_from_state_dict(*arguments, **options)
        self._count = int(self.remembered)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Return the scaled maps of all stages."""
        maps = self.encoder(normalised_pixels(images, self.mean, self.std))
        return [one / scale for one, scale in zip(maps, self.scales, strict=True)]

    def _stages(self, images: Tensor) -> tuple[Tensor | None, list[Tensor], Tensor]:
        """Return the maps of the stem, of the remembered stages, and the deepest."""
        maps = self._maps(images)
        if self.has_stem:
            return maps[0], maps[1:-1], maps[-1]
        return None, maps[:-1], maps[-1]

    def _logits(self, images: Tensor, memories: Sequence[Tensor]) -> Tensor:
        """Return logits (B, 2, S, S) of uint8 images (B, 3, S, S)."""
        deepest = max(self._backbone[0].strides)
        if self.training and len(images) == 1 and images.shape[-1] <= deepest:
            raise ModelError(
                f"a step on a single image of {images.shape[-1]} pixels has no batch statistics: "
                "set a larger --image-size",
                {"batch_size": "or choose another"},
            )
        stem, levels, deep = self._stages(images)
        differences = squared_differences(levels, memories)
        fused = self.fusion(levels, differences)
        height, width = images.shape[2:]
        return self.decoder(stem, fused, deep, (height, width))


METHOD = Method(
    detector=lambda: Memseg,
    options=MemsegOptions(),
    tasks=frozenset({"structured"}),
    takes=frozenset({"images"}),
    published_as="MemSeg",
    # Reimplementation: a ResNet18 with its stem, images of 288 cut to 256, the map unblurred.
    experiment={
        "structured": {
            "backbone": "resnet18.tv_in1k",
            "layers": (0, 1, 2, 3, 4),
            "image_size": 288,
            "crop_size": 256,
            "patch_size": 1,
            "blur_sigma": 0.0,
        },
        # Ours: its weights come with a package.
        "demo": {"backbone": "tf_efficientnet_lite0"},
    },
)
