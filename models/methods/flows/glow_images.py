"""Glow on images: bits per dimension under a normalising flow, a likelihood that misleads.

Source: "Glow: Generative Flow with Invertible 1x1 Convolutions" (Kingma and Dhariwal, NeurIPS 2018)
and its released code (openai/glow), with its values for images of 32 pixels: three levels of 32
steps, width 512, Adamax. `multiscale_flow` says what of the flow is the paper's. The code trains
until it is stopped (its default are a million epochs) with mirrored and shifted images; here
neither is done, and the number of epochs is a fraction of what the published bits per dimension
took: days on several GPUs.

| paper | here | meaning |
| --- | --- | --- |
| x | pixels | images in [0, 1) less 1/2, with uniform noise of one grey level, (B, 3, S, S) |
| L, K | levels, steps | of the flow |
| -log2 p(x) / n | bits | of an 8-bit image, for each of its n numbers: 8 if it were random |

The likelihood does not tell normal images from others. A flow gives MORE likelihood to simple
images that it has never seen: that of SVHN is above that of the CIFAR-10 it was fitted to
(Nalisnick et al., "Do Deep Generative Models Know What They Don't Know?", ICLR 2019), because it
learns how neighbouring pixels go together, and not what they show (Kirichenko et al., "Why
Normalizing Flows Fail to Detect Out-of-Distribution Data", NeurIPS 2020). It is quick to see: a
small flow fitted to photographs of gravel gives constant grey images fewer bits than any
photograph of gravel it has not seen (tests/models/methods/test_glow.py), so that by likelihood they
are the most normal of all. With `score` "typicality" an image is anomalous whose bits are far
from the mean of the normal ones, in either direction (Nalisnick et al., "Detecting
Out-of-Distribution Inputs to Deep Generative Models Using Typicality", 2019, with a single image):
it finds them.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from configs.options import MethodOptions, NotNegativeInt, Positive, PositiveInt
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.method import Method
from models.methods.flows.multiscale_flow import (
    GlowFlow,
    bits_per_dimension,
    build_flow,
    train_flow,
)
from models.training.generators import derived

CHANNELS = 3
GREY_LEVELS = 256
BITS = 8
"""Of a grey level: what a uniform distribution needs."""


@dataclass(frozen=True, kw_only=True)
class GlowImagesOptions(MethodOptions):
    """Glow on images: the textbook's lesson on likelihoods."""

    levels: PositiveInt = 3
    """Levels of the flow (released code, for 32 pixels); each halves the sides."""
    steps: PositiveInt = 32
    """Steps of each level (paper)."""
    width: PositiveInt = 512
    """Hidden channels of the couplings' networks (paper)."""
    score: Literal["likelihood", "typicality"] = "likelihood"
    """Bits per dimension, less the 8 of random pixels (below 0, as a rule); or how far they are
    from the mean of the training images."""
    learning_rate: Positive = 1e-3
    """Of Adamax (released code)."""
    warmup_epochs: NotNegativeInt = 10
    """Epochs over which the learning rate rises linearly (released code)."""
    batch_size: PositiveInt = 64
    """Images per step (released code)."""
    epochs: PositiveInt = 50
    """Passes over the training images (ours; released code: until it is stopped)."""


class GlowImages(Detector):
    """A flow on the pixels, as many bits as an image takes or takes too much or too little.

    Attributes:
        mean_excess: mean of `excess_bits` over the training images, if typicality is the score.
        remarks: that the likelihood misleads, if it is the score.
    """

    mean_excess: Tensor

    def __init__(self, features: FeatureShape, options: GlowImagesOptions) -> None:
        super().__init__()
        del features  # this method brings its own network
        self.options = options
        self.flow = build_flow(
            CHANNELS,
            levels=options.levels,
            steps=options.steps,
            width=options.width,
            squeezes_first=True,
        )
        self.register_buffer("mean_excess", torch.zeros(()))
        if options.score == "likelihood":
            self.remarks.append(
                "A likelihood of pixels misleads: simple images get a high one, whatever they show "
                "(Nalisnick 2019, Kirichenko 2020)."
            )
        self.eval()

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the flow from random weights; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the images cannot be halved as the levels ask.
        """
        options = self.options
        self.flow.initialise(generator)
        noise = derived(generator, self.mean_excess.device)

        def batches() -> Iterator[Tensor]:
            for images in bank.batches(options.batch_size, generator=generator):
                drawn = torch.rand(images.shape, generator=noise, device=images.device)
                yield centred(images, drawn)

        train_flow(
            self,
            self.flow,
            batches,
            options=options,
            steps=-(-len(bank) // options.batch_size),
            generator=generator,
            noise=noise,
            monitor=monitor,
            complete=functools.partial(self._measure, bank),
            offset=BITS,
        )

    def bits(self, images: Tensor) -> Tensor:
        """Return bits per dimension, (B,), of uint8 images (B, 3, S, S).

        A grey level counts by the density in its middle.
        """
        return excess_bits(self.flow, images) + BITS

    def forward(self, images: Tensor) -> Tensor:
        """Return scores as maps (B, 1, 1) of uint8 images (B, 3, S, S)."""
        return scores_of(self.flow, images, self.typical)

    @property
    def typical(self) -> Tensor | None:
        """What scores are the distance to; None where they are the likelihood itself."""
        return self.mean_excess if self.options.score == "typicality" else None

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    @torch.no_grad()
    def _measure(self, bank: FeatureSource) -> None:
        """Set the mean of the training images' bits."""
        if self.options.score != "typicality":
            return
        batches = bank.batches(self.options.batch_size)
        each = [excess_bits(self.flow, images).double() for images in batches]
        self.mean_excess.copy_(torch.cat(each).mean())


class _Exported(nn.Module):
    """`GlowImages` with an actnorm and a convolution as one, and each matrix whole."""

    typical: Tensor | None

    def __init__(self, detector: GlowImages) -> None:
        super().__init__()
        self.flow = detector.flow.folded()
        self.register_buffer("typical", detector.typical)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores as maps (B, 1, 1) of uint8 images (B, 3, S, S)."""
        return scores_of(self.flow, images, self.typical)


def scores_of(flow: GlowFlow, images: Tensor, typical: Tensor | None) -> Tensor:
    """Return scores as maps (B, 1, 1): excess bits, or their distance to what is typical."""
    scores = excess_bits(flow, images)
    if typical is not None:
        scores = (scores - typical).abs()
    return rearrange(scores, "b -> b 1 1")


def excess_bits(flow: GlowFlow, images: Tensor) -> Tensor:
    """Return bits per dimension less 8, (B,), of uint8 images (B, 3, S, S).

    Near 0 a number is exact to more digits than near 8.
    """
    nll = flow.negative_log_likelihood(centred(images, 0.5))
    return bits_per_dimension(nll, CHANNELS)


def centred(images: Tensor, noise: Tensor | float) -> Tensor:
    """Return (grey level + noise) / 256 - 1/2 of uint8 images; noise is in [0, 1)."""
    return (images.float() + noise) / GREY_LEVELS - 0.5


METHOD = Method(
    detector=lambda: GlowImages,
    options=GlowImagesOptions(),
    tasks=frozenset({"semantic"}),
    takes=frozenset({"images"}),
    # Released code: images of 32 pixels, in colour.
    experiment={
        "semantic": {"backbone": "lenet", "layers": (0,), "image_size": 32, "crop_size": None}
    },
    ignores=frozenset({"backbone", "weights", "layers", "feature_location", "compile"}),
)
