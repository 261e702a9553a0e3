"""The discriminator: a small network that tells adapted features from noisy ones, and its loss.

Source: SimpleNet (CVPR 2023), sections 3.4 and 3.5 and the ablation of Table 3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.features.matmul import Linear
from models.methods.simplenet.adaptor import SLOPE
from models.training.initial_weights import draw_linear


class Discriminator(nn.Module):
    """Linear, batch normalisation, leaky rectifier, linear: one number per position.

    Args:
        channels: C.
        hidden: units of the hidden layer; None for C (paper; released code: 1024).
        last_bias: whether the last layer has a bias (released code: no).
        init: "default" or "xavier", see `draw_linear`.
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        *,
        last_bias: bool = True,
        init: str = "default",
    ) -> None:
        super().__init__()
        self.init = init
        width = channels if hidden is None else hidden
        self.first = Linear(channels, width)
        self.normalisation = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 1, bias=last_bias)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew from a CPU generator and forget the batch statistics."""
        draw_linear(self.first, self.init, generator)
        self.normalisation.reset_parameters()
        draw_linear(self.last, self.init, generator)

    def forward(self, positions: Tensor) -> Tensor:
        """Return logits (P,) of positions (P, C); high for normal features."""
        hidden = self.normalisation(self.first(positions))  # (P, hidden)
        return self.last(F.leaky_relu(hidden, SLOPE, inplace=True)).squeeze(1)  # (P,)


def truncated_l1(normal: Tensor, noisy: Tensor, threshold: float) -> Tensor:
    """Return the mean of relu(th - D(q)) + relu(th + D(q-)), a scalar.

    Args:
        normal: logits (P,) of normal features.
        noisy: logits (P,) of noisy features.
        threshold: th; a logit beyond it on the right side costs nothing.
    """
    return F.relu(threshold - normal).mean() + F.relu(threshold + noisy).mean()


def cross_entropy(normal: Tensor, noisy: Tensor) -> Tensor:
    """Return the mean of -log s(D(q)) - log(1 - s(D(q-))), s the logistic function, a scalar.

    Args:
        normal: logits (P,) of normal features.
        noisy: logits (P,) of noisy features.
    """
    return F.softplus(-normal).mean() + F.softplus(noisy).mean()
