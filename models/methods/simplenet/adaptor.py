"""The adaptor: carries features of the frozen backbone over to the domain of the images.

Source: SimpleNet (CVPR 2023), section 3.2 and the ablation of Table 3.
"""

import torch
from torch import Tensor, nn

from models.features.matmul import Linear
from models.training.initial_weights import draw_linear

SLOPE = 0.2
"""Of the leaky rectifiers (the paper's value in the discriminator; the released adaptor's too)."""


class Adaptor(nn.Module):
    """Maps positions (P, C) to positions (P, C).

    Args:
        channels: C.
        kind: "linear", one fully connected layer (paper); "none", the identity; "mlp", one hidden
            layer of C units with a leaky rectifier.
        bias: whether its layers have one (paper: no; released code: yes).
        init: "default" or "xavier", see `draw_linear`.
    """

    def __init__(
        self, channels: int, kind: str = "linear", *, bias: bool = False, init: str = "default"
    ) -> None:
        super().__init__()
        self.init = init
        self.layers = nn.Sequential()
        if kind != "none":
            self.layers.append(Linear(channels, channels, bias=bias))
        if kind == "mlp":
            self.layers.append(nn.LeakyReLU(SLOPE))
            self.layers.append(Linear(channels, channels, bias=bias))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew from a CPU generator."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                draw_linear(layer, self.init, generator)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the adapted positions (P, C) of positions (P, C)."""
        return self.layers(positions)
