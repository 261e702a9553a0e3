"""What the autoencoders share: options, training on images or crops, maps of averaged windows.

Source: "Improving Unsupervised Defect Segmentation by Applying Structural Similarity to
Autoencoders" (Bergmann et al., VISAPP 2019), whose authors released no code. Its network is in
`networks`. An autoencoder is trained on 10 000 crops of 128 pixels of each texture, and a test
image is rebuilt in windows of that size, 30 pixels apart, whose residuals are averaged. Objects are
rebuilt whole, at 256 pixels and with a code of 500 ("MVTec AD", Bergmann et al., CVPR 2019):
`--method.no-crops --method.network-size 256 --method.code-dim 500`.

Different here: crops are drawn anew in each epoch, which has as many as the paper draws once; whole
images come several times in an epoch instead of turned and mirrored, as a turned object may be an
anomaly; and images are in colour, where the paper's are grey: what is compared, is averaged over
the channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from configs.options import Bound, MethodOptions, NotNegative, OnlyWith, Positive, PositiveInt
from models.deployment.whole import Whole
from models.detector import Detector, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.methods.autoencoders.networks import CHANNELS
from models.methods.autoencoders.windows import averaged_over_windows, random_crops
from models.training.convolutions import initialise
from models.training.generators import derived
from models.training.loop import Loop, Losses
from models.training.repeated import repeated_batches

SIZES = (32, 64, 128, 256)
SIZE = Bound("32, 64, 128 or 256", lambda size: size in SIZES)
CROPPED = OnlyWith("crops", "on", lambda crops: crops)


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions(MethodOptions):
    """What the autoencoders share."""

    network_size: Annotated[int, SIZE] = 128
    """Pixels along a side of what the network rebuilds: 32, 64, 128 or 256 (paper: 128)."""
    width: PositiveInt = 32
    """Channels of the outer layers; the inner ones have two and four times as many (paper)."""
    code_dim: PositiveInt = 100
    """Numbers of the code (paper: 100 for woven textures, 500 for nanofibres)."""
    crops: bool = True
    """Train on random crops, and score in overlapping windows (paper, for textures); without, the
    network takes whole images, which must be of its size."""
    stride: Annotated[PositiveInt, CROPPED] = 30
    """Pixels between the windows of a scored image (paper)."""
    learning_rate: Positive = 2e-4
    """Of Adam (paper)."""
    weight_decay: NotNegative = 1e-5
    """Of Adam (paper)."""
    batch_size: PositiveInt = 128
    """Crops or images per step (paper)."""
    images_per_epoch: PositiveInt = 10_000
    """Crops or images of an epoch, for which the training images are passed repeatedly (paper)."""
    epochs: PositiveInt = 200
    """Of that many images each (paper)."""
    image_score: Literal["max", "mean"] = "max"
    """An image's score: the maximum of the map, or its mean (ours)."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


class Reconstruction(Detector):
    """An autoencoder on images; anomalous where it does not rebuild them.

    A subclass sets `encoder` and `decoder`, and says what is minimised and what makes a map.
    """

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, options: ReconstructionOptions) -> None:
        super().__init__()
        self.options = options

    def losses(self, pixels: Tensor, noise: torch.Generator) -> Losses:
        """Return what is minimised, and its parts.

        Args:
            pixels: (B, 3, size, size), in 0 to 1.
            noise: on the device of the pixels, for what is drawn.
        """
        raise NotImplementedError

    def compare(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions (B, 3, size, size) of as many pixels, and maps (B, size, size)."""
        raise NotImplementedError

    def prepare(self, generator: torch.Generator) -> None:
        """Draw what scores need beside the networks; nothing here."""

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the networks from random weights; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the images are smaller than the network's, or larger and not to be cropped.
        """
        options = self.options
        for network in (self.encoder, self.decoder):
            initialise(network, generator)
        self.prepare(generator)
        noise = derived(generator, next(self.parameters()).device)
        optimizer = torch.optim.Adam(
            self.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )

        def batches() -> Iterator[Tensor]:
            count = options.images_per_epoch
            for images in repeated_batches(bank, options.batch_size, count, generator):
                self._check_size(images)
                if options.crops:
                    images = random_crops(images, options.network_size, generator)
                yield images.float() / 255  # (B, 3, size, size)

        Loop(
            module=self,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            drawn={"noise": noise},
            mixed_precision=options.mixed_precision,
        ).run(batches, lambda pixels: self.losses(pixels, noise), monitor=monitor)

    def forward(self, images: Tensor) -> Tensor:
        """Return maps (B, S, S) of uint8 images (B, 3, S, S)."""
        return self._averaged(images)[:, CHANNELS]

    def score(self, images: Tensor) -> Scored:
        """Return maps (B, S, S) and, unless the maximum counts, their means (B,)."""
        maps = self(images)
        if self.options.image_score == "max":
            return maps, None
        return maps, maps.mean(dim=(1, 2))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what the network makes of uint8 images (B, 3, S, S), likewise.

        Maps of windows are averaged, and so are their reconstructions here.
        """
        rebuilt = self._averaged(images)[:, :CHANNELS]  # (B, 3, S, S)
        return (255 * rebuilt).round().clamp(0, 255).byte()

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return Whole(self)

    def _averaged(self, images: Tensor) -> Tensor:
        """Return the mean of the windows' reconstructions and, as a last channel, of their maps.

        Returns:
            (B, 4, S, S).
        """
        self._check_size(images)

        def look(window: Tensor) -> Tensor:
            rebuilt, maps = self.compare(window)
            return torch.cat([rebuilt, maps.unsqueeze(1)], dim=1)  # (B, 4, size, size)

        pixels = images.float() / 255
        return averaged_over_windows(pixels, self.options.network_size, self.options.stride, look)

    def _check_size(self, images: Tensor) -> None:
        size = self.options.network_size
        height, width = images.shape[2:]
        if (height, width) == (size, size):
            return
        if self.options.crops and height == width and height > size:
            return
        raise ModelError(
            f"the network rebuilds {size} x {size} pixels, and the images have {height} x {width}: "
            f"pass --image-size {size} --crop-size none, or larger images and --method.crops",
            {"network_size": "the size of the images, or below with crops"},
        )
