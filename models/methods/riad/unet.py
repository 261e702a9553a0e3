"""The U-Net of RIAD: strided convolutions down, transposed ones up, skips by concatenation."""

import torch
from torch import Tensor, nn

from models.training.convolutions import conv_block

CHANNELS = 3
WIDTHS = (1, 2, 4, 8, 8)
"""Channels of each level, in those of the first."""
DIVISOR = 2 ** (len(WIDTHS) - 1)
"""What the sides of an image must be multiples of."""


class UNet(nn.Module):
    """Maps images (B, 3, H, W) to images in -1 to 1.

    Args:
        width: channels of the first level.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        first, *others = [width * factor for factor in WIDTHS]
        self.first = conv_block(CHANNELS, first, first)
        inputs = first
        self.down = nn.ModuleList()
        for outputs in others:
            strided = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
            norm = nn.BatchNorm2d(outputs)
            self.down.append(nn.Sequential(strided, norm, nn.ReLU(), conv_block(outputs, outputs)))
            inputs = outputs
        self.up, self.joined = nn.ModuleList(), nn.ModuleList()
        for outputs in [*others[-2::-1], first]:
            self.up.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
            self.joined.append(conv_block(2 * outputs, outputs, outputs))
            inputs = outputs
        self.last = nn.Conv2d(first, CHANNELS, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W); H and W are multiples of `DIVISOR`."""
        levels = [self.first(images)]
        for down in self.down:
            levels.append(down(levels[-1]))
        found = levels.pop()
        for up, joined in zip(self.up, self.joined, strict=True):
            found = joined(torch.cat([up(found), levels.pop()], dim=1))
        return torch.tanh(self.last(found))
