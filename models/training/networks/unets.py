"""Networks that first halve an image several times and then double it again: DRAEM's two.

Source: the released code of "DRAEM" (Zavrtanik et al., ICCV 2021). Levels are pairs of 3 x 3
convolutions, each with batch norm and ReLU, with max pooling between them; on the way back maps are
upsampled bilinearly, corners aligned. Sides need not be divisible: a map is upsampled to the size
that it had.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.training.convolutions import conv_block, initialise
from models.training.networks.sspcab import Sspcab

WEIGHT_STD = 0.02
"""Of the first weights of convolutions and of norms (released code)."""


class Encoder(nn.Module):
    """The way down.

    Args:
        inputs: channels of the image.
        widths: channels of each level.
        sspcab: the first of the last level's two convolutions, with its norm and ReLU, is an SSPCAB
            block, which has both in it; the last two widths must be equal then.
    """

    def __init__(self, inputs: int, widths: Sequence[int], *, sspcab: bool = False) -> None:
        super().__init__()
        self.block = Sspcab(widths[-2]) if sspcab else None
        befores = [inputs, *widths[:-1]]
        self.levels = nn.ModuleList(
            conv_block(before, width, width) for before, width in zip(befores, widths, strict=True)
        )
        if sspcab:
            self.levels[-1] = conv_block(widths[-2], widths[-1])

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Return the maps of all levels, the largest first, and the block's own loss, a scalar."""
        maps: list[Tensor] = []
        loss: Tensor | None = None
        for index, level in enumerate(self.levels):
            below = F.max_pool2d(maps[-1], 2) if maps else images
            if self.block is not None and index == len(self.levels) - 1:
                predicted = self.block(below)
                loss = F.mse_loss(predicted.float(), below.float())
                below = predicted
            maps.append(level(below))
        return maps, loss

    def check(self, images: Tensor) -> None:
        """Check that images (B, C, S, S) have something left on the last level.

        Raises:
            ModelError: they have nothing; or, in training, one image has one position, which is no
                batch to take statistics of.
        """
        size = images.shape[-1]
        least = 2 ** (len(self.levels) - 1)
        if size < least:
            raise ModelError(
                f"images of {size} pixels vanish when they are halved {len(self.levels) - 1} "
                f"times: set --image-size to {least} or more"
            )
        if self.training and len(images) == 1 and size < 2 * least:
            raise ModelError(
                f"a step on a single image of {size} pixels has no batch statistics: set "
                f"--image-size to {2 * least} or more",
                {"batch_size": "or choose another"},
            )


class Rebuilder(nn.Module):
    """An image from an image: DRAEM's network without skips, or EdgRec's, which adds them.

    Args:
        inputs: channels of the image.
        outputs: channels of what is made of it.
        width: channels of the first level; the others have 2, 4, 8 and 8 times as many.
        skips: add each level's map on the way back.
        sspcab: see `Encoder`.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int, *, skips: bool, sspcab: bool = False
    ) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.skips = skips
        self.encoder = Encoder(inputs, widths, sspcab=sspcab)
        self.ups = nn.ModuleList(conv_block(w, w) for w in reversed(widths[:-1]))
        afters = [4 * width, 2 * width, width, width]
        self.blocks = nn.ModuleList(
            conv_block(w, w, after) for w, after in zip(reversed(widths[:-1]), afters, strict=True)
        )
        self.last = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what is made of images (B, inputs, S, S), and the SSPCAB block's own loss."""
        maps, loss = self.encoder(images)
        found = maps[-1]
        for up, block, before in zip(self.ups, self.blocks, reversed(maps[:-1]), strict=True):
            found = up(upsampled(found, before))
            found = block(found + before if self.skips else found)
        return self.last(found), loss  # (B, outputs, S, S)


class Discriminator(nn.Module):
    """Two classes for each pixel: DRAEM's U-Net, which joins each level's map on the way back.

    Args:
        inputs: channels.
        width: of the first level; the others have 2, 4, 8, 8 and 8 times as many.
        sspcab: see `Encoder`.
    """

    def __init__(self, inputs: int, width: int, *, sspcab: bool = False) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
        self.encoder = Encoder(inputs, widths, sspcab=sspcab)
        afters = [8 * width, 4 * width, 2 * width, width, width]
        befores = [8 * width, *afters[:-1]]
        self.ups = nn.ModuleList(map(conv_block, befores, afters))
        self.blocks = nn.ModuleList(
            conv_block(w + after, after, after)
            for w, after in zip(reversed(widths[:-1]), afters, strict=True)
        )
        self.last = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits (B, 2, S, S) of normal and anomalous, and the SSPCAB block's own loss."""
        maps, loss = self.encoder(images)
        found = maps[-1]
        for up, block, before in zip(self.ups, self.blocks, reversed(maps[:-1]), strict=True):
            found = block(torch.cat([up(upsampled(found, before)), before], dim=1))
        return self.last(found), loss


def upsampled(maps: Tensor, like: Tensor) -> Tensor:
    """Return maps (B, C, h, w) at the size of other maps."""
    return F.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=True)


@torch.no_grad()
def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew: of convolutions normal about 0, of norms about 1.

    Biases, and what else there is, are drawn as PyTorch does.

    Args:
        network: on any device.
        generator: a CPU generator.
    """
    initialise(network, generator)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            mean = 0.0 if isinstance(layer, nn.Conv2d) else 1.0
            drawn = torch.empty(layer.weight.shape)
            layer.weight.copy_(drawn.normal_(mean, WEIGHT_STD, generator=generator))
