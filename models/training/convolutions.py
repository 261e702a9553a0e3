"""Blocks that many networks of images are built of."""

import torch
from torch import nn

from models.training.initial_weights import draw_convolution, draw_linear


def conv_block(inputs: int, *outputs: int) -> nn.Sequential:
    """Return 3 x 3 convolutions of these widths, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for width in outputs:
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all layers anew from a CPU generator, by PyTorch's default, and reset the norms."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            draw_convolution(layer, generator)
        elif isinstance(layer, nn.Linear):
            draw_linear(layer, "default", generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.reset_parameters()
        elif isinstance(layer, nn.GroupNorm):
            layer.reset_parameters()
