"""DRAEM: one network takes pasted textures away, another one tells where they were.

Source: "DRAEM - A discriminatively trained reconstruction embedding for surface anomaly detection"
(Zavrtanik, Kristan and Skocaj, ICCV 2021) and its released code. In every second training image a
texture is pasted in a random mask. A network without skips is trained to return the image as it
was; a U-Net sees what it returns and the image, and is trained to return the mask.

| paper | here | meaning |
| --- | --- | --- |
| I, I_a | clean, corrupted | an image, and what is made of it |
| I_r | rebuilt | what the first network makes of I_a |
| M_a | masks | where the texture is |
| M_o | forward | the anomalous channel of the second network's softmax |
| beta | 1 - OPACITY | how much of the image shows through, 0 to 0.8 |
| eta | score | maximum of M_o after a mean filter |

All values were compared with the released code: networks (97.4 million parameters, which is also
what NoCo's table prints for DRAEM), weights, losses, drawing, Adam, and that the pixels are scored
by M_o itself while the image is by the filtered one. The paper was not at hand. As we remember it,
it lowers the learning rate to a tenth after 400 and 600 of its 700 epochs, and turns images by up
to 45 degrees; the code does what stands at the options. Ours: SSIM reflects the borders (code:
zeros), the focal loss is exact (code: 1e-5 is added to p), an epoch sees each image once (code: as
many draws with replacement).

With `sspcab` both networks have an SSPCAB block ("Self-Supervised Predictive Convolutional
Attentive Block for Anomaly Detection", Ristea et al., CVPR 2022) in the place of the penultimate
convolution of their encoders: the first of the two of the deepest level, with its norm and ReLU.
That it is in both is what its author answers; that it takes the norm's place too is ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.options import (
    Fraction,
    MethodOptions,
    NotNegative,
    OnlyWith,
    OptionalImages,
    OptionalInt,
    Positive,
    PositiveInt,
)
from datasets.drawing.augmenters import turn
from datasets.drawing.textures import Textures, paste_texture
from models.deployment.whole import Whole
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.method import Method
from models.training.drawn import drawn_batches
from models.training.focal import focal_loss
from models.training.loop import Loop, Losses
from models.training.networks.unets import Discriminator, Rebuilder, draw_weights
from models.training.rates import late_drops
from models.training.similarity import ssim_map
from models.training.textures import texture_remark, textures_of

GAMMA = 2.0
"""Of the focal loss (released code)."""
FILTER = 21
"""Side of the mean filter, in pixels (released code)."""
LARGEST_TURN = 90.0
"""Degrees either way that a training image is turned (released code)."""


@dataclass(frozen=True, kw_only=True)
class DraemOptions(MethodOptions):
    """DRAEM: pasted textures are taken away, and found."""

    anomaly_source: OptionalImages = None
    """Folder of textures to paste, with all below it (paper: DTD); none for the suite's own set,
    which needs no download."""
    anomalous_share: Fraction = 0.5
    """Of the training images that get a texture (released code)."""
    turned_share: Fraction = 0.3
    """Of the training images that are turned before, by up to 90 degrees (released code)."""
    width: PositiveInt = 128
    """Channels of the rebuilding network's first level, an eighth of its last (released code)."""
    discriminator_width: PositiveInt = 64
    """The same of the network that tells where (released code)."""
    sspcab: bool = False
    """Put an SSPCAB block in both encoders."""
    sspcab_weight: Annotated[NotNegative, OnlyWith("sspcab", "on", bool)] = 0.1
    """Of the blocks' own loss (paper of SSPCAB)."""
    smooth_maps: bool = False
    """Smooth the map by the mean filter too, not the image's score alone (ours)."""
    learning_rate: Positive = 1e-4
    """Of Adam (paper); a fifth of it after 80 % of the epochs, and again after 90 % (released
    code)."""
    batch_size: PositiveInt = 8
    """Images per step (paper)."""
    epochs: PositiveInt = 700
    """Passes over the training images (paper)."""
    schedule_epochs: OptionalInt = None
    """Epochs over which the learning rate falls; none for all of `epochs`."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


class Draem(Detector):
    """Two networks from random weights; anomalous is what the second one takes for pasted.

    Attributes:
        remarks: which textures were pasted.
    """

    def __init__(self, features: FeatureShape, options: DraemOptions) -> None:
        super().__init__()
        del features  # this method brings its own networks
        self.options = options
        self.rebuilder = Rebuilder(3, 3, options.width, skips=False, sspcab=options.sspcab)
        self.discriminator = Discriminator(6, options.discriminator_width, sspcab=options.sspcab)
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train both networks together from random weights; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: there are no textures, or the images are too small.
        """
        options = self.options
        textures = textures_of(options.anomaly_source)
        self.remarks = [texture_remark(textures)]
        draw_weights(self, generator)

        def draw(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            return draw_training_image(
                image, textures, rng, turned=options.turned_share, anomalous=options.anomalous_share
            )

        def batches() -> Iterator[tuple[Tensor, ...]]:
            return drawn_batches(bank, options.batch_size, draw, generator)

        Loop(
            module=self,
            optimizer=torch.optim.Adam(self.parameters(), lr=options.learning_rate),
            epochs=options.epochs,
            generator=generator,
            rate=lambda passed: late_drops(passed, self._schedule_epochs),
            mixed_precision=options.mixed_precision,
        ).run(batches, lambda batch: self.losses(*batch[1:]), monitor=monitor)

    def losses(self, clean: Tensor, corrupted: Tensor, masks: Tensor) -> Losses:
        """Return the terms of the loss, each a scalar.

        Args:
            clean: (B, 3, S, S) uint8.
            corrupted: the same with something pasted.
            masks: (B, S, S) bool: where.
        """
        wanted, pixels = unit_pixels(clean), unit_pixels(corrupted)
        self.discriminator.encoder.check(pixels)  # it has the most levels
        rebuilt, logits, predictions = self._run(pixels)
        rebuilt = rebuilt.float()
        found = {
            "l2": F.mse_loss(rebuilt, wanted),
            "ssim": 1 - ssim_map(rebuilt, wanted).mean(),
            "focal": focal_loss(logits, masks, gamma=GAMMA),
        }
        if predictions:
            found["sspcab"] = self.options.sspcab_weight * torch.stack(predictions).sum()
        return {"loss": torch.stack(list(found.values())).sum(), **found}

    def forward(self, images: Tensor) -> Tensor:
        """Return the probability that a pixel is anomalous, (B, S, S).

        Args:
            images: (B, 3, S, S) uint8.

        Raises:
            ModelError: the images are too small.
        """
        return self.score(images)[0]

    def score(self, images: Tensor) -> Scored:
        """Return these maps, and the maxima of the filtered ones, (B,)."""
        pixels = unit_pixels(images)
        self.discriminator.encoder.check(pixels)
        _, logits, _ = self._run(pixels)
        maps = logits.softmax(dim=1)[:, 1]  # (B, S, S)
        smooth = F.avg_pool2d(maps, FILTER, stride=1, padding=FILTER // 2)  # (B, S, S)
        return smooth if self.options.smooth_maps else maps, smooth.amax(dim=(1, 2))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what the first network makes of uint8 images (B, 3, S, S), the same."""
        rebuilt, _ = self.rebuilder(unit_pixels(images))
        return (255 * rebuilt).round().clamp(0, 255).byte()

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step, "schedule_epochs": self._schedule_epochs}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return Whole(self)

    @property
    def _schedule_epochs(self) -> int:
        return self.options.schedule_epochs or self.options.epochs

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the rebuilt images, the logits (B, 2, S, S), and the SSPCAB blocks' losses."""
        rebuilt, first = self.rebuilder(pixels)
        logits, second = self.discriminator(torch.cat([rebuilt, pixels], dim=1))
        return rebuilt, logits, [loss for loss in (first, second) if loss is not None]


def unit_pixels(images: Tensor) -> Tensor:
    """Return uint8 images in 0 to 1."""
    return images.float() / 255


def draw_training_image(
    image: np.ndarray,
    textures: Textures,
    rng: np.random.Generator,
    *,
    turned: float,
    anomalous: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a training image, what is made of it, and where.

    Args:
        image: (S, S, 3) uint8.
        textures: to paste from.
        rng: draws everything.
        turned: share of the images that are turned.
        anomalous: share of those in which something is pasted; a mask may be empty all the same.

    Returns:
        The image, perhaps turned, and the corrupted one, both (S, S, 3) uint8; the mask (S, S),
        bool.
    """
    if rng.random() < turned:
        image = turn(image, rng.uniform(-LARGEST_TURN, LARGEST_TURN))
    if rng.random() >= anomalous:
        return image, image, np.zeros(image.shape[:2], dtype=bool)
    return image, *paste_texture(image, textures, rng)


METHOD = Method(
    detector=lambda: Draem,
    options=DraemOptions(),
    tasks=frozenset({"structured"}),
    takes=frozenset({"images"}),
    published_as="DRAEM",
    # Released code: whole images of 256; the map has their size and is not blurred.
    experiment={
        "structured": {
            "backbone": "lenet",
            "layers": (0,),
            "image_size": 256,
            "crop_size": None,
            "blur_sigma": 0.0,
        }
    },
    ignores=frozenset({"backbone", "weights", "layers", "feature_location"}),
)
