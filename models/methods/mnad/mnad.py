"""MNAD: an autoencoder that reads a memory of normal patterns.

Source: "Learning Memory-guided Normality for Anomaly Detection" (Park, Noh and Ham, CVPR 2020) and
its released code (cvlab-yonsei/MNAD), which detect anomalies in videos. This is the paper's task of
reconstruction, for single images.

| paper | here | meaning |
| --- | --- | --- |
| q_t^k | queries | encoder's map at a position, of unit length |
| p_m | memory | items of unit length; no parameters, they follow the queries in training |
| w, p^ | read | softmax over items, and their weighted mean |
| L_rec, L_compact, L_separate | reconstruction, compactness, separateness | terms of the loss |
| lambda | mixing | share of the error in the score, less that of the distance |

Different here, because a video is none:

- The memory is not updated while images are scored: a score would depend on those before, and learn
  from anomalies.
- The paper scales error (PSNR) and distance to 0 to 1 over the frames of a test video. Here both
  are centred and scaled to deviation 1 on the normal training images: for the score of an image,
  the means over it; for the map, the pixels. The map is the same mix of the squared error and of
  the distance to the nearest item.

Both losses of the memory move the encoder alone, as no gradient reaches the items (released code).
Users of the code found scores without the memory as good or better: `--method.no-memory`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import (
    Bound,
    MethodOptions,
    NotNegative,
    OnlyWith,
    OptionalInt,
    Positive,
    PositiveInt,
)
from models.deployment.whole import Whole
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.method import Method
from models.methods.mnad.memory import draw_items, read, two_nearest, updated
from models.methods.mnad.networks import DIVISOR, build_decoder, build_encoder
from models.training.convolutions import initialise
from models.training.loop import Loop, Losses
from models.training.rates import warmed_cosine

MARGIN = 1.0
"""By which the second nearest item is to be farther (paper)."""
USED = OnlyWith("memory", "on", lambda memory: memory)
TWO = Bound("at least 2", lambda count: count >= 2)
SHARE = Bound("in 0 to 1", lambda share: 0 <= share <= 1)


@dataclass(frozen=True, kw_only=True)
class MnadOptions(MethodOptions):
    """MNAD: an autoencoder that reads a memory of normal patterns."""

    memory: bool = True
    """Read the memory; without, the queries alone are decoded, and the error is all (ablation)."""
    items: Annotated[int, TWO, USED] = 10
    """Items of the memory (paper)."""
    compactness: Annotated[NotNegative, USED] = 0.01
    """Weight of the distance to the nearest item in the loss (released code)."""
    separateness: Annotated[NotNegative, USED] = 0.01
    """Weight of the triplet loss of the two nearest items (released code)."""
    mixing: Annotated[float, SHARE, USED] = 0.7
    """Share of the squared error in the score; the rest is the distance (released code)."""
    width: PositiveInt = 64
    """Channels of the outer layers; queries have eight times as many (released code)."""
    learning_rate: Positive = 2e-4
    """Of Adam, falling along a cosine (released code)."""
    batch_size: PositiveInt = 4
    """Images per step (paper)."""
    epochs: PositiveInt = 60
    """Passes over the training images (paper)."""
    schedule_epochs: OptionalInt = None
    """Epochs over which the learning rate falls; none for all of `epochs`."""
    image_score: Literal["mean", "max"] = "mean"
    """An image's score: of its mean error and distance (as the paper's of a frame), or the maximum
    of the map (ours)."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


class Mnad(Detector):
    """An autoencoder with a memory; anomalous by its error and by the distance to the memory.

    Statistics are of the squared error and, with a memory, of the distance: K = 2, else 1.

    Attributes:
        items: of the memory, (M, C), of unit length; none without it.
        pixel_mean: of the normal pixels, (K,); `pixel_std` is their deviation.
        image_mean: of the means over normal images, (K,); `image_std` is their deviation.
    """

    items: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor
    image_mean: Tensor
    image_std: Tensor
    shares: Tensor

    def __init__(self, features: FeatureShape, options: MnadOptions) -> None:
        super().__init__()
        del features  # this method brings its own network
        self.options = options
        C = DIVISOR * options.width
        self.encoder = build_encoder(options.width)
        self.decoder = build_decoder(2 * C if options.memory else C, options.width)
        self.register_buffer("items", torch.zeros(options.items if options.memory else 0, C))
        shares = [options.mixing, 1 - options.mixing] if options.memory else [1.0]
        self.register_buffer("shares", torch.tensor(shares), persistent=False)
        for name in ("pixel", "image"):
            self.register_buffer(f"{name}_mean", torch.zeros(len(shares)))
            self.register_buffer(f"{name}_std", torch.ones(len(shares)))
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the network and its memory, then measure; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the sides of the images are not multiples of 8.
        """
        options = self.options
        for network in (self.encoder, self.decoder):
            initialise(network, generator)
        M, C = self.items.shape
        self.items.copy_(draw_items(M, C, generator))
        optimizer = torch.optim.Adam(
            [*self.encoder.parameters(), *self.decoder.parameters()], lr=options.learning_rate
        )

        def batches() -> Iterator[Tensor]:
            for images in bank.batches(options.batch_size, generator=generator):
                yield self._centred(images)

        Loop(
            module=self,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            rate=lambda passed: warmed_cosine(passed / self._scheduled, warmup=0.0, least=0.0),
            mixed_precision=options.mixed_precision,
        ).run(batches, self._losses, monitor=monitor, complete=lambda: self._measure(bank))

    def queries(self, pixels: Tensor) -> Tensor:
        """Return the encoder's map, of unit length at each position, (B, C, S / 8, S / 8).

        Args:
            pixels: (B, 3, S, S), in -1 to 1.
        """
        return F.normalize(self.encoder(pixels).float(), dim=1)

    def rebuild(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is rebuilt of pixels (B, 3, S, S), likewise, and the queries (P, C)."""
        maps = self.queries(pixels)
        rows = rearrange(maps, "b c h w -> (b h w) c")
        if self.options.memory:
            with torch.autocast(rows.device.type, enabled=False):
                found = read(rows, self.items)  # (P, C)
            H, W = maps.shape[2:]
            answers = rearrange(found, "(b h w) c -> b c h w", h=H, w=W)
            maps = torch.cat([maps, answers], dim=1)  # (B, 2C, S / 8, S / 8)
        return self.decoder(maps).float(), rows

    def parts(self, images: Tensor) -> Tensor:
        """Return the squared error and, with a memory, the distance to the nearest item.

        Args:
            images: (B, 3, S, S), uint8.

        Returns:
            (B, K, S, S).
        """
        pixels = self._centred(images)
        rebuilt, rows = self.rebuild(pixels)
        errors = (rebuilt - pixels).square().mean(dim=1, keepdim=True)  # (B, 1, S, S)
        if not self.options.memory:
            return errors
        nearest, _ = two_nearest(rows, self.items)
        H, W = (side // DIVISOR for side in images.shape[2:])
        distances = rearrange(
            torch.linalg.vector_norm(rows - nearest, dim=1), "(b h w) -> b 1 h w", h=H, w=W
        )
        whole = F.interpolate(distances, scale_factor=DIVISOR, mode="bilinear")  # (B, 1, S, S)
        return torch.cat([errors, whole], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return maps (B, S, S) of uint8 images (B, 3, S, S)."""
        return self._maps(self.parts(images))

    def score(self, images: Tensor) -> Scored:
        """Return maps (B, S, S) and, unless the maximum counts, image scores (B,)."""
        parts = self.parts(images)
        if self.options.image_score == "max":
            return self._maps(parts), None
        means = parts.mean(dim=(2, 3))  # (B, K)
        return self._maps(parts), ((means - self.image_mean) / self.image_std) @ self.shares

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what the network makes of uint8 images (B, 3, S, S), likewise."""
        rebuilt, _ = self.rebuild(self._centred(images))
        return (127.5 * (rebuilt + 1)).round().clamp(0, 255).byte()

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step, "schedule_epochs": self._scheduled}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return Whole(self)

    @property
    def _scheduled(self) -> int:
        return self.options.schedule_epochs or self.options.epochs

    def _losses(self, pixels: Tensor) -> Losses:
        """Return the losses of pixels (B, 3, S, S); then the memory follows the queries."""
        rebuilt, rows = self.rebuild(pixels)
        reconstruction = F.mse_loss(rebuilt, pixels)
        if not self.options.memory:
            return {"loss": reconstruction}
        with torch.autocast(rows.device.type, enabled=False):
            nearest, second = two_nearest(rows, self.items)
            compact = F.mse_loss(rows, nearest)
            separate = F.triplet_margin_loss(rows, nearest, second, margin=MARGIN)
            # A new tensor: the gradient of what was read needs the old one.
            self.items = updated(self.items, rows.detach())
        options = self.options
        loss = reconstruction + options.compactness * compact + options.separateness * separate
        return {
            **{"loss": loss, "reconstruction": reconstruction},
            **{"compactness": compact, "separateness": separate},
        }

    def _maps(self, parts: Tensor) -> Tensor:
        """Return the mix (B, S, S) of parts (B, K, S, S)."""
        scale = (self.shares / self.pixel_std)[:, None, None]
        return ((parts - self.pixel_mean[:, None, None]) * scale).sum(dim=1)

    @torch.no_grad()
    def _measure(self, bank: FeatureSource) -> None:
        """Set mean and deviation of pixels and of images over the normal images."""
        K = len(self.shares)
        sums = torch.zeros(2, K, dtype=torch.float64, device=self.shares.device)
        means = []
        count = 0
        for images in bank.batches(self.options.batch_size):
            parts = self.parts(images).double()  # (B, K, S, S)
            sums += torch.stack([parts.sum(dim=(0, 2, 3)), parts.square().sum(dim=(0, 2, 3))])
            means.append(parts.mean(dim=(2, 3)))
            count += parts.numel() // K
        mean, square = sums / count
        of_images = torch.cat(means)  # (N, K)
        self.pixel_mean.copy_(mean)
        self.pixel_std.copy_(deviation((square - mean.square()).clamp(min=0)))
        self.image_mean.copy_(of_images.mean(dim=0))
        self.image_std.copy_(deviation(of_images.var(dim=0, correction=0)))

    def _centred(self, images: Tensor) -> Tensor:
        """Return uint8 images as the network takes them, in -1 to 1."""
        height, width = images.shape[2:]
        if height % DIVISOR or width % DIVISOR:
            raise ModelError(
                f"MNAD's network takes images whose sides are multiples of {DIVISOR}, and these "
                f"have {height} x {width}: --image-size 256 --crop-size none"
            )
        return images.float() / 127.5 - 1


def deviation(variance: Tensor) -> Tensor:
    """Return the deviations, 1 where nothing varies, by which there would be no dividing."""
    return torch.where(variance > 0, variance.sqrt(), 1.0)


METHOD = Method(
    detector=lambda: Mnad,
    options=MnadOptions(),
    takes=frozenset({"images"}),
    # Paper: whole frames of 256.
    experiment={
        "structured": {
            **{"backbone": "lenet", "layers": (0,), "image_size": 256, "crop_size": None},
        },
        "semantic": {"backbone": "lenet", "layers": (0,), "image_size": 32, "crop_size": None},
    },
    ignores=frozenset({"backbone", "weights", "layers", "feature_location"}),
)
