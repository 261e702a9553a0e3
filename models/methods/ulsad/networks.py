"""The two networks of ULSAD: one rebuilds features, the other makes features of an image.

Sizes are those of the released code: 384 channels and images of 256 pixels give 65,487,744 and
1,030,720 parameters. All widths of the first follow the features' channels C; the second looks at
images, and only its output follows them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.training.initial_weights import draw_convolution

XAVIER_GAIN = (2 / (1 + 0.01**2)) ** 0.5
"""Of a leaky ReLU of slope 0.01."""
WIDTH = 32
"""Channels of the image network's first layers; its inner ones have twice as many."""
STEPS = 5
"""Halvings of the image before the bottleneck."""


class FeatureAutoencoder(nn.Module):
    """Encoder and decoder of features, without skips; a quarter of the side in between.

    Args:
        channels: C of the features.
        outputs: channels of the result: C for one branch, 2C for both.
        final_relu: whether the last layer ends in a ReLU, as released: it cannot give negative
            values, though standardised features have them.
    """

    def __init__(self, channels: int, outputs: int, *, final_relu: bool) -> None:
        super().__init__()
        C = channels
        last = nn.ConvTranspose2d(C, outputs, 5, 1, 2)
        self.layers = nn.Sequential(
            *_block(nn.Conv2d(C, 2 * C, 3, 2, 1)),
            *_block(nn.Conv2d(2 * C, 4 * C, 3, 2, 1)),
            *_block(nn.Conv2d(4 * C, 4 * C, 3, 1, 1), relu=False),
            *_block(nn.ConvTranspose2d(4 * C, 2 * C, 4, 2, 1)),
            *_block(nn.ConvTranspose2d(2 * C, C, 4, 2, 1)),
            *_block(last, relu=final_relu),
        )

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew from a CPU generator, and reset the batch norms."""
        _initialise(self, generator, gain=XAVIER_GAIN)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, outputs, H, W) of features (B, C, H, W)."""
        found = self.layers(features)
        return _resized(found, features.shape[2:])


class ImageAutoencoder(nn.Module):
    """Squeezes an image into a few numbers and makes features of these.

    Args:
        outputs: channels of the result.
        bottleneck: side of the last encoding convolution: images of 32 times as many pixels become
            one position. Larger ones keep several, and no position has seen all of the image.
    """

    def __init__(self, outputs: int, bottleneck: int) -> None:
        super().__init__()
        w, self.bottleneck = WIDTH, bottleneck
        self.encoder = nn.Sequential(
            *_plain(nn.Conv2d(3, w, 4, 2, 1)),
            *_plain(nn.Conv2d(w, w, 4, 2, 1)),
            *_plain(nn.Conv2d(w, 2 * w, 4, 2, 1)),
            *_plain(nn.Conv2d(2 * w, 2 * w, 4, 2, 1)),
            *_plain(nn.Conv2d(2 * w, 2 * w, 4, 2, 1)),
            *_plain(nn.Conv2d(2 * w, 2 * w, bottleneck, 1, 0)),
        )
        up = [nn.Sequential(*_plain(nn.Conv2d(2 * w, 2 * w, 4, 1, 2))) for _ in range(STEPS)]
        self.decoder = nn.ModuleList(
            [*up, nn.Sequential(*_plain(nn.Conv2d(2 * w, 2 * w, 3, 1, 1)))]
        )
        self.last = nn.Conv2d(2 * w, outputs, 3, 1, 1)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew from a CPU generator, and reset the batch norms."""
        _initialise(self, generator, gain=None)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, outputs, S // 8, S // 8), linear, of normalised images (B, 3, S, S)."""
        side = pixels.shape[-1]
        found = self.encoder(pixels)
        sizes = [max(1, side // 64 - 1), side // 32, side // 16 - 1, side // 8 - 1, side // 4 - 1]
        for size, layer in zip([*sizes, side // 8], self.decoder, strict=True):
            found = layer(_resized(found, (size, size)))
        return self.last(found)


def _block(layer: nn.Module, *, relu: bool = True) -> list[nn.Module]:
    """Return a convolution of the feature network with its batch norm."""
    norm = nn.BatchNorm2d(layer.out_channels)  # type: ignore[arg-type]
    return [layer, norm, nn.ReLU()] if relu else [layer, norm]


def _plain(layer: nn.Conv2d) -> list[nn.Module]:
    """Return a convolution of the image network: its batch norm has no parameters."""
    return [layer, nn.BatchNorm2d(layer.out_channels, eps=1e-4, affine=False), nn.ReLU()]


def _resized(maps: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def _initialise(network: nn.Module, generator: torch.Generator, *, gain: float | None) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            draw_convolution(layer, generator, gain=gain)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.reset_parameters()
