"""A convolutional autoencoder of images, through a code of one position.

Source: "Improving Unsupervised Defect Segmentation by Applying Structural Similarity to
Autoencoders" (Bergmann et al., VISAPP 2019), Table 1, which is for 128 pixels. The halvings before
its third convolution are as many as leave 8 x 8 positions before the code: two for 128, one more
for 256, one and none for 64 and 32. The decoder mirrors the encoder.
"""

from collections.abc import Sequence

from torch import nn

SLOPE = 0.2
"""Of the leaky ReLU below 0, after all layers but the code and the image (paper)."""
BEFORE_CODE = 8
"""Side of the grid that the code is made of (paper)."""
LATER_HALVINGS = 2
"""Those after the third convolution, which every network has (paper)."""
CHANNELS = 3
Layer = tuple[int, int, int]
"""Kernel, stride, output channels."""


def build_encoder(size: int, width: int, outputs: int) -> nn.Sequential:
    """Return what maps images (B, 3, size, size) to codes (B, outputs, 1, 1).

    Args:
        size: of the images, 32, 64, 128 or 256.
        width: channels of the first layers (paper: 32); later ones have two and four times as many.
        outputs: numbers of a code.
    """
    first = [(4, 2, width)] * _first_halvings(size)
    later = [
        *((3, 1, width), (4, 2, 2 * width), (3, 1, 2 * width), (4, 2, 4 * width)),
        *((3, 1, 2 * width), (3, 1, width)),
    ]
    layers = _convolutions(CHANNELS, [*first, *later])
    return nn.Sequential(*layers, nn.Conv2d(width, outputs, BEFORE_CODE))


def build_decoder(size: int, width: int, code_dim: int) -> nn.Sequential:
    """Return what maps codes (B, code_dim, 1, 1) to images (B, 3, size, size) in 0 to 1.

    Args:
        size: of the images, 32, 64, 128 or 256.
        width: channels of the last layers (paper: 32).
        code_dim: numbers of a code.
    """
    count = _first_halvings(size)
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(code_dim, width, BEFORE_CODE),
        nn.LeakyReLU(SLOPE),
        *_convolutions(width, [(3, 1, 2 * width), (3, 1, 4 * width)]),
        *_doubling(4 * width, 2 * width),
        *_convolutions(2 * width, [(3, 1, 2 * width)]),
        *_doubling(2 * width, width),
    ]
    if count == 0:
        return nn.Sequential(*layers, nn.Conv2d(width, CHANNELS, 3, padding=1), nn.Sigmoid())
    layers += _convolutions(width, [(3, 1, width)])
    for _ in range(count - 1):
        layers += _doubling(width, width)
    return nn.Sequential(*layers, _doubling(width, CHANNELS)[0], nn.Sigmoid())


def _first_halvings(size: int) -> int:
    """Return how many there are before the third convolution."""
    return (size // BEFORE_CODE).bit_length() - 1 - LATER_HALVINGS


def _convolutions(inputs: int, layers: Sequence[Layer]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for kernel, stride, outputs in layers:
        found += [nn.Conv2d(inputs, outputs, kernel, stride, padding=1), nn.LeakyReLU(SLOPE)]
        inputs = outputs
    return found


def _doubling(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inputs, outputs, 4, 2, padding=1), nn.LeakyReLU(SLOPE)]
