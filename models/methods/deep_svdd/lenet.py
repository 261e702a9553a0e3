"""The LeNets of Deep SVDD: encoders without biases, and the decoders that pretrain them.

Source: "Deep One-Class Classification" (Ruff et al., ICML 2018), section 4.1; what the paper leaves
open (order of layers, batch normalisation, the decoders) is as in the released code
(lukasruff/Deep-SVDD-PyTorch). A bias, or the learned shift of a batch normalisation, would let the
encoder map everything to the center (the paper's proposition 2), so there are none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-4
LAYOUT = torch.channels_last
"""Of the weights: so few channels take half the time on a CPU, and grey images have no layout."""
CODE_GRID = 4
"""Side of the grid a code is laid out on before it is decoded."""


@dataclass(frozen=True)
class LeNet:
    """One of the architectures.

    Attributes:
        channels: of the image.
        size: side of the image.
        widths: outputs of the encoder's convolutions; each halves the side.
        code_dim: outputs of the encoder.
        normalise_code: whether the code is batch-normalised before it is decoded.
        decoder: outputs of the decoder's convolutions but the last, whether the grid is doubled
            before each, and how much its 5 x 5 kernel is padded.
    """

    channels: int
    size: int
    widths: tuple[int, ...]
    code_dim: int
    normalise_code: bool
    decoder: tuple[tuple[int, bool, int], ...]


NETWORKS = {
    "cifar": LeNet(
        channels=3,
        size=32,
        widths=(32, 64, 128),
        code_dim=128,
        normalise_code=True,
        decoder=((128, False, 2), (64, True, 2), (32, True, 2)),  # sides 4, 8, 16
    ),
    "mnist": LeNet(
        channels=1,
        size=28,
        widths=(8, 4),
        code_dim=32,
        normalise_code=False,
        decoder=((4, True, 2), (8, True, 1)),  # sides 8, 14
    ),
}


def build_encoder(net: LeNet, leakiness: float) -> nn.Sequential:
    """Return a network from images (B, channels, size, size) to codes (B, code_dim)."""
    layers: list[nn.Module] = []
    inputs, side = net.channels, net.size
    for width in net.widths:
        layers += [_convolution(inputs, width), *_normalised_relu(width, leakiness)]
        layers.append(nn.MaxPool2d(2))
        inputs, side = width, side // 2
    layers += [nn.Flatten(), nn.Linear(inputs * side * side, net.code_dim, bias=False)]
    return nn.Sequential(*layers).to(memory_format=LAYOUT)


def build_decoder(net: LeNet, leakiness: float) -> nn.Sequential:
    """Return a network from codes (B, code_dim) to images (B, channels, size, size) in 0 to 1."""
    layers: list[nn.Module] = []
    if net.normalise_code:
        layers.append(nn.BatchNorm1d(net.code_dim, eps=BATCH_NORM_EPS, affine=False))
    inputs = net.code_dim // CODE_GRID**2
    layers += [nn.Unflatten(1, (inputs, CODE_GRID, CODE_GRID)), nn.LeakyReLU(leakiness)]
    for width, doubled, padding in net.decoder:
        if doubled:
            layers.append(nn.Upsample(scale_factor=2))
        layers += [_convolution(inputs, width, padding), *_normalised_relu(width, leakiness)]
        inputs = width
    layers += [nn.Upsample(scale_factor=2), _convolution(inputs, net.channels), nn.Sigmoid()]
    return nn.Sequential(*layers).to(memory_format=LAYOUT)


@torch.no_grad()
def draw_weights(module: nn.Module, leakiness: float, generator: torch.Generator) -> None:
    """Draw all weights anew from a CPU generator: uniform as Glorot has it, section 4.1.

    Convolutions get the gain of the leaky ReLU that follows, as in the released code.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            is_convolution = isinstance(layer, nn.Conv2d)
            gain = nn.init.calculate_gain("leaky_relu", leakiness) if is_convolution else 1.0
            weight = torch.empty(layer.weight.shape)
            nn.init.xavier_uniform_(weight, gain, generator=generator)
            layer.weight.copy_(weight)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()


def global_contrast_normalise(pixels: Tensor) -> Tensor:
    """Center each image (B, C, S, S) and divide it by the mean absolute value of its entries.

    An image of one colour becomes zero.
    """
    centered = pixels - pixels.mean(dim=(1, 2, 3), keepdim=True)  # (B, C, S, S)
    scale = centered.abs().mean(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return centered / scale.clamp(min=torch.finfo(scale.dtype).eps)


def _convolution(inputs: int, outputs: int, padding: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 5, padding=padding, bias=False)


def _normalised_relu(width: int, leakiness: float) -> list[nn.Module]:
    return [nn.BatchNorm2d(width, eps=BATCH_NORM_EPS, affine=False), nn.LeakyReLU(leakiness)]
