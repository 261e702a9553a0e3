"""What AnomalyNCD puts on the class token: a projection to compare by, classifiers by cosine."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HIDDEN, PROJECTED = 2048, 256
"""Channels of the projection's hidden layers, and of what it returns."""
PROJECTION_STD = 0.02


class Heads(nn.Module):
    """A projection, and several classifiers side by side that share nothing but their input.

    Args:
        width: channels D of the class token.
        kinds: K, labelled ones first.
        count: of classifiers.
    """

    def __init__(self, width: int, kinds: int, count: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(width, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, PROJECTED),
        )
        self.directions = nn.Parameter(torch.zeros(count, kinds, width))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew from a CPU generator: the same on every device.

        Those of the projection are normal, truncated, its biases 0. The classifiers' are uniform up
        to 1 / sqrt(width); their length does not show in what they return, but a longer one turns
        slower.
        """
        for layer in self.projection:
            if isinstance(layer, nn.Linear):
                weight = torch.empty(layer.weight.shape)
                nn.init.trunc_normal_(weight, std=PROJECTION_STD, generator=generator)
                layer.weight.copy_(weight)
                layer.bias.zero_()
        bound = 1 / math.sqrt(self.directions.shape[-1])
        drawn = torch.empty(self.directions.shape).uniform_(-bound, bound, generator=generator)
        self.directions.copy_(drawn)

    def cosines(self, tokens: Tensor) -> Tensor:
        """Return the cosine of class tokens (B, D) and each kind's direction, (heads, B, K)."""
        units = F.normalize(tokens, dim=-1)
        directions = rearrange(F.normalize(self.directions, dim=-1), "h k d -> h d k")
        return units @ directions  # (heads, B, K)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return projections (B, 256), not normalised, and cosines (heads, B, K)."""
        return self.projection(tokens), self.cosines(tokens)
