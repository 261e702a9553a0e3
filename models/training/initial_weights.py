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
