"""The flow of Glow: levels of steps, its likelihood at each position, and how it is trained.

Source: "Glow: Generative Flow with Invertible 1x1 Convolutions" (Kingma and Dhariwal, NeurIPS 2018)
and its released code (openai/glow). The code's options are not always the paper's: its couplings
are additive and its 1 x 1 convolutions whole matrices unless it is told otherwise. Here couplings
are affine and the convolutions are kept as their LU decomposition (paper, table 1 and section 3.2).
What the code has beside is left out: actnorms between the layers of a coupling's network, a channel
that marks the edges of a map, averaged weights.

| paper | here | meaning |
| --- | --- | --- |
| L, K | levels, steps | of the flow; steps within each level |
| z | latents | standard normal, of each level what it splits off |
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from einops import repeat
from torch import Tensor, nn

from models.detector import Monitor
from models.errors import ModelError
from models.methods.flows.couplings import SigmoidCoupling, SplitPrior
from models.methods.flows.layers import (
    ActNorm,
    Chain,
    Invertible,
    InvertibleConv,
    Squeeze,
    standard_normal,
)
from models.training.loop import Loop, Losses


class GlowFlow(nn.Module):
    """Levels of invertible layers; each but the last splits channels off; see `build_flow`.

    Args:
        chains: the layers of each level.
        kept: channels that go on after each level but the last.
        halvings: squeezes in all.
    """

    def __init__(self, chains: Sequence[Chain], kept: Sequence[int], halvings: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(chains)
        self.kept = tuple(kept)
        self.halvings = halvings

    @property
    def chains(self) -> list[Chain]:
        """The layers of each level."""
        return [level for level in self.levels if isinstance(level, Chain)]

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all parameters anew from a CPU generator; `adapt` sets the actnorms."""
        for chain in self.chains:
            chain.initialise(generator)

    def adapt(self, maps: Tensor) -> None:
        """Set the actnorms by a batch of maps (B, C, H, W).

        Raises:
            ModelError: as of `located`.
        """
        self._check_grid(maps)
        for level, chain in enumerate(self.chains):
            maps = chain.adapt(maps)[:, : self._passed_on(level)]

    def located(self, maps: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return latents (B, C_l, H_l, W_l) and parts of the log-determinant (B, H_l, W_l).

        Args:
            maps: (B, C, H, W).

        Returns:
            Both of each level. Latents have as many entries as the maps, together.

        Raises:
            ModelError: a side of the maps cannot be halved as often as there are squeezes.
        """
        self._check_grid(maps)
        found = []
        for level, chain in enumerate(self.chains):
            maps, parts = chain.located(maps)
            passed_on = self._passed_on(level)
            found.append((maps[:, passed_on:], parts))
            maps = maps[:, :passed_on]
        return found

    def forward(self, maps: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the latents of each level and the log-determinant (B,)."""
        latents, parts = zip(*self.located(maps), strict=True)
        return list(latents), torch.stack([part.sum(dim=(1, 2)) for part in parts]).sum(dim=0)

    def inverse(self, latents: list[Tensor]) -> Tensor:
        """Return the maps (B, C, H, W) that give these latents."""
        maps = latents[-1][:, :0]
        for chain, latent in zip(reversed(self.chains), reversed(latents), strict=True):
            maps = chain.inverse(torch.cat([maps, latent], dim=1))
        return maps

    def negative_log_likelihood(self, maps: Tensor) -> Tensor:
        """Return -log p, in nats, by position, (B, H, W); its sum is that of the maps.

        What a coarser level says of a position is divided equally over those that it stands for.
        """
        grid = maps.shape[2:]
        total = torch.zeros_like(maps[:, 0])
        for latents, parts in self.located(maps):
            part = standard_normal(latents) - parts  # (B, H_l, W_l)
            side = grid[0] // part.shape[1]
            spread = repeat(part / side**2, "b h w -> b (h p) (w q)", p=side, q=side)
            total = total + spread  # (B, H, W)
        return total

    def folded(self) -> "GlowFlow":
        """Return the same function with fewer operations, for a graph."""
        return GlowFlow([chain.folded() for chain in self.chains], self.kept, self.halvings)

    def _passed_on(self, level: int) -> int:
        """Return the number of channels that go on after a level; the last one keeps none."""
        return self.kept[level] if level < len(self.kept) else 0

    def _check_grid(self, maps: Tensor) -> None:
        H, W = maps.shape[2:]
        multiple = 2**self.halvings
        if H % multiple or W % multiple:
            # A level fewer is a halving fewer.
            wanted = [multiple >> n for n in range(1, self.halvings + 1)]
            fewer = 1 + next(n for n, side in enumerate(wanted) if H % side == W % side == 0)
            levels = len(self.levels) - fewer
            way_out = f"at most {levels}" if levels else "sides that are even"
            raise ModelError(
                f"{len(self.levels)} levels of Glow need sides that are multiples of {multiple}, "
                f"these maps have {H} x {W} positions: {way_out}",
                {"levels": "lower"},
            )


def build_flow(
    channels: int, *, levels: int, steps: int, width: int, squeezes_first: bool
) -> GlowFlow:
    """Return the flow of Glow for maps (B, C, H, W); `GlowFlow.initialise` draws its parameters.

    A step is an actnorm, an invertible 1 x 1 convolution and an affine coupling. Every level but
    the first begins with a squeeze, and every level but the last ends by splitting half of the
    channels off.

    Args:
        channels: C.
        levels: L.
        steps: K.
        width: hidden channels of the couplings' networks.
        squeezes_first: whether the first level begins with a squeeze too, as for images.

    Raises:
        ModelError: there is a single channel, which has no part that could move another.
    """
    if channels == 1 and not squeezes_first:
        raise ModelError("Glow moves one part of the channels by another: it needs at least 2")
    chains: list[Chain] = []
    kept: list[int] = []
    C = channels
    for level in range(levels):
        layers: list[Invertible] = []
        if level > 0 or squeezes_first:
            layers.append(Squeeze())
            C *= 4
        for _ in range(steps):
            layers += [ActNorm(C), InvertibleConv(C), SigmoidCoupling(C, width=width)]
        if level < levels - 1:
            layers.append(SplitPrior(C))
            C //= 2
            kept.append(C)
        chains.append(Chain(layers))
    return GlowFlow(chains, kept, levels - 1 + squeezes_first)


def bits_per_dimension(nll: Tensor, channels: int) -> Tensor:
    """Return -log2 p per number of the maps, (B,), of -log p by position, (B, H, W), in nats."""
    return nll.mean(dim=(1, 2)) / (channels * math.log(2))


class FlowOptions(Protocol):
    """The options by which a flow is trained."""

    @property
    def learning_rate(self) -> float:
        """Of Adamax, after the warm-up."""
        ...

    @property
    def warmup_epochs(self) -> int:
        """Epochs over which the learning rate rises."""
        ...

    @property
    def epochs(self) -> int:
        """Passes over the maps."""
        ...


def train_flow(
    head: nn.Module,
    flow: GlowFlow,
    batches: Callable[[], Iterator[Tensor]],
    *,
    options: FlowOptions,
    steps: int,
    generator: torch.Generator,
    noise: torch.Generator,
    monitor: Monitor | None,
    complete: Callable[[], None] | None = None,
    offset: float = 0.0,
) -> None:
    """Set the actnorms by the first batch and minimise the bits per dimension by Adamax.

    The learning rate rises linearly, batch by batch.

    Args:
        head: what holds the flow.
        flow: with initial parameters.
        batches: gives the maps (B, C, H, W) of an epoch.
        options: of the head.
        steps: batches of an epoch.
        generator: of the fit.
        noise: gives what is added to the maps.
        monitor: is told of each epoch.
        complete: see `Loop.run`.
        offset: is added to the loss that is reported.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    is_fresh = False

    def begin(epoch: int) -> None:
        nonlocal is_fresh
        is_fresh = epoch == 1

    def losses(maps: Tensor) -> Losses:
        nonlocal is_fresh
        if is_fresh:
            flow.adapt(maps)
            is_fresh = False
        nll = flow.negative_log_likelihood(maps)
        return {"loss": bits_per_dimension(nll, maps.shape[1]).mean() + offset}

    def rate(passed: float) -> float:
        done = round(passed * steps) + 1
        return min(1.0, done / max(1, options.warmup_epochs * steps))

    optimizer = torch.optim.Adamax(flow.parameters(), lr=options.learning_rate)
    loop = Loop(
        module=head,
        optimizer=optimizer,
        epochs=options.epochs,
        generator=generator,
        drawn={"noise": noise},
        rate=rate,
        steps=steps,
    )
    loop.run(batches, losses, monitor=monitor, before_epoch=begin, complete=complete)
