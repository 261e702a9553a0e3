"""The U-Net of guided diffusion, which tells the noise in an image of a known time.

Source: "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal and Nichol, NeurIPS 2021), as
DDAD's released code has it: residual blocks that halve or double the maps ("BigGAN"), attention on
the smaller maps, the time added to each block. With DDAD's values it has 33.0 million parameters.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.training.convolutions import initialise

CHANNELS = 3
GROUPS = 32
"""Of a group norm, where as many divide the channels."""
LONGEST = 10_000.0
"""Longest period of the sinusoids of a time."""

Drop = Callable[[Tensor], Tensor] | None
"""What sets random entries to 0; None for nothing."""


class UNet(nn.Module):
    """Noise of an image, from the noisy image and its time.

    Args:
        width: channels of the first level; even.
        multipliers: channels of each level over `width`; each level but the first halves the maps.
        blocks: residual blocks of each level on the way down, and one more on the way up.
        attention: how many times smaller than the image maps are that attend to themselves; the
            smallest are always.
        heads: of each attention.
    """

    def __init__(
        self,
        width: int,
        multipliers: Sequence[int],
        *,
        blocks: int,
        attention: Sequence[int],
        heads: int,
    ) -> None:
        super().__init__()
        self.width = width
        self.factor = 2 ** (len(multipliers) - 1)
        widths = [width * multiplier for multiplier in multipliers]
        time = 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(CHANNELS, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skipped = width, [width]
        for level, outputs in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Stage(channels, outputs, time, heads * (2**level in attention)))
                channels = outputs
                skipped.append(channels)
            if level < len(widths) - 1:
                self.down.append(ResidualBlock(channels, channels, time, scale=0.5))
                skipped.append(channels)
        self.middle = nn.ModuleList(
            [Stage(channels, channels, time, heads), ResidualBlock(channels, channels, time)]
        )
        for level, outputs in reversed(list(enumerate(widths))):
            for index in range(blocks + 1):
                inputs = channels + skipped.pop()
                is_last = index == blocks and level > 0
                self.up.append(
                    Stage(inputs, outputs, time, heads * (2**level in attention), doubles=is_last)
                )
                channels = outputs
        self.last_norm = group_norm(channels)
        self.last = nn.Conv2d(channels, CHANNELS, 3, padding=1)

    def forward(self, noisy: Tensor, times: Tensor, drop: Drop = None) -> Tensor:
        """Return the noise in images, (B, 3, S, S).

        Args:
            noisy: (B, 3, S, S); S a multiple of `factor`.
            times: (B,), or (1,) where it is that of all images.
            drop: of the residual blocks.
        """
        time = self.time(sinusoids(times, self.width))  # (B, 4 * width)
        found = self.first(noisy)
        skipped = [found]
        for block in self.down:
            found = block(found, time, drop)
            skipped.append(found)
        for block in self.middle:
            found = block(found, time, drop)
        for block in self.up:
            found = block(torch.cat([found, skipped.pop()], dim=1), time, drop)
        return self.last(F.silu(self.last_norm(found)))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the weights anew; each residual adds nothing at first, and no noise is told."""
        initialise(self, generator)
        zero: list[nn.Linear | nn.Conv2d] = [self.last]
        zero += [module.out for module in self.modules() if isinstance(module, Attention)]
        zero += [module.second for module in self.modules() if isinstance(module, ResidualBlock)]
        for layer in zero:
            for parameter in layer.parameters():
                parameter.zero_()


class Stage(nn.Module):
    """A residual block, attention after it, and perhaps one that doubles the maps.

    Args:
        inputs: channels.
        outputs: channels.
        time: width of the time's embedding.
        heads: of the attention; 0 for none.
        doubles: a block that doubles the maps is the last.
    """

    def __init__(
        self, inputs: int, outputs: int, time: int, heads: int, *, doubles: bool = False
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, time)
        self.attention = Attention(outputs, heads) if heads else nn.Identity()
        self.larger = ResidualBlock(outputs, outputs, time, scale=2.0) if doubles else None

    def forward(self, maps: Tensor, time: Tensor, drop: Drop) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w), or twice that size."""
        maps = self.attention(self.block(maps, time, drop))
        return maps if self.larger is None else self.larger(maps, time, drop)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a group norm and SiLU, added to their input.

    Args:
        inputs: channels.
        outputs: channels.
        time: width of the time's embedding, which is added between the two.
        scale: of the sides of the maps: 0.5 by averages, 2 by repetition.
    """

    def __init__(self, inputs: int, outputs: int, time: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.first_norm = group_norm(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.of_time = nn.Linear(time, outputs)
        self.second_norm = group_norm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, maps: Tensor, time: Tensor, drop: Drop) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, scale * h, scale * w)."""
        found = self.first(self._scaled(F.silu(self.first_norm(maps))))
        found = found + self.of_time(F.silu(time))[:, :, None, None]
        found = F.silu(self.second_norm(found))
        if drop is not None:
            found = drop(found)
        return self.skip(self._scaled(maps)) + self.second(found)

    def _scaled(self, maps: Tensor) -> Tensor:
        if self.scale == 1:
            return maps
        return F.avg_pool2d(maps, 2) if self.scale < 1 else F.interpolate(maps, scale_factor=2.0)


class Attention(nn.Module):
    """Self-attention of the positions of a map, added to it.

    Args:
        channels: of the map.
        heads: a divisor of them.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.given = nn.Linear(channels, 3 * channels)  # of queries, keys and values
        self.out = nn.Linear(channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        H, W = maps.shape[2:]
        given = self.given(rearrange(self.norm(maps), "b c y x -> b (y x) c"))  # (B, N, 3C)
        q, k, v = rearrange(given, "b n (t h d) -> t b h n d", t=3, h=self.heads)
        found = F.scaled_dot_product_attention(q, k, v)  # (B, h, N, d)
        out = self.out(rearrange(found, "b h n d -> b n (h d)"))
        return maps + rearrange(out, "b (y x) c -> b c y x", y=H, x=W)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a norm of `GROUPS` groups, or of as many as divide it and the channels."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def sinusoids(times: Tensor, width: int) -> Tensor:
    """Return sines and then cosines of times (B,), of periods from 2 pi upwards, (B, width)."""
    half = width // 2
    steps = torch.arange(half, device=times.device, dtype=torch.float32) / half
    angles = times.float()[:, None] * torch.exp(-math.log(LONGEST) * steps)  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
