"""Deep SVDD: a small network trained from scratch to map normal images near one fixed center.

Source: "Deep One-Class Classification" (Ruff et al., ICML 2018) and its released code
(lukasruff/Deep-SVDD-PyTorch). Defaults are the paper's (section 4.1): Adam, batches of 200, weight
decay 1e-6, learning rate 1e-4 for 150 epochs and 1e-5 for 100 more, before that an autoencoder for
250 + 100 epochs, leakiness 0.1, nu 0.1 (the paper tries 0.01 too). The released code differs: 150
epochs of which the last 100 at 1e-5, weight decay 0.5e-6, leakiness 0.01; its autoencoder for MNIST
trains 50 + 100 epochs with weight decay 0.5e-3.

| paper | here | meaning |
| --- | --- | --- |
| phi(x; W) | encoder | the network, without biases |
| c | center | mean code of the normal images before training, fixed |
| R | radius | of the soft boundary |
| nu | nu | share of normal images allowed outside it |
| s(x) | forward | squared distance to c, less R^2 with the soft boundary |

Equation 4 is the objective "one_class", equation 3 "soft_boundary"; their weight term is Adam's
weight decay. R is not found by the paper's line search every 5 epochs: as in the released code it
is 0 for the first 10 epochs and then, after each step, the 1 - nu quantile of the batch's
distances, which minimises equation 3 for fixed weights. Entries of c nearer to 0 than 0.1 are moved
to 0.1 or -0.1, because a zero is matched by zero weights (released code; exact zeros are moved
here too). Pretraining minimises the squared error summed over an image (released code): averaged
over its pixels, the weight decay would weigh hundreds of times as much against it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import (
    Between0And1,
    Bound,
    MethodOptions,
    NotNegative,
    NotNegativeInt,
    OnlyWith,
    Positive,
    PositiveInt,
)
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.method import Method
from models.methods.deep_svdd.lenet import (
    NETWORKS,
    build_decoder,
    build_encoder,
    draw_weights,
    global_contrast_normalise,
)
from models.training.loop import Loop, Losses

SOFT = OnlyWith("objective", "soft_boundary", lambda objective: objective == "soft_boundary")
PRETRAINED = OnlyWith("pretrain_epochs", "above 0", lambda count: count > 0)
CENTER_MARGIN = 0.1
DROP = 0.1
"""Factor of the learning rate after its milestone (paper)."""
GREY = ("mnist", "fashion_mnist", "digits")
"""Data sets that the smaller network is for."""


@dataclass(frozen=True, kw_only=True)
class DeepSvddOptions(MethodOptions):
    """Deep SVDD: a LeNet from random weights, drawn to a fixed centre."""

    network: Literal["cifar", "mnist"] = "cifar"
    """32 x 32 in colour or 28 x 28 in grey, colours averaged (paper, section 4.2)."""
    objective: Literal["one_class", "soft_boundary"] = "one_class"
    """Equation 4, or equation 3 with a radius."""
    nu: Annotated[Between0And1, SOFT] = 0.1
    """Share of normal images allowed outside the soft boundary (paper: 0.1 or 0.01)."""
    warmup_epochs: Annotated[NotNegativeInt, SOFT] = 10
    """Epochs before its radius leaves 0 (released code)."""
    leakiness: NotNegative = 0.1
    """Slope of the leaky ReLU below 0 (paper; released code: 0.01)."""
    learning_rate: Positive = 1e-4
    """Of Adam, in both trainings, before the milestones; a tenth of it after (paper)."""
    milestone: NotNegativeInt = 150
    """Epochs before the learning rate drops (paper; released code: 50)."""
    weight_decay: NotNegative = 1e-6
    """Of Adam (paper; released code: 0.5e-6)."""
    batch_size: Annotated[int, Bound("at least 2", lambda size: size >= 2)] = 200
    """Images per step (paper); one has no batch statistics."""
    epochs: PositiveInt = 250
    """Passes over the training images (paper: 150 + 100; released code: 150)."""
    pretrain_epochs: NotNegativeInt = 350
    """Passes of the autoencoder before (paper: 250 + 100)."""
    pretrain_milestone: Annotated[NotNegativeInt, PRETRAINED] = 250
    """Epochs before its learning rate drops (paper)."""
    pretrain_weight_decay: Annotated[NotNegative, PRETRAINED] = 1e-6
    """Of its Adam (paper)."""


class DeepSvdd(Detector):
    """A LeNet without biases, pretrained as an autoencoder, then drawn to a center.

    Images are normalised to global contrast (L1) and scaled by the least and largest value of the
    normal training images. Both trainings use batch statistics and skip a last batch of a single
    image, which has none; center and scores use running ones. `diagnostics` has the loss of each
    epoch of pretraining, "pretrain_loss".
    """

    center: Tensor
    radius: Tensor
    least: Tensor
    largest: Tensor

    def __init__(self, features: FeatureShape, options: DeepSvddOptions) -> None:
        super().__init__()
        del features  # this method brings its own network
        self.options = options
        self.network = NETWORKS[options.network]
        self.encoder = build_encoder(self.network, options.leakiness)
        self.register_buffer("center", torch.zeros(self.network.code_dim))
        self.register_buffer("radius", torch.zeros(()))
        self.register_buffer("least", torch.zeros(()))
        self.register_buffer("largest", torch.ones(()))
        self.eval()  # a loaded head scores; only `fit` trains

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Pretrain, place the center, train; see `Detector.fit`.

        The monitor sees the epochs of the last part only.

        Raises:
            FloatingPointError: a loss left the finite numbers.
            ModelError: images of another size than the network's, all blank, or fewer than two.
        """
        if len(bank) < 2:
            raise ModelError("Deep SVDD needs at least two training images for batch statistics")
        draw_weights(self.encoder, self.options.leakiness, generator)
        self._measure_range(bank)
        self.radius.zero_()
        self.diagnostics = {"pretrain_loss": self._pretrain(bank, generator, monitor)}
        self.center.copy_(self._mean_code(bank))
        is_soft = self.options.objective == "soft_boundary"
        is_warm = False

        def begin(epoch: int) -> None:
            nonlocal is_warm
            is_warm = epoch > self.options.warmup_epochs

        loop = self._loop(
            self,
            self.encoder,
            generator,
            epochs=self.options.epochs,
            milestone=self.options.milestone,
            weight_decay=self.options.weight_decay,
        )
        loop.run(
            lambda: self._batches(bank, generator),
            lambda images: {"loss": self._loss(images, moves_radius=is_warm)},
            monitor=monitor,
            before_epoch=begin,
            after_epoch=lambda _: {"radius": self.radius.item()} if is_soft else {},
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Return what the network takes, (B, C, size, size), of uint8 images (B, 3, S, S).

        Raises:
            ModelError: S is not the size of the network.
        """
        return (self._contrast(images) - self.least) / (self.largest - self.least)

    def squared_distances(self, images: Tensor) -> Tensor:
        """Return ||phi(x) - c||^2, (B,), of uint8 images (B, 3, S, S)."""
        return (self.encoder(self.normalise(images)) - self.center).square().sum(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores as maps (B, 1, 1); with the soft boundary, above 0 is outside of it."""
        scores = self.squared_distances(images)  # (B,)
        if self.options.objective == "soft_boundary":
            scores = scores - self.radius.square()
        return rearrange(scores, "b -> b 1 1")

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch after pretraining; see `Detector.stopped_at`."""
        return {"epochs": step}

    def _contrast(self, images: Tensor) -> Tensor:
        net = self.network
        height, width = images.shape[2:]
        if (height, width) != (net.size, net.size):
            raise ModelError(
                f"Deep SVDD's network {self.options.network} takes {net.size} x {net.size} images, "
                f"not {height} x {width}: pass --image-size {net.size} --crop-size none"
            )
        pixels = images.float() / 255
        if net.channels == 1:
            pixels = pixels.mean(dim=1, keepdim=True)  # (B, 1, S, S)
        return global_contrast_normalise(pixels)

    @torch.no_grad()
    def _measure_range(self, bank: FeatureSource) -> None:
        """Find the least and largest value of the normal images after contrast normalisation."""
        ranges = [torch.aminmax(self._contrast(b)) for b in bank.batches(self.options.batch_size)]
        self.least.copy_(torch.stack([r.min for r in ranges]).min())
        self.largest.copy_(torch.stack([r.max for r in ranges]).max())
        if not self.largest > self.least:
            raise ModelError("every training image is of a single colour; there is nothing to fit")

    def _pretrain(
        self, bank: FeatureSource, generator: torch.Generator, monitor: Monitor | None
    ) -> list[float]:
        """Train encoder and a decoder, then dropped, to reconstruct; return each epoch's loss."""
        options = self.options
        decoder = build_decoder(self.network, options.leakiness)
        draw_weights(decoder, options.leakiness, generator)
        autoencoder = nn.Sequential(self.encoder, decoder.to(self.center.device))

        def losses(images: Tensor) -> Losses:
            inputs = self.normalise(images)
            squared = F.mse_loss(autoencoder(inputs), inputs, reduction="sum")
            return {"loss": squared / len(inputs)}

        loop = self._loop(
            autoencoder,
            autoencoder,
            generator,
            epochs=options.pretrain_epochs,
            milestone=options.pretrain_milestone,
            weight_decay=options.pretrain_weight_decay,
            phase="pretraining",
        )
        trained = loop.run(
            lambda: self._batches(bank, generator), losses, monitor=monitor, is_first_phase=True
        )
        return [values["loss"] for values in trained.values]

    @torch.no_grad()
    def _mean_code(self, bank: FeatureSource) -> Tensor:
        batches = bank.batches(self.options.batch_size)
        totals = [self.encoder(self.normalise(b)).double().sum(dim=0) for b in batches]
        mean = torch.stack(totals).sum(dim=0) / len(bank)  # (D,)
        sign = torch.where(mean < 0, -1.0, 1.0)
        return torch.where(mean.abs() < CENTER_MARGIN, CENTER_MARGIN * sign, mean)

    def _loss(self, images: Tensor, *, moves_radius: bool) -> Tensor:
        """Return the objective; move the radius of the soft boundary if that is asked for."""
        distances = self.squared_distances(images)  # (B,)
        if self.options.objective == "one_class":
            return distances.mean()
        loss = soft_boundary_loss(distances, self.radius, self.options.nu)
        if moves_radius:
            self.radius.copy_(torch.quantile(distances.detach().sqrt(), 1 - self.options.nu))
        return loss

    def _batches(self, bank: FeatureSource, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield those of an epoch, but for a last single image."""
        for images in bank.batches(self.options.batch_size, generator=generator):
            if len(images) > 1:
                yield images

    def _loop(
        self,
        module: nn.Module,
        trained: nn.Module,
        generator: torch.Generator,
        *,
        epochs: int,
        milestone: int,
        weight_decay: float,
        phase: str = "epochs",
    ) -> Loop:
        """Return how a part of a module is trained: by Adam, in two steps of the learning rate."""
        optimizer = torch.optim.Adam(
            trained.parameters(), lr=self.options.learning_rate, weight_decay=weight_decay
        )
        return Loop(
            module=module,
            optimizer=optimizer,
            epochs=epochs,
            generator=generator,
            rate=lambda passed: DROP if passed >= milestone else 1.0,
            phase=phase,
        )


def soft_boundary_loss(distances: Tensor, radius: Tensor, nu: float) -> Tensor:
    """Return R^2 + mean(relu(distance - R^2)) / nu, equation 3, of squared distances (B,)."""
    squared_radius = radius.square()
    return squared_radius + F.relu(distances - squared_radius).mean() / nu


METHOD = Method(
    detector=lambda: DeepSvdd,
    options=DeepSvddOptions(),
    tasks=frozenset({"semantic"}),
    takes=frozenset({"images"}),
    published_as="DSVDD",
    # Paper, section 4.2: a LeNet of its own on images of the data sets' own size.
    experiment={
        "semantic": {"backbone": "lenet", "layers": (0,), "image_size": 32, "crop_size": None},
        **{name: {"image_size": 28} for name in GREY},
    },
    on={name: {"network": "mnist"} for name in GREY},
    ignores=frozenset({"backbone", "weights", "layers", "feature_location"}),
)
