"""Encoder and decoder of MNAD, for reconstruction: no skip connections between them."""

from torch import nn

from models.training.convolutions import conv_block

CHANNELS = 3
DIVISOR = 8
"""Pixels of an image for each query, along both axes."""


def build_encoder(width: int) -> nn.Sequential:
    """Return what maps images (B, 3, H, W) to queries (B, 8 * width, H / 8, W / 8)."""
    layers: list[nn.Module] = []
    inputs = CHANNELS
    for outputs in (width, 2 * width, 4 * width):
        layers += [conv_block(inputs, outputs, outputs), nn.MaxPool2d(2)]
        inputs = outputs
    # Queries have neither norm nor ReLU.
    last = nn.Conv2d(8 * width, 8 * width, 3, padding=1)
    return nn.Sequential(*layers, conv_block(inputs, 8 * width), last)


def build_decoder(inputs: int, width: int) -> nn.Sequential:
    """Return what maps (B, inputs, H / 8, W / 8) to images (B, 3, H, W) in -1 to 1."""
    layers: list[nn.Module] = []
    for outputs in (8 * width, 4 * width, 2 * width):
        layers += [
            conv_block(inputs, outputs, outputs),
            nn.ConvTranspose2d(outputs, outputs, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
        inputs = outputs
    last = nn.Conv2d(width, CHANNELS, 3, padding=1)
    return nn.Sequential(*layers, conv_block(inputs, width, width), last, nn.Tanh())
