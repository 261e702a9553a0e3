"""SimpleNet, and the norm-constrained discriminator: normal features against noisy ones.

Source: "SimpleNet: A Simple Network for Image Anomaly Detection and Localization" (CVPR 2023) and
its released code, which differ; every difference is an option. One is left out: the released code
averages neighbouring channels of each stage's unfolded 3 x 3 patches, and then of all stages, down
to 1536. Features here are averaged over the patch already, so there is nothing to unfold; the paper
concatenates as we do, and with its backbone both have 1536 channels.

| paper | here | meaning |
| --- | --- | --- |
| F, o | features, positions | frozen backbone features (B, C, H, W), as positions (P, C) |
| G, q | adaptor, adapted | adapted features; with `norm`, on a sphere of that radius |
| epsilon, q- | noise, noisy | Gaussian noise of standard deviation sigma, and q plus it |
| D | discriminator | one logit per position, high for normal; the score is its negative |
| th | threshold | the truncated L1 loss asks for D(q) >= th and D(q-) <= -th |

Every ablation of the paper is one option of the command line: `--layers`, `--patch-size`,
`--backbone`, `--method.adaptor`, `--method.loss`, `--method.sigma`. Norm and sigma are swept by

    for norm in none 0.5 1 2; do for sigma in 0.005 0.015 0.05 0.15; do
      python train_mvtec.py demo nc_disc --method.norm $norm --method.sigma $sigma
    done; done

which gives each pair a run folder of its own.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from configs.options import (
    FeatureOptions,
    NotNegative,
    OnlyWith,
    OptionalFloat,
    OptionalInt,
    Positive,
    PositiveInt,
)
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.method import Method
from models.methods.simplenet.adaptor import Adaptor
from models.methods.simplenet.discriminator import Discriminator, cross_entropy, truncated_l1
from models.methods.simplenet.noise import GaussianNoise
from models.training.loop import Loop, Losses
from models.training.mixed_precision import bfloat16_autocast

ADAPTED = OnlyWith("adaptor", "linear or mlp", lambda adaptor: adaptor != "none")
TRIVIAL_SHARE = 0.98
"""A last epoch whose loss exceeds this share of the trivial solution's gets a remark."""

SMALLEST_LENGTH = 1e-12
"""Adapted features shorter than this are not scaled up to the norm: they have no direction."""


class TrivialSolutionWarning(UserWarning):
    """Training ended no better than a discriminator that always answers zero."""


@dataclass(frozen=True, kw_only=True)
class SimpleNetOptions(FeatureOptions):
    """SimpleNet: linear adaptor, Gaussian noise, and a discriminator whose logit is the score."""

    adaptor: Literal["linear", "none", "mlp"] = "linear"
    """Of the features (paper: linear; Table 3 compares none and one hidden layer)."""
    adaptor_bias: Annotated[bool, ADAPTED] = False
    """Give the adaptor's layers a bias (paper: no; released code: yes)."""
    norm: OptionalFloat = None
    """Put adapted features on a sphere of this radius, before the noise and before the score; none
    is SimpleNet, nc_disc has 1. A zero feature stays zero."""
    sigma: Positive = 0.015
    """Standard deviation of the noise per entry (paper; Fig. 5)."""
    hidden: OptionalInt = None
    """Hidden units of the discriminator; none for as many as channels (released code: 1024)."""
    last_bias: bool = True
    """Give the discriminator's last layer a bias (released code: no)."""
    init: Literal["default", "xavier"] = "default"
    """Initial weights: PyTorch's default or Xavier-normal (released code)."""
    loss: Literal["truncated_l1", "cross_entropy"] = "truncated_l1"
    """Of the discriminator (paper: truncated_l1; Table 3 compares cross_entropy)."""
    threshold: Annotated[
        Positive, OnlyWith("loss", "truncated_l1", lambda loss: loss == "truncated_l1")
    ] = 0.5
    """th of the truncated L1 loss (paper)."""
    learning_rate: Positive = 2e-4
    """Of the discriminator's Adam (paper)."""
    adaptor_learning_rate: Annotated[Positive, ADAPTED] = 1e-4
    """Of the adaptor (paper)."""
    weight_decay: NotNegative = 1e-5
    """Of the discriminator's Adam (paper)."""
    adaptor_weight_decay: Annotated[NotNegative, ADAPTED] = 1e-5
    """Of the adaptor (paper; released code: 1e-2, AdamW's default)."""
    adaptor_optimizer: Annotated[Literal["adam", "adamw"], ADAPTED] = "adam"
    """Of the adaptor (paper: adam; released code: adamw)."""
    batch_size: PositiveInt = 4
    """Images per step (paper; released code: 8; semantic: 64)."""
    epochs: PositiveInt = 160
    """Passes over the training features (paper; released code: 40 x 4)."""
    report_every: PositiveInt = 1
    """Epochs between two reports, and two evaluations where the test set is watched (released
    code: 4)."""
    mixed_precision: bool = False
    """Train the head in bfloat16 where a CUDA device computes in it (the noise is added, and scores
    are computed, in float32); ignored elsewhere."""


class SimpleNet(Detector):
    """Adaptor, Gaussian noise and discriminator on stored features; `norm` makes it `nc_disc`.

    Without `norm` sigma is absolute, and features of large norm drown the noise; with it sigma is a
    noise-to-signal ratio that means the same for every backbone and data set.

    A last batch of a single position (a 1 x 1 grid with one image left over) is skipped: its batch
    statistics would be those of one feature and its noise.

    `diagnostics` has, after a fit, the standard deviation of each channel over all training
    positions: "feature_std" of the backbone's features, "adapted_std" of what the discriminator saw
    after the last epoch (the paper's Fig. 4).
    """

    def __init__(self, features: FeatureShape, options: SimpleNetOptions) -> None:
        super().__init__()
        self.options = options
        self.adaptor = Adaptor(
            features.channels, options.adaptor, bias=options.adaptor_bias, init=options.init
        )
        self.discriminator = Discriminator(
            features.channels, options.hidden, last_bias=options.last_bias, init=options.init
        )
        self.eval()  # a loaded head scores; only `fit` trains

    @property
    def trivial_loss(self) -> float:
        """The loss of a discriminator that always answers zero."""
        options = self.options
        return 2 * options.threshold if options.loss == "truncated_l1" else 2 * math.log(2)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw adaptor and discriminator anew from a CPU generator."""
        self.adaptor.initialise(generator)
        self.discriminator.initialise(generator)

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train adaptor and discriminator; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the bank holds a single position.
        """
        options = self.options
        self.initialise(generator)
        self.remarks = []
        device = self.discriminator.last.weight.device
        noise = GaussianNoise(options.sigma, generator, device)

        def batches() -> Iterator[Tensor]:
            is_empty = True
            for features in bank.batches(options.batch_size, generator=generator):
                positions = rearrange(features, "b c h w -> (b h w) c")
                if len(positions) > 1:
                    yield positions
                    is_empty = False
            if is_empty:
                raise ModelError("SimpleNet needs at least two positions in a batch to train on")

        def losses(positions: Tensor) -> Losses:
            with bfloat16_autocast(positions.device, wanted=options.mixed_precision):
                normal, noisy = self.logits(positions, noise)
            logits = {"normal_logit": normal.mean(), "noisy_logit": noisy.mean()}
            return {"loss": self.loss(normal, noisy), **logits}

        optimizer, of_adaptor = self._optimizers()
        loop = Loop(
            module=self,
            optimizer=optimizer,
            second_optimizer=of_adaptor,
            epochs=options.epochs,
            generator=generator,
            drawn={"noise": noise.generator},
            report_every=options.report_every,
        )
        trained = loop.run(batches, losses, monitor=monitor)
        loss = trained.values[-1]["loss"]
        feature_norm = self._diagnose(bank)
        if loss > TRIVIAL_SHARE * self.trivial_loss:
            self._remark_trivial(loss, feature_norm)

    def logits(self, positions: Tensor, noise: GaussianNoise) -> tuple[Tensor, Tensor]:
        """Return the logits (P,), (P,) of positions (P, C), adapted, and adapted with noise.

        The discriminator sees both in one call, as published: they share its batch statistics.
        """
        adapted = self.adapt(positions)
        both = torch.cat([adapted, noise(adapted)])  # (2P, C)
        normal, noisy = self.discriminator(both).float().chunk(2)
        return normal, noisy

    def loss(self, normal: Tensor, noisy: Tensor) -> Tensor:
        """Return the training loss, a scalar, of normal and noisy logits (P,)."""
        if self.options.loss == "cross_entropy":
            return cross_entropy(normal, noisy)
        return truncated_l1(normal, noisy, self.options.threshold)

    def adapt(self, positions: Tensor) -> Tensor:
        """Return what the discriminator sees, (P, C) float32, of positions (P, C)."""
        adapted, norm = self.adaptor(positions).float(), self.options.norm
        if norm is None:
            return adapted
        length = torch.linalg.vector_norm(adapted, dim=1, keepdim=True)  # (P, 1)
        return adapted * (norm / length.clamp(min=SMALLEST_LENGTH))

    def forward(self, features: Tensor) -> Tensor:
        """Return -D(q) at each position, (B, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")
        logits = self.discriminator(self.adapt(positions))  # (B*H*W,)
        return rearrange(-logits, "(b h w) -> b h w", b=B, h=H, w=W)

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def _optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
        """Return that of the discriminator, and that of the adaptor if it has parameters."""
        options = self.options
        first = torch.optim.Adam(
            self.discriminator.parameters(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
        )
        parameters = list(self.adaptor.parameters())
        if not parameters:
            return first, None
        is_decoupled = options.adaptor_optimizer == "adamw"
        kind = torch.optim.AdamW if is_decoupled else torch.optim.Adam
        return first, kind(
            parameters,
            lr=options.adaptor_learning_rate,
            weight_decay=options.adaptor_weight_decay,
        )

    @torch.no_grad()
    def _diagnose(self, bank: FeatureSource) -> float:
        """Measure the channels' deviations; return the root mean square norm of adapted features.

        Batches are joined by the law of total variance: nothing cancels, whatever the magnitude.
        """
        counts, variances, means = [], [], []
        for features in bank.batches(self.options.batch_size):
            positions = rearrange(features, "b c h w -> (b h w) c")
            both = torch.stack([positions, self.adapt(positions)])  # (2, P, C)
            variance, mean = torch.var_mean(both, dim=1, correction=0)  # (2, C) each
            counts.append(len(positions))
            variances.append(variance)
            means.append(mean)
        weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)  # (batches,)
        within, centres = torch.stack(variances).cpu(), torch.stack(means).cpu()
        mean = torch.tensordot(weights, centres.double(), dims=1)  # (2, C)
        spread = within.double() + (centres - mean) ** 2  # (batches, 2, C)
        variance = torch.tensordot(weights, spread, dims=1)  # (2, C)
        feature_std, adapted_std = variance.sqrt().tolist()
        self.diagnostics = {"feature_std": feature_std, "adapted_std": adapted_std}
        return float((variance[1] + mean[1] ** 2).sum().sqrt())

    def _remark_trivial(self, loss: float, feature_norm: float) -> None:
        noise_norm = self.options.sigma * math.sqrt(len(self.diagnostics["adapted_std"]))
        constraint = "--method.norm 1 (the method nc_disc), " if self.options.norm is None else ""
        remark = (
            f"training ended no better than the trivial solution: the loss is {loss:.4f}, and a "
            f"discriminator that always answers 0 has {self.trivial_loss:.4f}. The noise (sigma "
            f"{self.options.sigma:g}) has norm {noise_norm:.3g}, the adapted features have "
            f"{feature_norm:.3g}: try {constraint}a larger --method.sigma or more --method.epochs"
        )
        self.remarks.append(remark)
        warnings.warn(remark, TrivialSolutionWarning, stacklevel=3)


METHOD = Method(
    detector=lambda: SimpleNet,
    options=SimpleNetOptions(),
    published_as="SimpleNet",
    experiment={"structured": {"layers": (2, 3)}},  # paper: 28 x 28 grid
    # An image is one position here: a batch of 4 has no batch statistics. 64 is NoCo's semantic
    # batch.
    on={"semantic": {"batch_size": 64}},
)
