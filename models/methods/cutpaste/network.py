"""The network of CutPaste: a ResNet-18 from random weights, and the head that is dropped."""

from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

BLOCKS = (2, 2, 2, 2)
"""Residual blocks of each stage: ResNet-18's."""
NARROW = 16
"""Channels of the first stage below which pixels are not laid out channels last: oneDNN writes past
its memory in the backward pass of 1 x 1 convolutions of stride 2 over fewer (its issue 6035)."""
CODE = 128
"""Width of the head's last hidden layer (reimplementations; the paper states none)."""


class Network(nn.Module):
    """A ResNet-18 and the head that classifies what it sees.

    Args:
        width: channels of the first stage, doubled by each that follows; those of the stem are
            always ResNet-18's 64.
        head_layers: hidden layers of the head before the last one.
        head_width: their units.
        classes: of the head's output.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, width: int, head_layers: int, head_width: int, classes: int) -> None:
        super().__init__()
        channels = tuple(width * 2**stage for stage in range(len(BLOCKS)))
        self.dims = channels[-1]
        self.is_narrow = width < NARROW
        block: Any = BasicBlock  # timm's annotation asks for an instance
        self.resnet = ResNet(block, BLOCKS, num_classes=0, channels=channels, zero_init_last=False)
        layers: list[nn.Module] = []
        inputs = self.dims
        for outputs in [head_width] * head_layers + [CODE]:
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
            inputs = outputs
        self.head = nn.Sequential(*layers, nn.Linear(inputs, classes))
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, 3, S, S) as the network takes them: float32, normalised."""
        pixels = (images.float() / 255 - self.mean) / self.std
        return pixels.contiguous() if self.is_narrow else pixels

    def maps(self, pixels: Tensor) -> Tensor:
        """Return the last stage's maps (B, D, h, w) of normalised pixels."""
        return self.resnet.forward_features(pixels)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of uint8 images (B, 3, S, S)."""
        return self.head(self.maps(self.pixels(images)).mean(dim=(2, 3)))
