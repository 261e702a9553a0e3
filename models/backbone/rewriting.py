"""A frozen network rewritten to compute the same function in less time, or more precisely.

In fp32, batch normalisations become part of the convolutions before them, and convolutions that pad
on one side only (as in networks ported from TensorFlow) get a kernel that pads on both. In half
precision, convolutions over few channels stay in fp32.
"""

import copy

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-3
"""Largest difference of a map that still counts as rounding, relative to its largest value."""
NARROW = 16
"""Input channels, within a group, from which half precision is left to a convolution."""


def accelerated(net: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of a network in eval mode that gives the same maps faster.

    With fixed statistics a normalisation after a convolution is a scale of the kernel and a bias:
    the same function up to rounding, with one pass over memory less for each of them. Which
    normalisation follows which convolution is seen by running the network; those that no
    convolution feeds, and those another part of the network looks at, stay as they are.

    Args:
        net: returns a list of maps.
        example: (B, 3, S, S) float32, an input of it.

    Returns:
        The copy; `net` itself where nothing can be rewritten, or where that changes the result by
        more than rounding (a convolution's output is used twice).
    """
    fast = copy.deepcopy(net)
    pairs = _pairs(fast, example)
    place = {module: name for name, module in fast.named_modules()}
    for convolution, normalisation in pairs:
        _replace(fast, place[convolution], fuse_conv_bn_eval(convolution, normalisation))
        _replace(fast, place[normalisation], _activation(normalisation))
    one_sided = [(n, m) for n, m in fast.named_modules() if OneSidedConv.replaces(m)]
    for name, convolution in one_sided:
        _replace(fast, name, OneSidedConv(convolution))
    if not pairs and not one_sided:
        return net
    fast = fast.to(memory_format=torch.channels_last).requires_grad_(False)
    with torch.inference_mode():
        same = all(
            bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
            for a, b in zip(net(example), fast(example), strict=True)
        )
    return fast if same else net


def with_narrow_in_full(net: nn.Module) -> nn.Module:
    """Return a copy of a network whose convolutions over few channels leave autocast.

    A sum over the 9 products of a depthwise kernel, or the 27 of a first layer, averages out little
    of its terms' rounding, and matrix units do not speed it up. Measured on EfficientNet-Lite0 and
    real images: features in bfloat16 differ from those in fp32 by 2 to 3 % so, else by 6 to 7 %.

    Args:
        net: to be run under autocast.
    """
    copied = copy.deepcopy(net)
    narrow = [
        (name, module)
        for name, module in copied.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.in_channels // module.groups < NARROW
        # A module with hooks is one whose input or output is taken as a feature.
        and not (module._forward_hooks or module._forward_pre_hooks)
    ]
    for name, module in narrow:
        _replace(copied, name, FullPrecision(module))
    return copied


class FullPrecision(nn.Module):
    """A module that computes in float32 whatever autocast allows around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        """Return what the module returns, float32."""
        with torch.autocast(images.device.type, enabled=False):
            return self.module(images.float())


class OneSidedConv(nn.Module):
    """A convolution of stride 2 with TensorFlow's "same" padding, without a padded copy.

    TensorFlow pads an even side by one more at its end than at its start. A kernel with a row and a
    column of zeros before it, and that larger padding on both sides, sees the same pixels. Padding
    the input instead copies it, and on a CPU falls out of the channels-last layout: measured, four
    times as slow on a depthwise convolution.

    Args:
        convolution: one that `replaces` accepts.
    """

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        assert isinstance(convolution, Conv2dSame)
        self.padded = convolution
        self.weight = nn.Parameter(F.pad(convolution.weight.detach(), (1, 0, 1, 0)))

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Tell whether a module is such a convolution, and nothing looks at it from outside."""
        return (
            type(module) is Conv2dSame
            and module.stride == (2, 2)
            and module.dilation == (1, 1)
            and all(side % 2 == 1 and side > 1 for side in module.kernel_size)
            and not (module._forward_hooks or module._forward_pre_hooks)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return what the convolution returns, (B, C_out, H / 2, W / 2)."""
        if any(side % 2 for side in images.shape[2:]):  # padded on both sides alike
            return self.padded(images)
        conv = self.padded
        end = [(side - 1) // 2 for side in conv.kernel_size]
        return F.conv2d(images, self.weight, conv.bias, conv.stride, end, 1, conv.groups)


def _pairs(net: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return each normalisation that was given exactly what a convolution returned, with it."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, inputs[0], output))

    handles = [
        module.register_forward_hook(record)
        for module in net.modules()
        # A module with hooks is one whose input or output is taken as a feature.
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    ]
    with torch.inference_mode():
        net(example)
    for handle in handles:
        handle.remove()
    times = {module: sum(other is module for other, _, _ in calls) for module, _, _ in calls}
    # `calls` keeps every tensor alive, so that no two share an address.
    made_by = {id(output): module for module, _, output in calls if isinstance(module, nn.Conv2d)}
    pairs = []
    for module, given, _ in calls:
        maker = made_by.get(id(given))
        if (
            isinstance(maker, nn.Conv2d)
            and isinstance(module, nn.BatchNorm2d)
            and type(module) in {nn.BatchNorm2d, BatchNormAct2d}
            and module.track_running_stats
            and times[module] == times[maker] == 1
        ):
            pairs.append((maker, module))
    return pairs


def _activation(normalisation: nn.BatchNorm2d) -> nn.Module:
    """Return what a normalisation layer of timm does after normalising."""
    if isinstance(normalisation, BatchNormAct2d):
        return nn.Sequential(normalisation.drop, normalisation.act)
    return nn.Identity()


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
