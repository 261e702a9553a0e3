"""NoCo: a linear projector drawn to one random objective of fixed norm; distance is the score.

Source: "A Norm-Constrained Method for Semantic and Structured Anomaly Detection Tasks".

| paper | here | meaning |
| --- | --- | --- |
| F | features | frozen backbone features, (B, C, H, W) |
| P | projector | 1 x 1 convolution with bias |
| Z | projected | P(F) |
| G | objective | norm * g / ||g||, drawn once, never trained |
| r | radius | learnable margin; the loss counts what exceeds radius^2 |
| nu | nu | the loss is divided by it |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from configs.options import FeatureOptions, NotNegative, OptionalInt, Positive, PositiveInt
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.features.multiscale import add_outer, features_at, grid_size, parts_in_cache, project
from models.method import Method
from models.training.loop import Loop


@dataclass(frozen=True, kw_only=True)
class NocoOptions(FeatureOptions):
    """NoCo: linear projector, one random objective of fixed norm, distance as the score."""

    norm: Positive = 1.0
    """Euclidean norm of the objective G (paper: about 1 is best for both kinds of task)."""
    objective: Literal["randn", "rand", "ones", "mean"] = "randn"
    """How G is drawn before it is scaled (paper's ablation); mean: of the untrained outputs."""
    out_dim: OptionalInt = None
    """Outputs of the projector; none for as many as features have channels (paper)."""
    loss: Literal["distance", "squared"] = "distance"
    """Of relu(||Z - G|| - r^2) / nu, or of the squared distance; the score is the same quantity."""
    nu: Positive = 1e-3
    """Divisor of the loss (released code: 1e-3 structured, 1 semantic)."""
    radius_init: float = 1e-5
    """The learnable margin r before training (released code)."""
    radius_weight: float = 0.0
    """Adds radius_weight * r to the loss (released CIFAR script: 1e3)."""
    learning_rate: Positive = 1e-4
    """Of AdamW (released code: 1e-4 structured, 1e-3 semantic)."""
    weight_decay: NotNegative = 5e-4
    """Of AdamW (released code)."""
    amsgrad: bool = True
    """Use AdamW's amsgrad variant (released code)."""
    batch_size: PositiveInt = 16
    """Images per step (released code: 16 MVTec, 8 MPDD and VisA, 64 semantic)."""
    epochs: PositiveInt = 50
    """Passes over the training features (released code: 50, CIFAR 10, MNIST 20)."""


class Noco(Detector):
    """The norm-constrained detector, trained as published."""

    objective: Tensor

    def __init__(self, features: FeatureShape, options: NocoOptions) -> None:
        super().__init__()
        self.options = options
        out_dim = options.out_dim or features.channels
        self.projector = nn.Linear(features.channels, out_dim)
        self.radius = nn.Parameter(torch.tensor(options.radius_init))
        self.register_buffer("objective", torch.zeros(out_dim))

    def initialise(self, bank: FeatureSource, generator: torch.Generator) -> None:
        """Draw projector and objective, on the CPU, so that a seed means the same everywhere."""
        out_dim, channels = self.projector.weight.shape
        bound = 1 / math.sqrt(channels)  # PyTorch's default for a 1 x 1 convolution
        weight = torch.empty(out_dim, channels).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(out_dim).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.projector.weight.copy_(weight)
            self.projector.bias.copy_(bias)
            self.radius.fill_(self.options.radius_init)
            direction = self._direction(bank, generator).double()
            self.objective.copy_(self.options.norm * direction / direction.norm())

    def _direction(self, bank: FeatureSource, generator: torch.Generator) -> Tensor:
        size, kind = self.objective.shape, self.options.objective
        if kind == "randn":
            return torch.randn(size, generator=generator)
        if kind == "rand":
            return torch.rand(size, generator=generator)
        if kind == "ones":
            return torch.ones(size)
        # The projector is affine, so the mean of its outputs is its output at the mean feature.
        batches = bank.batches(self.options.batch_size)
        totals = [features.double().mean(dim=(2, 3)).sum(dim=0) for features in batches]
        mean_feature = torch.stack(totals).sum(dim=0) / len(bank)  # (C,)
        return self.projector(mean_feature.float())

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train projector and radius by AdamW; see `Detector.fit`."""
        options = self.options
        self.initialise(bank, generator)
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            amsgrad=options.amsgrad,
        )
        loop = Loop(module=self, optimizer=optimizer, epochs=options.epochs, generator=generator)
        loop.run(
            lambda: bank.stage_batches(options.batch_size, generator=generator),
            lambda stages: {"loss": self.loss(stages)},
            monitor=monitor,
            after_epoch=lambda _: {"radius": self.radius.item()},
        )

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def loss(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the training loss, a scalar, of normal features: stages (B, C_l, H_l, W_l)."""
        excess = _MeanExcess.apply(
            self.projector.weight, self._offset, self.radius**2, self._is_squared, *stages
        )
        return excess / self.options.nu + self.options.radius_weight * self.radius

    def score_stages(self, stages: Sequence[Tensor]) -> Scored:
        """Return what `score` returns, projecting each stage at its own size."""
        maps = [
            _lengths(project(part, self.projector.weight, self._offset), squared=self._is_squared)
            for part in parts_in_cache(stages, len(self.objective))
        ]
        return torch.cat(maps), None

    def forward(self, features: Tensor) -> Tensor:
        """Return the distance (or squared distance) of Z to G at each position, (B, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")
        residual = F.linear(positions, self.projector.weight, self._offset)  # (B*H*W, D)
        distance = _lengths(residual, squared=self._is_squared)  # (B*H*W,)
        return rearrange(distance, "(b h w) -> b h w", b=B, h=H, w=W)

    @property
    def _is_squared(self) -> bool:
        return self.options.loss == "squared"

    @property
    def _offset(self) -> Tensor:
        """The bias with G folded into it: Z - G costs no pass of its own."""
        return self.projector.bias - self.objective

    def geometry(self, stages: Sequence[Tensor], maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ||Z|| and the angle between Z and G, the paper's Fig. 3; see `Detector.geometry`.

        The angle is 2 atan2(|u - v|, |u + v|) for u, v scaled to one length: unlike the arc cosine
        it keeps its digits near 0 and pi.
        """
        places = maps.flatten(1).argmax(dim=1, keepdim=True)  # (B, 1)
        highest = features_at(stages, places).squeeze(1)  # (B, C)
        projected, objective = self.projector(highest).double(), self.objective.double()
        norms = torch.linalg.vector_norm(projected, dim=1, keepdim=True)  # (B, 1)
        u, v = projected * objective.norm(), objective * norms  # (B, D)
        half = torch.atan2(
            torch.linalg.vector_norm(u - v, dim=1), torch.linalg.vector_norm(u + v, dim=1)
        )  # (B,)
        return norms.squeeze(1).float(), (2 * half).float()


class _MeanExcess(torch.autograd.Function):
    """Mean over positions of relu(distance - margin), with the gradient taken on the way.

    Residuals (B, H, W, D) are by far the largest thing in a step. They are made for a few images at
    a time, turned into their part of the gradient while the cache still holds them, and forgotten;
    `backward` only scales the sums.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, offset: Tensor, margin: Tensor, squared: bool, *stages: Tensor
    ) -> Tensor:
        """Args: (D, C), (D,), (), whether distances are squared, (B, C_l, H_l, W_l) each."""
        H, W = grid_size(stages)
        positions = len(stages[0]) * H * W
        total, num_active = torch.zeros_like(margin), torch.zeros_like(margin)
        weight_sums, offset_sums = torch.zeros_like(weight), torch.zeros_like(offset)
        for part in parts_in_cache(stages, len(offset)):
            residual = project(part, weight, offset)  # (b, H, W, D)
            distance = _lengths(residual, squared=squared)  # (b, H, W)
            active = distance > margin
            total += (distance - margin).clamp_min(0).sum()
            num_active += active.sum()
            # d distance / d residual is residual / distance, or 2 residual where it is squared.
            slope = torch.full_like(distance, 2.0) if squared else 1 / distance
            residual *= rearrange(torch.where(active, slope, 0.0), "b h w -> b h w 1")
            offset_sums += residual.sum(dim=(0, 1, 2))
            add_outer(weight_sums, part, residual)
        ctx.save_for_backward(*(s / positions for s in (weight_sums, offset_sums, -num_active)))
        return total / positions

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight, offset and margin; the features have none."""
        scaled = [gradient * saved for saved in ctx.saved_tensors]
        return (*scaled, *(None for _ in ctx.needs_input_grad[len(scaled) :]))


def _lengths(residual: Tensor, *, squared: bool) -> Tensor:
    """Return the (squared) Euclidean norm over the last dimension."""
    return residual.square().sum(dim=-1) if squared else torch.linalg.vector_norm(residual, dim=-1)


METHOD = Method(
    detector=lambda: Noco,
    options=NocoOptions(),
    published_as="NoCo",
    on={
        # What the released semantic scripts change, whatever the data set.
        "semantic": {
            "loss": "squared",
            "nu": 1.0,
            "learning_rate": 1e-3,
            "batch_size": 64,
            "epochs": 10,
        },
        **{name: {"batch_size": 8} for name in ("mpdd", "visa")},
        # The released CIFAR script adds 1e3 * r to the loss; it serves these data sets.
        **{
            name: {"radius_weight": 1e3}
            for name in ("cifar10", "cifar100", "cifar100_coarse", "cats_vs_dogs")
        },
        **{name: {"epochs": 20} for name in ("mnist", "fashion_mnist", "digits")},
    },
)
