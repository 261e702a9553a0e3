"""Initial weights drawn on the CPU from an explicit generator: a seed means the same everywhere."""

import math

import torch
from torch import nn


@torch.no_grad()
def draw_linear(linear: nn.Linear, init: str, generator: torch.Generator) -> None:
    """Draw weight and bias of a linear layer anew.

    Args:
        linear: the layer, on any device.
        init: "default", PyTorch's: both uniform up to 1 / sqrt(inputs); or "xavier": the weight
            normal with variance 2 / (inputs + outputs), the bias as by default.
        generator: a CPU generator.
    """
    outputs, inputs = linear.weight.shape
    bound = 1 / math.sqrt(inputs)
    weight = torch.empty(outputs, inputs)
    if init == "xavier":
        weight.normal_(0, math.sqrt(2 / (inputs + outputs)), generator=generator)
    else:
        weight.uniform_(-bound, bound, generator=generator)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(torch.empty(outputs).uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def draw_convolution(
    layer: nn.Conv2d | nn.ConvTranspose2d, generator: torch.Generator, *, gain: float | None = None
) -> None:
    """Draw weight and bias of a convolution anew.

    Args:
        layer: on any device.
        generator: a CPU generator.
        gain: of a Xavier-uniform weight; None for PyTorch's default, uniform up to 1 / sqrt(fan
            in). The bias is PyTorch's default in both cases.
    """
    weight = torch.empty(layer.weight.shape)
    receptive = weight[0, 0].numel()
    # As PyTorch counts them: of a transposed convolution the second axis are the outputs.
    fan_in, fan_out = weight.shape[1] * receptive, weight.shape[0] * receptive
    default = 1 / math.sqrt(fan_in)
    bound = default if gain is None else gain * math.sqrt(6 / (fan_in + fan_out))
    layer.weight.copy_(weight.uniform_(-bound, bound, generator=generator))
    if layer.bias is not None:
        bias = torch.empty(layer.bias.shape).uniform_(-default, default, generator=generator)
        layer.bias.copy_(bias)
