"""Affine couplings: a part of the channels is moved as a network makes it of the other part.

Sources: of DifferNet "Same Same But DifferNet" (Rudolph et al., WACV 2021), of Glow "Glow:
Generative Flow with Invertible 1x1 Convolutions" (Kingma and Dhariwal, NeurIPS 2018), each with its
released code, from which the shapes of the scales are.

| paper | here | meaning |
| --- | --- | --- |
| x_a, x_b | passive, active | parts of the channels: what the network sees, what is moved |
| log s, t | log_scale, shift | what it is moved by |
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.methods.flows.layers import Invertible, per_channel
from models.training.initial_weights import draw_linear

ATAN_SLOPE = 0.636
"""2 / pi in short, as DifferNet's released code has it: keeps log-scales within the clamp."""
OPEN = 2.0
"""Added before the sigmoid of Glow's scales, which begin at sigmoid(2) = 0.88."""
HIDDEN_STD = 0.05
"""Of the initial weights of Glow's hidden convolutions (released code)."""
ZERO_SPEED = 3.0
"""Factor of the log-scale of Glow's last convolutions (released code)."""


class AffineCoupling(Invertible):
    """One part of the channels moved by an affine map that a network makes of the other part.

    Args:
        channels: D, at least 2; the first part has D // 2 of them.
        network: from the passive part to two numbers for each active channel, (B, 2A, ...).
        first: whether the first part is the active one; else the second.
    """

    def __init__(self, channels: int, network: nn.Module, *, first: bool = False) -> None:
        super().__init__()
        self.sizes = (channels // 2, channels - channels // 2)
        self.network = network
        self.first = first

    @abstractmethod
    def affine(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-scale and shift (B, A, ...) of the network's output: y = exp(.) x + shift."""

    def initialise(self, generator: torch.Generator) -> None:
        """See `Invertible.initialise`."""
        for layer in self.network.modules():
            if isinstance(layer, nn.Linear):
                draw_linear(layer, "default", generator)
            elif isinstance(layer, Conv):
                layer.initialise(generator)

    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Invertible.located`; of maps and of vectors, as the network takes them."""
        passive, active = self._parts(x)
        log_scale, shift = self.affine(self.network(passive))
        return self._joined(passive, log_scale.exp() * active + shift), log_scale.sum(dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """See `Invertible.inverse`."""
        passive, moved = self._parts(y)
        log_scale, shift = self.affine(self.network(passive))
        return self._joined(passive, (moved - shift) * (-log_scale).exp())

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x.split(self.sizes, dim=1)
        return (other, one) if self.first else (one, other)

    def _joined(self, passive: Tensor, active: Tensor) -> Tensor:
        return torch.cat([active, passive] if self.first else [passive, active], dim=1)


class ClampedCoupling(AffineCoupling):
    """DifferNet's, of vectors: the log-scale stays within a clamp, by an arcus tangens.

    Args:
        channels: D, at least 2.
        width: of the three hidden layers.
        clamp: largest absolute value of a log-scale.
        first: whether the first part is the active one; else the second.
    """

    def __init__(self, channels: int, *, width: int, clamp: float, first: bool) -> None:
        sizes = (channels // 2, channels - channels // 2)
        passive, active = reversed(sizes) if first else sizes
        layers: list[nn.Module] = []
        for inputs in (passive, width, width):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        layers.append(nn.Linear(width, 2 * active))
        super().__init__(channels, nn.Sequential(*layers), first=first)
        self.clamp = clamp

    def affine(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """See `AffineCoupling.affine`."""
        log_scale, shift = raw.chunk(2, dim=1)
        return self.clamp * ATAN_SLOPE * torch.atan(log_scale / self.clamp), shift


class SigmoidCoupling(AffineCoupling):
    """Glow's, of maps: y = (x + t) s with scales s below 1; it begins as y = sigmoid(2) x.

    Args:
        channels: C, at least 2.
        width: channels of the two hidden layers.
    """

    def __init__(self, channels: int, *, width: int) -> None:
        passive, active = channels // 2, channels - channels // 2
        layers = [Conv(passive, width, 3), nn.ReLU(), Conv(width, width, 1), nn.ReLU()]
        super().__init__(channels, nn.Sequential(*layers, ZeroConv(width, 2 * active)))

    def affine(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """See `AffineCoupling.affine`."""
        opening, shift = raw.chunk(2, dim=1)
        log_scale = F.logsigmoid(opening + OPEN)
        return log_scale, log_scale.exp() * shift


class SplitPrior(AffineCoupling):
    """The second part of the channels in units of a Gaussian that the first part predicts.

    Its density under that Gaussian is the standard normal one of the result and the determinant.

    Args:
        channels: C, at least 2; of them C // 2 go on.
    """

    def __init__(self, channels: int) -> None:
        kept = channels // 2
        super().__init__(channels, ZeroConv(kept, 2 * (channels - kept)))

    def affine(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """See `AffineCoupling.affine`."""
        mean, log_std = raw.chunk(2, dim=1)
        return -log_std, -mean * (-log_std).exp()


class Conv(nn.Conv2d):
    """A convolution of Glow's networks, zeros around the maps.

    On a grid of a single position only the middle of a kernel sees anything: the rest is left out.
    """

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__(inputs, outputs, side, padding=side // 2)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw small weights; the bias is 0."""
        self.weight.copy_(HIDDEN_STD * torch.randn(self.weight.shape, generator=generator))
        self.bias.zero_()  # type: ignore[union-attr]

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C_out, H, W) of maps (B, C_in, H, W)."""
        if maps.shape[2:] != (1, 1):
            return super().forward(maps)
        middle = self.padding[0] if isinstance(self.padding, tuple) else 0
        kernel = self.weight[:, :, middle : middle + 1, middle : middle + 1]
        return F.conv2d(maps, kernel, self.bias)


class ZeroConv(Conv):
    """The last convolution of a network, 3 x 3: it gives zeros until it is trained."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.log_scale = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Become zero; nothing is drawn."""
        del generator
        for parameter in self.parameters():
            parameter.zero_()

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C_out, H, W) of maps (B, C_in, H, W)."""
        return super().forward(maps) * per_channel((ZERO_SPEED * self.log_scale).exp())
