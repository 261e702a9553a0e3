"""DDAD: a diffusion model rebuilds an image near itself without its defects; the rest is anomalous.

Source: "Anomaly Detection with Conditioned Denoising Diffusion Models" (Mousakhan, Brox and Tayyub,
2023) and its released code (arimousa/DDAD). `diffusion` has the symbols of the denoising, `unet`
the network. An image is noised to a quarter of the way and denoised in ten steps, each of which is
drawn towards the image itself, so strongly that what is normal stays and so weakly that a defect
does not come back. Maps compare the two, by features of a frozen backbone and by pixels:

| paper | here | meaning |
| --- | --- | --- |
| w | conditioning | how strongly a step is drawn towards the image |
| D_f | feature_distance | 1 - cosine of the backbone's features, summed over stages |
| D_p | pixel_distance | mean absolute difference of the colours |
| v | pixel_weight | of D_p, after it has been scaled to D_f |
| D_anomaly | map | D_f + v * ratio * D_p |

What differs:

- One setting for all categories. The released code sets the conditioning (0 to 11), the epochs
  (1000 to 3000) and the epochs of the adaptation (0 to 16) for each category of MVTec AD; its
  published results are of these, and only such results tell which they should be. Here they are 3,
  2000 (the most frequent) and 0. For that alone numbers are not the paper's.
- The ratio of the two distances' maxima is of the training images. The released code takes it of a
  batch of 16 test images, so that an image's score depends on the others'.
- Noise. It is drawn once and is the same for all images that are scored, so that a score depends on
  nothing but the image. It is part of the head, for images of the size that was fitted.
- Times. Noise is added up to the time at which the network looks first. The released code adds it
  up to 250 and lets the network look at 225 first (`released_steps`).
- A last batch that is not full is trained on too; results are of the whole image and not of its
  middle 224 pixels; what is rebuilt is clipped to the range of the colours.
- The adaptation learns from the stages that are compared; the paper's from the one before, too.
"""

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from models.backbone.rewriting import accelerated
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.method import Method
from models.methods.ddad.adaptation import LEAST_ADAPTED, adapt
from models.methods.ddad.diffusion import noised, plan, rebuild, shares_of_image
from models.methods.ddad.distances import distances, to_bytes, to_unit
from models.methods.ddad.options import DdadOptions, check
from models.methods.ddad.unet import CHANNELS, UNet, group_norm
from models.methods.uniad.network import Dropout
from models.training.generators import derived
from models.training.loop import Loop

AT_ONCE = 8
"""Images that are rebuilt together: bounds the memory of the U-Net's maps."""
EXAMPLE_SIDE = 224
"""Pixels of the image by which the backbone is rewritten for export."""


class Ddad(Detector):
    """A U-Net that knows the noise in normal images; anomalous is what it does not rebuild.

    Attributes:
        noise: added to every image that is scored, first at the start and then at each step, of
            images of the size that was fitted; flat.
        ratio: of the two distances' maxima over the training images.
        shares: of an image's variance at each time, (T + 1,).
    """

    sized_by_fit = ("noise",)

    noise: Tensor
    ratio: Tensor
    shares: Tensor

    def __init__(self, features: FeatureShape, options: DdadOptions) -> None:
        super().__init__()
        assert features.backbone is not None
        check(options)
        self.options = options
        # In a tuple, so that its weights are not part of this head.
        self._frozen = (features.backbone,)
        self.network = UNet(
            options.base_width,
            options.channel_multipliers,
            blocks=options.blocks,
            attention=options.attention_factors,
            heads=options.heads,
        )
        self.adapted: nn.Module | None = None
        if options.adaptation_epochs > 0:
            self.adapted = copy.deepcopy(features.backbone.net).requires_grad_(True)
        self.times = plan(
            options.start_step, options.sampling_step, released=options.released_steps
        )
        self.register_buffer("noise", torch.zeros(0))
        self.register_buffer("ratio", torch.zeros(()))
        self.register_buffer("shares", shares_of_image(options.diffusion_steps), persistent=False)
        self.eval()

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the U-Net, adapt the backbone if asked to, and scale; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: images that cannot be halved as often as the U-Net does, or too few to adapt
                a backbone.
        """
        options = self.options
        size = next(iter(bank.batches(1))).shape[-1]
        self._check_size(size)
        if self.adapted is not None and len(bank) < LEAST_ADAPTED:
            raise ModelError(
                f"{len(bank)} images are too few to adapt the backbone: it needs {LEAST_ADAPTED}",
                {"adaptation_epochs": "set 0 as"},
            )
        self.network.initialise(generator)
        noise = torch.randn(self._num_noises * CHANNELS * size**2, generator=generator)
        self.resize("noise", len(noise))
        self.noise.copy_(noise)
        drawn = derived(generator, self.noise.device)
        seed = int(torch.randint(2**62, (), generator=generator))
        optimizer = torch.optim.Adam(
            self.network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        loop = Loop(
            module=self,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            drawn={"noise": drawn},
            mixed_precision=options.mixed_precision,
        )
        drop = Dropout(options.dropout, drawn)
        loop.run(
            lambda: bank.batches(options.batch_size, generator=generator),
            lambda images: {"loss": self._loss(to_unit(images), drawn, drop)},
            monitor=monitor,
            complete=functools.partial(self._complete, bank, seed),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return maps (B, S, S) of uint8 images (B, 3, S, S).

        They are (B, 1, 1), the maximum, where nothing is to be localised.
        """
        network = self.features_of
        return torch.cat([self.compared(network, *pair) for pair in self._pairs(images)])

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what is made of uint8 images (B, 3, S, S), the same; maps see it unrounded."""
        return torch.cat([to_bytes(rebuilt) for _, rebuilt in self._pairs(images)])

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch of the U-Net; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def rebuilt(self, values: Tensor) -> Tensor:
        """Return what is made of images of values from -1 to 1, (B, 3, S, S), the same.

        Raises:
            ModelError: their size is not the one that was fitted.
        """
        size = values.shape[-1]
        if len(self.noise) != self._num_noises * CHANNELS * size**2:
            side = math.isqrt(len(self.noise) // (self._num_noises * CHANNELS))
            raise ModelError(
                f"this DDAD was fitted on images of {side} pixels, these have {size}: fit and "
                "score at the same image size"
            )
        noise = self.noise.view(self._num_noises, CHANNELS, size, size)
        return self._rebuild(values, values, noise, weight=self.options.conditioning)

    def compared(self, network: nn.Module, values: Tensor, rebuilt: Tensor) -> Tensor:
        """Return the maps that `forward` returns.

        Args:
            network: gives the features: `features_of`, or what does the same.
            values: images, (B, 3, S, S) from -1 to 1.
            rebuilt: what was made of them.
        """
        (backbone,) = self._frozen
        by_features, by_pixels = distances(network, backbone, values, rebuilt)
        maps = by_features + self.options.pixel_weight * self.ratio * by_pixels
        return maps.amax(dim=(1, 2), keepdim=True) if backbone.pooled else maps

    @property
    def features_of(self) -> nn.Module:
        """The network whose features are compared: the backbone's, or the adapted copy."""
        return self._frozen[0].net if self.adapted is None else self.adapted

    @property
    def _num_noises(self) -> int:
        """Images of noise that are added to one that is scored."""
        return len(self.times.times) if self.options.eta > 0 else 1

    def _check_size(self, size: int) -> None:
        factor = self.network.factor
        if size % factor:
            below, above = size // factor * factor, -(-size // factor) * factor
            fitting = f"{below} or {above}" if below else str(above)
            raise ModelError(
                f"the U-Net halves images {factor.bit_length() - 1} times, which {size} pixels "
                f"cannot be: set --image-size to {fitting}, or",
                {"channel_multipliers": "choose fewer"},
            )
        channels = self.options.base_width * self.options.channel_multipliers[-1]
        if size == factor and group_norm(channels).num_groups == channels:
            raise ModelError(
                f"the U-Net's deepest features of {size} pixels are one position of {channels} "
                "channels, each normalised alone, which leaves nothing: set a larger --image-size, "
                "or",
                {"base_width": "raise", "channel_multipliers": "choose fewer"},
            )

    def _rebuild(self, start: Tensor, target: Tensor, noise: Tensor, *, weight: float) -> Tensor:
        return rebuild(
            self.network,
            start,
            target,
            noise,
            shares=self.shares,
            times=self.times,
            weight=weight,
            eta=self.options.eta,
        )

    def _pairs(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some uint8 images as values from -1 to 1, and what is made of them."""
        for some in images.split(AT_ONCE):
            values = to_unit(some)
            yield values, self.rebuilt(values)

    def _loss(self, values: Tensor, drawn: torch.Generator, drop: Dropout) -> Tensor:
        """Return the squared error of the noise, summed over an image, averaged over images."""
        B, T = len(values), self.options.diffusion_steps
        times = torch.randint(1, T + 1, (B,), generator=drawn, device=values.device)
        noise = torch.randn(values.shape, generator=drawn, device=values.device)
        shares = rearrange(self.shares[times], "b -> b 1 1 1")
        found = self.network(noised(values, noise, shares), times, drop)
        return (noise - found.float()).square().sum(dim=(1, 2, 3)).mean()

    def _complete(self, bank: FeatureSource, seed: int) -> None:
        if self.adapted is not None:
            adapt(
                self.adapted,
                self._frozen[0],
                functools.partial(self._rebuild, weight=self.options.adaptation_conditioning),
                bank,
                self.options,
                seed=seed,
                num_noises=self._num_noises,
            )
        self._measure(bank)

    @torch.no_grad()
    def _measure(self, bank: FeatureSource) -> None:
        """Set the ratio of the distances' maxima over the training images."""
        largest = []
        for images in bank.batches(AT_ONCE):
            for pair in self._pairs(images):
                both = distances(self.features_of, self._frozen[0], *pair)
                largest.append(torch.stack([part.amax() for part in both]))
        by_features, by_pixels = torch.stack(largest).amax(dim=0)
        self.ratio.copy_(by_features / by_pixels.clamp_min(torch.finfo(by_pixels.dtype).eps))


class _Exported(nn.Module):
    """`Ddad` with a faster copy of the backbone in it."""

    def __init__(self, detector: Ddad) -> None:
        super().__init__()
        self.detector = detector
        network = detector.features_of
        self.fast = accelerated(network, torch.zeros(1, 3, EXAMPLE_SIDE, EXAMPLE_SIDE))

    def forward(self, images: Tensor) -> Tensor:
        """Return maps of uint8 images (B, 3, S, S), as `Ddad` does."""
        values = to_unit(images)
        return self.detector.compared(self.fast, values, self.detector.rebuilt(values))


METHOD = Method(
    detector=lambda: Ddad,
    options=DdadOptions(),
    takes=frozenset({"images"}),
    published_as="DDAD",
    on={
        "visa": {"pixel_weight": 7.0},  # paper
        # Ours: images of 32 pixels.
        "semantic": {"channel_multipliers": (1, 2, 2), "attention_factors": (2, 4)},
    },
    # Paper: whole images of 256, stages 2 and 3 of a WideResNet-101.
    experiment={
        "structured": {
            "backbone": "wide_resnet101_2.tv_in1k",
            "layers": (2, 3),
            "image_size": 256,
            "crop_size": None,
            "patch_size": 1,
        },
        "demo": {"backbone": "tf_efficientnet_lite0"},  # ours: its weights come with a package
        "semantic": {"layers": (2, 3), "image_size": 32, "crop_size": None},
    },
)
