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
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from models.detector import Detector, FeatureSource, Monitor
from models.errors import ModelError
from models.features.multiscale import add_outer, features_at, grid_size, parts_in_cache, project

OBJECTIVES = ("randn", "rand", "ones", "mean")
LOSSES = ("distance", "squared")


class Noco(Detector):
    """The norm-constrained detector, trained as published.

    Args:
        channels: channels of the features.
        norm: Euclidean norm of the objective.
        objective: how its direction is made: "randn", "rand", "ones", or "mean" (the mean of the
            untrained projector's output over the training features).
        out_dim: outputs of the projector; None for as many as channels.
        loss: "distance", mean relu(||Z - G|| - r^2) / nu, scored by ||Z - G||; or "squared", mean
            relu(||Z - G||^2 - r^2) / nu, scored by ||Z - G||^2.
        nu: divisor of the loss.
        radius_init: the radius before training.
        radius_weight: adds radius_weight * r to the loss (1e3 in the released CIFAR script).
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        amsgrad: of AdamW.
        batch_size: images per step.
        epochs: passes over the training features.
    """

    objective: Tensor

    def __init__(
        self,
        channels: int,
        *,
        norm: float = 1.0,
        objective: str = "randn",
        out_dim: int | None = None,
        loss: str = "distance",
        nu: float = 1e-3,
        radius_init: float = 1e-5,
        radius_weight: float = 0.0,
        learning_rate: float = 1e-4,
        weight_decay: float = 5e-4,
        amsgrad: bool = True,
        batch_size: int = 16,
        epochs: int = 50,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ModelError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
        if loss not in LOSSES:
            raise ModelError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
        self.norm = norm
        self.objective_kind = objective
        self.loss_kind = loss
        self.nu = nu
        self.radius_init = radius_init
        self.radius_weight = radius_weight
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.amsgrad = amsgrad
        self.batch_size = batch_size
        self.epochs = epochs
        self.projector = nn.Linear(channels, out_dim or channels)
        self.radius = nn.Parameter(torch.tensor(radius_init))
        self.register_buffer("objective", torch.zeros(out_dim or channels))

    def initialise(self, bank: FeatureSource, generator: torch.Generator) -> None:
        """Draw projector and objective, on the CPU, so that a seed means the same everywhere."""
        out_dim, channels = self.projector.weight.shape
        bound = 1 / math.sqrt(channels)  # PyTorch's default for a 1 x 1 convolution
        weight = torch.empty(out_dim, channels).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(out_dim).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.projector.weight.copy_(weight)
            self.projector.bias.copy_(bias)
            self.radius.fill_(self.radius_init)
            direction = self._direction(bank, generator).double()
            self.objective.copy_(self.norm * direction / direction.norm())

    def _direction(self, bank: FeatureSource, generator: torch.Generator) -> Tensor:
        size = self.objective.shape
        if self.objective_kind == "randn":
            return torch.randn(size, generator=generator)
        if self.objective_kind == "rand":
            return torch.rand(size, generator=generator)
        if self.objective_kind == "ones":
            return torch.ones(size)
        # The projector is affine, so the mean of its outputs is its output at the mean feature.
        totals = [f.double().mean(dim=(2, 3)).sum(dim=0) for f in bank.batches(self.batch_size)]
        mean_feature = torch.stack(totals).sum(dim=0) / len(bank)  # (C,)
        return self.projector(mean_feature.float())

    def fit(
        self,
        bank: FeatureSource,
        *,
        generator: torch.Generator,
        monitor: Monitor | None = None,
    ) -> None:
        """Train projector and radius by AdamW; see `Detector.fit`."""
        self.initialise(bank, generator)
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )
        for epoch in tqdm(range(1, self.epochs + 1), desc="epochs", leave=False, disable=None):
            losses = []
            for stages in bank.stage_batches(self.batch_size, generator=generator):
                loss = self.loss(stages)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            mean_loss = mean_of_finite(losses, epoch)
            if monitor is not None:
                monitor(epoch, {"loss": mean_loss, "radius": self.radius.item()})

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def loss(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the training loss, a scalar, of normal features: stages (B, C_l, H_l, W_l)."""
        squared = self.loss_kind == "squared"
        excess = _MeanExcess.apply(
            self.projector.weight, self._offset, self.radius**2, squared, *stages
        )
        return excess / self.nu + self.radius_weight * self.radius

    def score_stages(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return what `score` returns, projecting each stage at its own size."""
        squared = self.loss_kind == "squared"
        maps = [
            _lengths(project(part, self.projector.weight, self._offset), squared=squared)
            for part in parts_in_cache(stages, len(self.objective))
        ]
        return torch.cat(maps), None

    def forward(self, features: Tensor) -> Tensor:
        """Return the distance (or squared distance) of Z to G at each position, (B, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")
        residual = F.linear(positions, self.projector.weight, self._offset)  # (B*H*W, D)
        distance = _lengths(residual, squared=self.loss_kind == "squared")  # (B*H*W,)
        return rearrange(distance, "(b h w) -> b h w", b=B, h=H, w=W)

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


def mean_of_finite(losses: list[Tensor], epoch: int) -> float:
    """Average an epoch's losses with one device-to-host copy.

    Raises:
        FloatingPointError: one is not finite; epoch and step are named.
    """
    values = torch.stack(losses).double().cpu()
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        step = int(bad[0]) + 1
        raise FloatingPointError(
            f"loss is {values[step - 1].item()} at epoch {epoch}, step {step}; "
            "lower --method.learning-rate"
        )
    return values.mean().item()
