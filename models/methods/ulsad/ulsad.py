"""ULSAD: features rebuilt from themselves, and from all of the image through a narrow gap.

Source: "Revisiting Deep Feature Reconstruction for Logical and Structural Industrial Anomaly
Detection" (Patra and Ben Taieb, TMLR 2024) and its released code. A structural anomaly is seen
where a network trained on normal features fails to rebuild them. A logical one (something missing,
or one too many) has normal features everywhere; it is seen where what a network of 64 numbers an
image knows of it disagrees with what its features predict.

| paper | here | meaning |
| --- | --- | --- |
| F | features | frozen features, reduced to C channels, standardised, (B, C, H, W) |
| R_l | rebuilt | what the feature network makes of F to be like F |
| R_g | predicted | its other half, to be like A |
| A | imagined | what the image network makes of the image |
| lambda_l, lambda_a, lambda_g | local_, attention_, global_direction | weight of 1 - cosine |
| L_pl | local | distance of F and R_l |
| L_pg | attention | distance of Att(F, F, F) and Att(A, F, F) |
| L_lg | global | distance of A and R_g |
| q_a, q_b | low, high | 0.9 and 0.995 quantiles of each map on normal images |

The map is the mean of the local and the global distance, each rescaled to 0 at q_a and 0.1 at q_b.
The loss is the sum of the three; nothing of it reaches the backbone, so features and images are
read from where they are stored. Left out: the configuration's tiling, schedule and early stopping,
which do nothing in the released code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import Fraction, MethodOptions, NotNegative, OnlyWith, Positive, PositiveInt
from models.deployment.memory import normalised_pixels
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.features.multiscale import join_stages, split_images
from models.method import Method
from models.methods.ulsad.losses import attend, patch_distance
from models.methods.ulsad.networks import FeatureAutoencoder, ImageAutoencoder
from models.methods.ulsad.scales import blurred, quantiles_of
from models.training.hold_out import hold_out
from models.training.loop import Loop, summed

LOCAL = OnlyWith("branches", "both or local", lambda branches: branches != "global")
GLOBAL = OnlyWith("branches", "both or global", lambda branches: branches != "local")
RESCALED = (0.0, 0.1)
"""What the quantiles become."""
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST_STD = 1e-6


@dataclass(frozen=True, kw_only=True)
class UlsadOptions(MethodOptions):
    """ULSAD: a local and a global branch; the paper's values."""

    branches: Literal["both", "local", "global"] = "both"
    """Which are trained and scored; local alone is the method dfr."""
    channels: PositiveInt = 384
    """Channels of the features at most: more are averaged in groups of neighbours (released)."""
    bottleneck: Annotated[PositiveInt, GLOBAL] = 8
    """Side of the image network's last encoding convolution: it sees images of 32 times as many
    pixels whole, and takes none smaller (released: 8, for 256)."""
    final_relu: bool = True
    """End the feature network in a ReLU (released): what is below 0 in features stays wrong."""
    tie: Annotated[Literal["attention", "direct"], GLOBAL] = "attention"
    """Compare image and feature network's output with features by attention, or entry by entry."""
    detach_global: Annotated[bool, GLOBAL] = False
    """Let the global loss train the feature network alone (released: both networks)."""
    local_direction: Annotated[NotNegative, LOCAL] = 0.5
    """Weight of 1 - cosine in the local distance."""
    attention_direction: Annotated[NotNegative, GLOBAL] = 0.5
    """The same in the attention loss (released: by a slip, the global one's)."""
    global_direction: Annotated[NotNegative, GLOBAL] = 0.5
    """The same in the global distance."""
    quantiles: Literal["each_epoch", "last_epoch", "none"] = "each_epoch"
    """Rescale maps by their quantiles on held-out normal images, whenever the head is scored; only
    after the last epoch (released), so that one that was best before has raw maps; or never."""
    validation_share: Fraction = 0.1
    """Normal images held out for the quantiles where the data set keeps none for that; with 0,
    those trained on."""
    learning_rate: Positive = 2e-4
    """Of Adam (released)."""
    weight_decay: NotNegative = 2e-5
    """Of Adam (released)."""
    batch_size: PositiveInt = 8
    """Images per step (released); a last, smaller batch is left out."""
    epochs: PositiveInt = 200
    """Passes over the training images (released)."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it; scores are float32."""


class Ulsad(Detector):
    """Distance of features to what is rebuilt of them, locally and from the whole image.

    Attributes:
        part_names: of the maps that `score_parts` returns.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor
    pooling: Tensor

    def __init__(self, features: FeatureShape, options: UlsadOptions) -> None:
        super().__init__()
        self.options = options
        C = min(options.channels, features.channels)
        both = options.branches == "both"
        self.part_names = ("local", "global") if both else (options.branches,)
        self.rebuild = FeatureAutoencoder(C, 2 * C if both else C, final_relu=options.final_relu)
        self.imagine: ImageAutoencoder | None = None
        if options.branches != "local":
            self.imagine = ImageAutoencoder(C, options.bottleneck)
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))
        self.register_buffer("low", torch.zeros(len(self.part_names)))
        self.register_buffer("high", torch.full((len(self.part_names),), RESCALED[1]))
        groups = F.adaptive_avg_pool1d(torch.eye(features.channels)[None], C)[0]  # (channels, C)
        self.register_buffer("pooling", groups.T.contiguous(), persistent=False)
        for name, values in (("pixel_mean", IMAGE_MEAN), ("pixel_std", IMAGE_STD)):
            shaped = rearrange(torch.tensor(values), "c -> 1 c 1 1")
            self.register_buffer(name, shaped, persistent=False)
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train both networks, then set the quantiles; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the images are too small, or too few.
        """
        options = self.options
        for network in (self.rebuild, self.imagine):
            if network is not None:
                network.initialise(generator)
        training, held = self._hold_out(bank, generator)
        self._standardise(training)
        optimizer = torch.optim.Adam(
            self.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        smallest = min(options.batch_size, len(training))

        def batches() -> Iterator[list[Tensor]]:
            for stages in training.stage_batches(options.batch_size, generator=generator):
                if len(stages[0]) >= smallest:
                    yield stages

        def set_quantiles(epoch: int) -> None:
            is_watched = monitor is not None and monitor.scores_steps
            wants_each = options.quantiles == "each_epoch" and is_watched
            self._forget_quantiles()
            if wants_each or (epoch == options.epochs and options.quantiles != "none"):
                self._set_quantiles(held)

        loop = Loop(
            module=self,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            mixed_precision=options.mixed_precision,
        )
        loop.run(
            batches,
            lambda stages: summed(self.losses(stages)),
            monitor=monitor,
            after_epoch=set_quantiles,
        )

    def losses(self, stages: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the terms of the loss, each a scalar, of a batch."""
        options = self.options
        features, rebuilt, predicted, imagined = self._compared(stages)
        losses = {}
        if rebuilt is not None:
            losses["local"] = patch_distance(features, rebuilt, options.local_direction).mean()
        if imagined is not None and predicted is not None:
            wanted, found = features, imagined
            if options.tie == "attention":
                wanted, found = attend(features, features), attend(imagined, features)
            tied = patch_distance(wanted, found, options.attention_direction)
            losses["attention"] = tied.mean()
            goal = imagined.detach() if options.detach_global else imagined
            losses["global"] = patch_distance(goal, predicted, options.global_direction).mean()
        return losses

    def standardised(self, stages: Sequence[Tensor]) -> Tensor:
        """Return F, (B, C, H, W), of the stages' maps."""
        joined = join_stages(stages)
        weight = self.pooling / rearrange(self.std, "c -> c 1")
        return F.conv2d(joined, rearrange(weight, "c d -> c d 1 1"), -self.mean / self.std)

    def score_parts(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the rescaled map (B, H, W) of each branch; their mean is the anomaly map."""
        parts = self._distances(stages)
        span = (self.high - self.low) / (RESCALED[1] - RESCALED[0])
        return [
            RESCALED[0] + (part - low) / width
            for part, low, width in zip(parts, self.low, span, strict=True)
        ]

    def score_stages(self, stages: Sequence[Tensor]) -> Scored:
        """See `Detector.score_stages`."""
        return torch.stack(self.score_parts(stages)).mean(dim=0), None

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        ended = {"epochs": step}
        if self.options.quantiles == "last_epoch" and step < self.options.epochs:
            return {**ended, "quantiles": "none"}
        return ended

    def _compared(
        self, stages: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return features, rebuilt, predicted and imagined ones; None of a branch left out."""
        maps, images = split_images(stages)
        assert images is not None
        features = self.standardised(maps)
        found = self.rebuild(features)
        if self.imagine is None:
            return features, found, None, None
        self._check_side(images)
        imagined = self.imagine(normalised_pixels(images, self.pixel_mean, self.pixel_std))
        if imagined.shape[2:] != features.shape[2:]:
            imagined = F.interpolate(imagined, features.shape[2:], mode="bilinear")
        if self.options.branches == "global":
            return features, None, found, imagined
        rebuilt, predicted = found.chunk(2, dim=1)
        return features, rebuilt, predicted, imagined

    def _distances(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the map (B, H, W) of each branch before it is rescaled."""
        features, rebuilt, predicted, imagined = self._compared(stages)
        parts = []
        if rebuilt is not None:
            parts.append(patch_distance(features, rebuilt, self.options.local_direction))
        if imagined is not None and predicted is not None:
            parts.append(patch_distance(imagined, predicted, self.options.global_direction))
        return parts

    def _hold_out(
        self, bank: FeatureSource, generator: torch.Generator
    ) -> tuple[FeatureSource, FeatureSource]:
        """Return the images to train on, and those whose maps give the quantiles."""
        training, held = bank, bank.held_out
        if held is None and self.options.quantiles != "none":
            training, held = hold_out(bank, self.options.validation_share, generator)
        if len(training) < 2 or self.options.batch_size < 2:
            # Batch norm sees a single number of each channel at the bottleneck.
            raise ModelError(
                f"ULSAD trains on batches of at least two images; there are {len(training)} to "
                f"train on, and --method.batch-size is {self.options.batch_size}"
            )
        return training, training if held is None else held

    @torch.no_grad()
    def _standardise(self, training: FeatureSource) -> None:
        """Set mean and deviation of each channel over all positions of the training images."""
        total = torch.zeros(2, len(self.mean), dtype=torch.float64, device=self.mean.device)
        count = 0
        self.mean.zero_()
        self.std.fill_(1)
        for stages in training.stage_batches(self.options.batch_size):
            found = self.standardised(split_images(stages)[0])  # not yet: reduced alone
            positions = rearrange(found, "b c h w -> (b h w) c").double()
            total += torch.stack([positions.sum(dim=0), positions.square().sum(dim=0)])
            count += len(positions)
        mean, square = total / count
        self.mean.copy_(mean)
        self.std.copy_((square - mean.square()).clamp_min(0).sqrt() + SMALLEST_STD)

    def _forget_quantiles(self) -> None:
        self.low.fill_(RESCALED[0])
        self.high.fill_(RESCALED[1])

    @torch.no_grad()
    def _set_quantiles(self, held: FeatureSource) -> None:
        """Measure the quantiles of each map, at the size of the images and blurred."""
        found: list[list[Tensor]] = [[] for _ in self.part_names]
        for stages in held.stage_batches(self.options.batch_size):
            size = stages[-1].shape[2:]
            for pixels, part in zip(found, self._distances(stages), strict=True):
                pixels.append(blurred(part, size).cpu())
        low, high = torch.stack([quantiles_of(pixels) for pixels in found]).unbind(dim=1)
        if not (high > low).all():
            raise ModelError(
                "the maps of the held-out normal images are constant: they give no scale; train "
                "longer, or --method.quantiles none"
            )
        self.low.copy_(low)
        self.high.copy_(high)

    def _check_side(self, images: Tensor) -> None:
        side, least = images.shape[-1], 32 * self.options.bottleneck
        if side < least:
            raise ModelError(
                f"the image network takes images of at least {least} pixels; these have {side}: "
                f"--image-size {least} --crop-size none, or --method.bottleneck {side // 32}"
            )


class _Exported(nn.Module):
    """`Ulsad` for a graph, which gets joined features and images."""

    def __init__(self, detector: Ulsad) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """Return anomaly maps (B, H, W) of features (B, C, H, W) and uint8 images (B, 3, S, S)."""
        return self.detector.score_stages([features, images])[0]


METHOD = Method(
    detector=lambda: Ulsad,
    options=UlsadOptions(),
    tasks=frozenset({"structured"}),
    takes=frozenset({"features", "images"}),
    published_as="ULSAD",
    scales_on_held_out=True,
    experiment={
        "structured": {
            "backbone": "wide_resnet50_2.racm_in1k",
            "layers": (2, 3),
            "image_size": 256,
            "crop_size": None,
            "resize": "opencv_square",
            "patch_size": 1,
        }
    },
)
