"""RIAD: a network fills in hidden regions of an image from what is around them.

Source: "Reconstruction by inpainting for visual anomaly detection" (Zavrtanik, Kristan and Skocaj,
Pattern Recognition 2021). An autoencoder may rebuild a defect as well as it was copied; what is
hidden cannot be copied. The image is cut into square regions, which are split at random into n
sets; each of n copies has one set hidden, and the parts that were filled in make up the whole.

| paper | here | meaning |
| --- | --- | --- |
| k, K | region, region_sizes | pixels along a side of a region |
| S_i, n | regions, copies | which of the n copies hides each pixel |
| I_r | rebuilt | the n filled-in parts together |
| L_2, L_G, L_S | l2, gradient, ssim | terms of the loss; L_G is of gradients at several scales |
| lambda_G, lambda_S | gradient_weight, ssim_weight | weights of the terms |
| G_A | map | 1 - MSGMS, mean-filtered, averaged over the sizes of regions |

The authors released no code. Two independent implementations agree on network, optimizer and
weights of 1 for the loss, which are the defaults. They differ in how gradients are taken, of the
grey image or of each channel (here), in how the maps are added up (one weighs each by its size of
regions: k = 16 counts 64 times as much as k = 2; the paper's mean is taken here), and in the filter
of the maps. One holds out 20 % of the images to stop early; here the last epoch counts.

One size of regions is drawn for each step. SSIM and gradients are of images in 0 to 1. What is
hidden of a scored image is drawn once, in the fit, and the same for every image, so that scores
depend on nothing else; the head keeps it, and scores images of that size alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.options import Bound, MethodOptions, NotNegative, Odd, Positive, PositiveInt
from models.deployment.whole import Whole
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.method import Method
from models.methods.riad.unet import DIVISOR, UNet
from models.training.convolutions import initialise
from models.training.loop import Loop, Losses
from models.training.similarity import multiscale_gms_map, ssim_map

DROP = 0.1
"""Factor of the learning rate from the milestone on."""
SEVERAL = Bound("at least 2", lambda count: count >= 2)


@dataclass(frozen=True, kw_only=True)
class RiadOptions(MethodOptions):
    """RIAD: hidden regions are filled in, anomalous where that differs from the image."""

    region_sizes: tuple[int, ...] = (2, 4, 8, 16)
    """Pixels along the sides of hidden regions: one is drawn for each step, and scores take the
    mean over all (paper)."""
    copies: Annotated[int, SEVERAL] = 3
    """Copies of an image, each of which hides another part of the regions (paper)."""
    width: PositiveInt = 64
    """Channels of the U-Net's first level; deeper ones have up to eight times as many (released
    implementations)."""
    gradient_weight: NotNegative = 1.0
    """Of the similarity of gradients in the loss (released implementations)."""
    ssim_weight: NotNegative = 1.0
    """Of the structural similarity in the loss (released implementations)."""
    scales: PositiveInt = 4
    """Scales at which gradients are compared, each half of the one before (paper)."""
    filter_size: Odd = 21
    """Side of the mean filter of the maps, in pixels (released implementation); 1 for none."""
    learning_rate: Positive = 1e-4
    """Of Adam (released implementations), before the milestone; a tenth of it after."""
    weight_decay: NotNegative = 1e-5
    """Of Adam (released implementations)."""
    milestone: PositiveInt = 250
    """Epochs before the learning rate drops (released implementation)."""
    batch_size: PositiveInt = 4
    """Images per step, each in all its copies (released implementations)."""
    epochs: PositiveInt = 300
    """Passes over the training images (released implementations)."""
    image_score: Literal["max", "mean"] = "max"
    """An image's score: the maximum of the map (paper), or its mean (ours)."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


class Riad(Detector):
    """A U-Net that fills in; anomalous where gradients of image and filling differ.

    The copies of a step have common batch statistics.

    Attributes:
        regions: number of the copy that hides each pixel of a scored image, for each size of
            regions, (K * S * S,), uint8.
    """

    sized_by_fit = ("regions",)
    regions: Tensor

    def __init__(self, features: FeatureShape, options: RiadOptions) -> None:
        super().__init__()
        del features  # this method brings its own network
        if not options.region_sizes or min(options.region_sizes) < 1:
            raise ModelError(
                f"regions of {options.region_sizes} pixels cannot be hidden: "
                "--method.region-sizes takes at least one size, each above 0",
                {"region_sizes": "above 0"},
            )
        self.options = options
        self.net = UNet(options.width)
        self.register_buffer("regions", torch.zeros(0, dtype=torch.uint8))
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the network from random weights; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the images are of a size that the network does not take, or too small.
        """
        options = self.options
        size = self._size_of(next(iter(bank.batches(1))))
        initialise(self.net, generator)
        drawn = [self._draw(size, region, generator) for region in options.region_sizes]
        self.resize("regions", len(drawn) * size * size)
        self.regions.copy_(torch.stack(drawn).flatten())
        optimizer = torch.optim.Adam(
            self.net.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for images in bank.batches(options.batch_size, generator=generator):
                which = int(torch.randint(len(options.region_sizes), (), generator=generator))
                regions = self._draw(size, options.region_sizes[which], generator)
                yield centred(images), regions.to(images.device, non_blocking=True)

        Loop(
            module=self,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            rate=lambda passed: 1.0 if passed < options.milestone else DROP,
            mixed_precision=options.mixed_precision,
        ).run(batches, self._losses, monitor=monitor)

    def fill_in(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Return what the network makes of hidden regions, put together, (B, 3, S, S) in -1 to 1.

        Args:
            pixels: (B, 3, S, S), in -1 to 1.
            regions: number of the copy that hides each pixel, (S, S).
        """
        hidden = [regions == number for number in range(self.options.copies)]
        copies = [pixels * ~part for part in hidden]
        if self.training:
            filled = list(self.net(torch.cat(copies)).float().chunk(len(copies)))
        else:  # each by itself takes a share of the memory
            filled = [self.net(copy) for copy in copies]
        return torch.stack([f * part for f, part in zip(filled, hidden, strict=True)]).sum(dim=0)

    def forward(self, images: Tensor) -> Tensor:
        """Return maps (B, S, S), in 0 to 1, of uint8 images (B, 3, S, S).

        Raises:
            ModelError: S is not the size of the images that it was fitted on.
        """
        pixels = centred(images)
        maps = []
        for rebuilt in self._fillings(pixels):
            alike = multiscale_gms_map(
                shown(pixels), shown(rebuilt), scales=self.options.scales
            ).unsqueeze(1)
            size = self.options.filter_size
            alike = F.avg_pool2d(alike, size, 1, size // 2, count_include_pad=False)
            maps.append(1 - alike[:, 0])  # (B, S, S)
        return torch.stack(maps).mean(dim=0)

    def score(self, images: Tensor) -> Scored:
        """Return maps (B, S, S) and, unless the maximum counts, their means (B,)."""
        maps = self(images)
        if self.options.image_score == "max":
            return maps, None
        return maps, maps.mean(dim=(1, 2))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what is filled in of uint8 images (B, 3, S, S), likewise.

        It is the mean over the sizes of regions, whose maps are averaged.
        """
        filled = torch.stack(list(self._fillings(centred(images)))).mean(dim=0)  # (B, 3, S, S)
        return (255 * shown(filled)).round().clamp(0, 255).byte()

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return Whole(self)

    def _fillings(self, pixels: Tensor) -> Iterator[Tensor]:
        """Yield what is filled in, (B, 3, S, S), for each size of regions."""
        size = int(pixels.shape[-1])  # a tensor while a graph is traced
        fitted = len(self.regions) // len(self.options.region_sizes)
        if size * size != fitted:
            raise ModelError(
                f"RIAD's head hides regions of images of {round(fitted**0.5)} pixels, on which it "
                f"was fitted, and these have {size}: fit it again at this --image-size"
            )
        for regions in self.regions.view(-1, size, size):
            yield self.fill_in(pixels, regions)

    def _losses(self, batch: tuple[Tensor, Tensor]) -> Losses:
        pixels, regions = batch
        rebuilt = self.fill_in(pixels, regions)
        options = self.options
        images, filled = shown(pixels), shown(rebuilt)
        l2 = F.mse_loss(rebuilt, pixels)
        gradient = 1 - multiscale_gms_map(images, filled, scales=options.scales).mean()
        ssim = 1 - ssim_map(images, filled).mean()
        loss = l2 + options.gradient_weight * gradient + options.ssim_weight * ssim
        return {"loss": loss, "l2": l2, "gradient": gradient, "ssim": ssim}

    def _draw(self, size: int, region: int, generator: torch.Generator) -> Tensor:
        return draw_regions(size, region, self.options.copies, generator)

    def _size_of(self, images: Tensor) -> int:
        """Return the side of the images, if they can be used."""
        options = self.options
        height, width = images.shape[2:]
        least = max(2 ** (options.scales - 1), 2 * DIVISOR)
        if height != width or height % DIVISOR or height < least:
            raise ModelError(
                f"RIAD's network takes square images whose sides are multiples of {DIVISOR}, at "
                f"least {least}, and these have {height} x {width}: --image-size 256 "
                "--crop-size none"
            )
        largest = max(options.region_sizes)
        if (-(-height // largest)) ** 2 < options.copies:
            raise ModelError(
                f"an image of {height} pixels has fewer regions of {largest} than the "
                f"{options.copies} copies that share them",
                {"region_sizes": "smaller", "copies": "fewer"},
            )
        return height


def draw_regions(size: int, region: int, copies: int, generator: torch.Generator) -> Tensor:
    """Return which copy hides each pixel, (size, size) uint8.

    Each copy hides as many regions as any other, or one less.

    Args:
        size: pixels along a side of the image; regions at its far borders may be cut.
        region: pixels along a side of a region.
        copies: how many.
        generator: a CPU generator.
    """
    grid = -(-size // region)
    order = torch.randperm(grid * grid, generator=generator) % copies
    cells = order.byte().view(grid, grid)
    whole = cells.repeat_interleave(region, dim=0).repeat_interleave(region, dim=1)
    return whole[:size, :size]  # (size, size)


def centred(images: Tensor) -> Tensor:
    """Return uint8 images as the network takes them, in -1 to 1."""
    return images.float() / 127.5 - 1


def shown(pixels: Tensor) -> Tensor:
    """Return pixels of -1 to 1 in 0 to 1."""
    return (pixels + 1) / 2


METHOD = Method(
    detector=lambda: Riad,
    options=RiadOptions(),
    takes=frozenset({"images"}),
    published_as="RIAD",
    # Whole images of 256; maps have a mean filter of their own.
    experiment={
        "structured": {
            **{"backbone": "lenet", "layers": (0,), "image_size": 256, "crop_size": None},
            "blur_sigma": 0.0,
        },
        "semantic": {"backbone": "lenet", "layers": (0,), "image_size": 32, "crop_size": None},
    },
    # Ours: another class differs as a whole.
    on={"semantic": {"filter_size": 1, "image_score": "mean"}},
    ignores=frozenset({"backbone", "weights", "layers", "feature_location"}),
)
