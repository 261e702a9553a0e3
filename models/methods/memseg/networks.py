"""MemSeg's networks: a backbone whose last stage trains, the fusion of its maps, and a decoder."""

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone.extractor import FrozenExtractor, channels_first
from models.errors import ModelError
from models.methods.fine_tuned.fine_tuning import trained_parameters
from models.training.convolutions import conv_block
from models.training.networks.unets import upsampled

HEAD_WIDTH = 48
"""Channels of the decoder's last maps (reimplementation)."""
REDUCTION = 32
"""Of the channels within coordinate attention, which are 8 or more (reimplementation)."""


class PartlyTrained(nn.Module):
    """A copy of a backbone of which only what follows the remembered stages trains.

    Args:
        backbone: with two stages or more.
        stem_too: train all up to the end of stage 0 as well, and let the statistics of every norm
            move.

    Raises:
        ModelError: the backbone has a single stage, or does not say where its stages end.
    """

    def __init__(self, backbone: FrozenExtractor, *, stem_too: bool) -> None:
        super().__init__()
        layers = backbone.layers
        if len(layers) < 2:
            raise ModelError(
                "MemSeg compares maps of some stages and trains the one after them: set --layers "
                "to two or more"
            )
        trained = set(trained_parameters(backbone, layers[-1] - layers[-2]))
        if stem_too:
            everything = trained_parameters(backbone, layers[-1] + 1)
            trained |= set(everything) - set(trained_parameters(backbone, layers[-1]))
        self.net = copy.deepcopy(backbone.net)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name in trained)
        self.stem_too = stem_too

    def train(self, mode: bool = True) -> "PartlyTrained":
        """Let the statistics of the norms that train move; all else stays in eval mode."""
        super().train(mode and self.stem_too)
        if mode and not self.stem_too:
            for module in self.net.modules():
                own = list(module.parameters(recurse=False))
                module.training = bool(own) and all(one.requires_grad for one in own)
        return self

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the stages' maps (B, C_l, H_l, W_l) of normalised pixels (B, 3, S, S)."""
        return channels_first(self.net, self.net(pixels))


class CoordinateAttention(nn.Module):
    """Weighs each channel by row and by column.

    Source: "Coordinate Attention for Efficient Mobile Network Design" (Hou et al., CVPR 2021).

    Args:
        channels: of the maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // REDUCTION)
        self.joint = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.of_rows = nn.Conv2d(hidden, channels, 1)
        self.of_columns = nn.Conv2d(hidden, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, C, H, W), weighted."""
        rows = maps.mean(dim=3, keepdim=True)  # (B, C, H, 1)
        columns = maps.mean(dim=2, keepdim=True).mT  # (B, C, W, 1)
        both = self.joint(torch.cat([rows, columns], dim=2))  # (B, hidden, H + W, 1)
        by_row, by_column = both.split([maps.shape[2], maps.shape[3]], dim=2)
        weights = self.of_rows(by_row).sigmoid() * self.of_columns(by_column.mT).sigmoid()
        return maps * weights  # (B, C, H, W)


class FusionBlock(nn.Module):
    """Joins maps and their differences to the remembered ones, without norms or activations.

    Args:
        channels: of maps and differences together; the result has half of them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = CoordinateAttention(channels)
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.halved = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.Conv2d(channels // 2, channels // 2, 3, padding=1),
        )

    def forward(self, joined: Tensor) -> Tensor:
        """Return maps (B, C / 2, H, W) of joined ones (B, C, H, W)."""
        return self.halved(self.convolution(joined) * self.attention(joined))


class Fusion(nn.Module):
    """Joins the remembered stages, the coarse into the fine, and weighs them by the differences.

    Args:
        widths: channels of the stages, the finest first.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusionBlock(2 * width) for width in widths)
        self.downs = nn.ModuleList(
            nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in itertools.pairwise(widths)
        )

    def forward(self, maps: Sequence[Tensor], differences: Sequence[Tensor]) -> list[Tensor]:
        """Return one map of each stage, (B, C_l, H_l, W_l).

        Args:
            maps: of the stages, the finest first, (B, C_l, H_l, W_l).
            differences: squared, to the remembered ones, of the same shapes.
        """
        joined = [torch.cat(pair, dim=1) for pair in zip(maps, differences, strict=True)]
        fused = [block(one) for block, one in zip(self.blocks, joined, strict=True)]
        weights = [one.mean(dim=1, keepdim=True) for one in differences]  # (B, 1, H_l, W_l)
        for index in reversed(range(len(self.downs))):
            above = self.downs[index](upsampled(fused[index + 1], fused[index]))
            fused[index] = fused[index] + above
            weights[index] = weights[index] * upsampled(weights[index + 1], weights[index])
        return [one * weight for one, weight in zip(fused, weights, strict=True)]


class Decoder(nn.Module):
    """Doubles the deepest map step by step, with the fused maps and the stem's joined in.

    Args:
        stem: channels of the stem's map; None where there is none.
        widths: channels of the fused maps, the finest first.
        deep: channels of the deepest map.
    """

    def __init__(self, stem: int | None, widths: Sequence[int], deep: int) -> None:
        super().__init__()
        befores = [deep, *(2 * width for width in reversed(widths))]
        afters = [*reversed(widths), HEAD_WIDTH]
        self.ups = nn.ModuleList(map(conv_block, befores[:-1], afters[:-1]))
        self.stem: nn.Module | None = None
        before = befores[-1]
        if stem is not None:
            self.stem = nn.Conv2d(stem, HEAD_WIDTH, 3, padding=1)
            self.to_stem = conv_block(before, HEAD_WIDTH)
            before = 2 * HEAD_WIDTH
        self.to_image = conv_block(before, HEAD_WIDTH)
        self.last = nn.Conv2d(HEAD_WIDTH, 2, 3, padding=1)

    def forward(
        self, stem: Tensor | None, fused: Sequence[Tensor], deep: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Return logits (B, 2, *size) of normal and anomalous."""
        found = deep
        for up, one in zip(self.ups, reversed(fused), strict=True):
            found = torch.cat([up(upsampled(found, one)), one], dim=1)
        if self.stem is not None and stem is not None:
            found = torch.cat([self.to_stem(upsampled(found, stem)), self.stem(stem)], dim=1)
        whole = F.interpolate(found, size, mode="bilinear", align_corners=True)
        return self.last(self.to_image(whole))  # (B, 2, *size)
