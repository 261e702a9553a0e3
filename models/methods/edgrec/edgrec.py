"""EdgRec: rebuilds an image in colour from its grey edges; anomalous is what comes out otherwise.

Source: "Reconstruction from edge image combined with color and gradient difference for industrial
surface anomaly detection" (Liu et al., 2022, arXiv 2210.14485) and its released code. The edges are
a morphological gradient. They tell little of how a surface looks, so a network that has seen normal
images only puts normal colours and structure between them. Training images are corrupted first, so
that edges which should not be there are overlooked.

| paper | here | meaning |
| --- | --- | --- |
| I | clean | an image |
| edge image | edges | of the corrupted image, in grey |
| I_r | rebuilt | what the network makes of the edges |
| MSGMS | 1 - structure | gradient similarity over two scales |
| S | forward | structure and colour maps, added |

Values are the released code's. Its colour map wraps modulo 256 where it should not, which the
published numbers contain: `released` repeats it, on an output that is not clipped. Otherwise
colours are compared in float32 on the clipped output. Ours: SSIM and gradients continue the borders
(code: zeros), gradient similarity is averaged over channels and scales, an epoch sees each image
once. The code's authors say that textures of other training images do about as well as those of
DTD, and that half the width costs 0.4 points of image AUROC.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.options import (
    Fraction,
    MethodOptions,
    OptionalImages,
    OptionalInt,
    Positive,
    PositiveInt,
)
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.method import Method
from models.methods.edgrec.colours import colour_map, wrapped_colour_map
from models.methods.edgrec.drawing import draw_training_image
from models.training.drawn import drawn_batches
from models.training.loop import Loop, Losses
from models.training.networks.unets import Rebuilder, draw_weights
from models.training.rates import late_drops
from models.training.similarity import multiscale_gms_map, ssim_map
from models.training.textures import texture_remark, textures_of

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (OpenCV's, of ITU-R BT.601)."""
SCALES = 2
"""Of the gradient similarity (released code)."""
STRUCTURE_FILTER = 21
"""Side of the mean filter over it, in pixels (released code)."""


@dataclass(frozen=True, kw_only=True)
class EdgrecOptions(MethodOptions):
    """EdgRec: colours are rebuilt from edges."""

    anomaly_source: OptionalImages = None
    """Folder of textures to paste, with all below it (paper: DTD); none for the suite's own set,
    which needs no download."""
    corrupted_share: Fraction = 0.5
    """Of the training images, half of them by a texture, half by a turned piece of themselves
    (released code)."""
    turned_share: Fraction = 0.3
    """Of the training images that are turned before, by up to 90 degrees (released code)."""
    width: PositiveInt = 128
    """Channels of the network's first level, an eighth of its last (released code)."""
    released: bool = False
    """Compare colours as the released code does, in 8 bits that wrap."""
    learning_rate: Positive = 1e-4
    """Of Adam (released code); a fifth of it after 80 % of the epochs, and again after 90 %."""
    batch_size: PositiveInt = 8
    """Images per step (released code)."""
    epochs: PositiveInt = 800
    """Passes over the training images (released code)."""
    schedule_epochs: OptionalInt = None
    """Epochs over which the learning rate falls; none for all of `epochs`."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


class Edgrec(Detector):
    """A U-Net from edges to colours, and how its output differs from the image.

    Attributes:
        remarks: which textures were pasted, and that colours wrap where they do.
    """

    def __init__(self, features: FeatureShape, options: EdgrecOptions) -> None:
        super().__init__()
        del features  # this method brings its own network
        self.options = options
        self.rebuilder = Rebuilder(1, 3, options.width, skips=True)
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the network from random weights; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: there are no textures, or the images are too small.
        """
        options = self.options
        textures = textures_of(options.anomaly_source)
        self.remarks = [texture_remark(textures)]
        if options.released:
            self.remarks.append("Colours are compared in 8 bits that wrap, as in released code.")
        draw_weights(self, generator)

        def draw(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            shares = {"turned": options.turned_share, "corrupted": options.corrupted_share}
            return draw_training_image(image, textures, rng, **shares)

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

    def losses(self, clean: Tensor, corrupted: Tensor) -> Losses:
        """Return the terms of the loss, each a scalar.

        Args:
            clean: (B, 3, S, S) uint8.
            corrupted: the same, corrupted.
        """
        wanted, rebuilt = clean.float() / 255, self._rebuild(corrupted)
        found = {
            "l2": F.mse_loss(rebuilt, wanted),
            "ssim": 1 - ssim_map(rebuilt, wanted).mean(),
        }
        return {"loss": torch.stack(list(found.values())).sum(), **found}

    def forward(self, images: Tensor) -> Tensor:
        """Return the sum of the maps of structure and colour, (B, S, S).

        Args:
            images: (B, 3, S, S) uint8.

        Raises:
            ModelError: the images are too small.
        """
        pixels, rebuilt = images.float() / 255, self._rebuild(images)
        if not self.options.released:
            rebuilt = rebuilt.clamp(0, 1)
        difference = 1 - multiscale_gms_map(rebuilt, pixels, scales=SCALES)  # (B, S, S)
        structure = F.avg_pool2d(
            difference[:, None], STRUCTURE_FILTER, stride=1, padding=STRUCTURE_FILTER // 2
        )
        compare = wrapped_colour_map if self.options.released else colour_map
        return structure[:, 0] + compare(rebuilt, pixels)  # (B, S, S)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what the network makes of the edges of uint8 images (B, 3, S, S), the same."""
        return (255 * self._rebuild(images)).round().clamp(0, 255).byte()

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step, "schedule_epochs": self._schedule_epochs}

    def _rebuild(self, images: Tensor) -> Tensor:
        """Return float32 images of the edges of uint8 ones, (B, 3, S, S)."""
        self.rebuilder.encoder.check(images)
        rebuilt, _ = self.rebuilder(edges(images))
        return rebuilt.float()

    @property
    def _schedule_epochs(self) -> int:
        return self.options.schedule_epochs or self.options.epochs


def edges(images: Tensor) -> Tensor:
    """Return the morphological gradient of grey values, largest less least of 3 x 3 pixels.

    Args:
        images: (B, 3, S, S) uint8.

    Returns:
        (B, 1, S, S) in 0 to 1; beyond the border are no pixels.
    """
    red, green, blue = (images.float() / 255).unbind(dim=1)
    grey = (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]  # (B, 1, S, S)
    largest = F.max_pool2d(grey, 3, stride=1, padding=1)
    least = -F.max_pool2d(-grey, 3, stride=1, padding=1)
    return largest - least


METHOD = Method(
    detector=lambda: Edgrec,
    options=EdgrecOptions(),
    tasks=frozenset({"structured"}),
    takes=frozenset({"images"}),
    published_as="EdgRec",
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
