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
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from models.methods.simplenet.adaptor import Adaptor
from models.detector import Detector, FeatureSource, Monitor
from models.methods.simplenet.discriminator import Discriminator, cross_entropy, truncated_l1
from models.errors import ModelError
from models.methods.simplenet.noise import GaussianNoise
from models.training.mixed_precision import bfloat16_autocast
from models.methods.noco import mean_of_finite

LOSSES = ("truncated_l1", "cross_entropy")
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
REPORTED = ("loss", "normal_logit", "noisy_logit")
"""What the monitor gets, each a mean over the steps since its last call."""
TRIVIAL_SHARE = 0.98
"""A last epoch whose loss exceeds this share of the trivial solution's gets a remark."""

SMALLEST_LENGTH = 1e-12
"""Adapted features shorter than this are not scaled up to the norm: they have no direction."""


class TrivialSolutionWarning(UserWarning):
    """Training ended no better than a discriminator that always answers zero."""


class SimpleNet(Detector):
    """Adaptor, Gaussian noise and discriminator on stored features; `norm` makes it `nc_disc`.

    Without `norm` sigma is absolute, and features of large norm drown the noise; with it sigma is a
    noise-to-signal ratio that means the same for every backbone and data set.

    A last batch of a single position (a 1 x 1 grid with one image left over) is skipped: its batch
    statistics would be those of one feature and its noise.

    Args:
        channels: channels of the features.
        adaptor: "linear", "none" or "mlp" (one hidden layer).
        adaptor_bias: whether the adaptor's layers have a bias.
        norm: the adapted feature becomes norm * q / ||q|| before the noise is added and before it
            is scored; None leaves it as it is. A zero feature stays zero.
        sigma: standard deviation of the noise, per entry.
        hidden: hidden units of the discriminator; None for as many as channels.
        last_bias: whether the discriminator's last layer has a bias.
        init: "default" (PyTorch's) or "xavier" (normal), of all linear layers.
        loss: "truncated_l1" or "cross_entropy".
        threshold: th of the truncated L1 loss.
        learning_rate: of the discriminator's Adam.
        adaptor_learning_rate: of the adaptor's optimizer.
        weight_decay: of the discriminator's Adam.
        adaptor_weight_decay: of the adaptor's optimizer.
        adaptor_optimizer: "adam" or "adamw".
        batch_size: images per step.
        epochs: passes over the training features.
        report_every: epochs between two calls of the monitor.
        mixed_precision: train under bfloat16 autocast where a CUDA device computes in it (compute
            capability 8.0 and above); the noise is added, and scores are computed, in float32. No
            effect elsewhere.

    Attributes:
        remarks: what a reader of the fit's numbers must know, in words; empty when all is well.
    """

    def __init__(
        self,
        channels: int,
        *,
        adaptor: str = "linear",
        adaptor_bias: bool = False,
        norm: float | None = None,
        sigma: float = 0.015,
        hidden: int | None = None,
        last_bias: bool = True,
        init: str = "default",
        loss: str = "truncated_l1",
        threshold: float = 0.5,
        learning_rate: float = 2e-4,
        adaptor_learning_rate: float = 1e-4,
        weight_decay: float = 1e-5,
        adaptor_weight_decay: float = 1e-5,
        adaptor_optimizer: str = "adam",
        batch_size: int = 4,
        epochs: int = 160,
        report_every: int = 1,
        mixed_precision: bool = True,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ModelError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
        if adaptor_optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise ModelError(f"adaptor optimizer {adaptor_optimizer!r} is not one of {known}")
        self.norm = norm
        self.sigma = sigma
        self.loss_kind = loss
        self.threshold = threshold
        self.learning_rate = learning_rate
        self.adaptor_learning_rate = adaptor_learning_rate
        self.weight_decay = weight_decay
        self.adaptor_weight_decay = adaptor_weight_decay
        self.adaptor_optimizer = adaptor_optimizer
        self.batch_size = batch_size
        self.epochs = epochs
        self.report_every = report_every
        self.mixed_precision = mixed_precision
        self.adaptor = Adaptor(channels, adaptor, bias=adaptor_bias, init=init)
        self.discriminator = Discriminator(channels, hidden, last_bias=last_bias, init=init)
        self.remarks: list[str] = []
        self._diagnostics: dict[str, list[float]] = {}
        self.eval()  # a loaded head scores; only `fit` trains

    @property
    def trivial_loss(self) -> float:
        """The loss of a discriminator that always answers zero."""
        return 2 * self.threshold if self.loss_kind == "truncated_l1" else 2 * math.log(2)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw adaptor and discriminator anew from a CPU generator."""
        self.adaptor.initialise(generator)
        self.discriminator.initialise(generator)

    def fit(
        self,
        bank: FeatureSource,
        *,
        generator: torch.Generator,
        monitor: Monitor | None = None,
    ) -> None:
        """Train adaptor and discriminator; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the bank holds a single position.
        """
        self.initialise(generator)
        self.remarks = []
        device = self.discriminator.last.weight.device
        noise = GaussianNoise(self.sigma, generator, device)
        optimizers = self._optimizers()
        unreported = []
        means: list[float] = []
        for epoch in tqdm(range(1, self.epochs + 1), desc="epochs", leave=False, disable=None):
            self.train()
            steps = []
            for features in bank.batches(self.batch_size, generator=generator):
                positions = rearrange(features, "b c h w -> (b h w) c")
                if len(positions) > 1:
                    steps.append(self._step(positions, noise, optimizers))
            self.eval()
            if not steps:
                raise ModelError("SimpleNet needs at least two positions in a batch to train on")
            columns = torch.stack(steps).unbind(dim=1)  # 3 of (steps,)
            means = [mean_of_finite(list(column), epoch) for column in columns]
            unreported.append(means)
            if monitor is not None and (epoch % self.report_every == 0 or epoch == self.epochs):
                values = [sum(column) / len(column) for column in zip(*unreported, strict=True)]
                monitor(epoch, dict(zip(REPORTED, values, strict=True)))
                unreported = []
        feature_norm = self._diagnose(bank)
        if means[0] > TRIVIAL_SHARE * self.trivial_loss:
            self._remark_trivial(means[0], feature_norm)

    def _step(
        self, positions: Tensor, noise: GaussianNoise, optimizers: list[torch.optim.Optimizer]
    ) -> Tensor:
        """Take one step; return the `REPORTED` values (3,), still on the device."""
        with bfloat16_autocast(positions.device, wanted=self.mixed_precision):
            normal, noisy = self.logits(positions, noise)
        loss = self.loss(normal, noisy)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return torch.stack([loss, normal.mean(), noisy.mean()]).detach()  # (3,)

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
        if self.loss_kind == "cross_entropy":
            return cross_entropy(normal, noisy)
        return truncated_l1(normal, noisy, self.threshold)

    def adapt(self, positions: Tensor) -> Tensor:
        """Return what the discriminator sees, (P, C) float32, of positions (P, C)."""
        adapted = self.adaptor(positions).float()
        if self.norm is None:
            return adapted
        length = torch.linalg.vector_norm(adapted, dim=1, keepdim=True)  # (P, 1)
        return adapted * (self.norm / length.clamp(min=SMALLEST_LENGTH))

    def forward(self, features: Tensor) -> Tensor:
        """Return -D(q) at each position, (B, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")
        logits = self.discriminator(self.adapt(positions))  # (B*H*W,)
        return rearrange(-logits, "(b h w) -> b h w", b=B, h=H, w=W)

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def diagnostics(self) -> dict[str, list[float]]:
        """Return the standard deviation of each channel over all training positions.

        "feature_std" is that of the backbone's features, "adapted_std" that of what the
        discriminator saw after the last epoch (the paper's Fig. 4). Empty before `fit`.
        """
        return self._diagnostics

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(
                self.discriminator.parameters(),
                lr=self.learning_rate,
                weight_decay=self.weight_decay,
            )
        ]
        if adaptor_parameters := list(self.adaptor.parameters()):
            kind: type = OPTIMIZERS[self.adaptor_optimizer]
            optimizers.append(
                kind(
                    adaptor_parameters,
                    lr=self.adaptor_learning_rate,
                    weight_decay=self.adaptor_weight_decay,
                )
            )
        return optimizers

    @torch.no_grad()
    def _diagnose(self, bank: FeatureSource) -> float:
        """Measure the channels' deviations; return the root mean square norm of adapted features.

        Batches are joined by the law of total variance: nothing cancels, whatever the magnitude.
        """
        counts, variances, means = [], [], []
        for features in bank.batches(self.batch_size):
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
        self._diagnostics = {"feature_std": feature_std, "adapted_std": adapted_std}
        return float((variance[1] + mean[1] ** 2).sum().sqrt())

    def _remark_trivial(self, loss: float, feature_norm: float) -> None:
        noise_norm = self.sigma * math.sqrt(len(self._diagnostics["adapted_std"]))
        constraint = "--method.norm 1 (the method nc_disc), " if self.norm is None else ""
        remark = (
            f"training ended no better than the trivial solution: the loss is {loss:.4f}, and a "
            f"discriminator that always answers 0 has {self.trivial_loss:.4f}. The noise (sigma "
            f"{self.sigma:g}) has norm {noise_norm:.3g}, the adapted features have "
            f"{feature_norm:.3g}: try {constraint}a larger --method.sigma or more --method.epochs"
        )
        self.remarks.append(remark)
        warnings.warn(remark, TrivialSolutionWarning, stacklevel=3)
