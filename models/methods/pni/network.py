"""What the neighbours of a position say of it: a small network, on rows and on whole maps."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.features.matmul import Linear, full_precision, linear
from models.training.initial_weights import draw_linear


class ChannelMeans(nn.Module):
    """Averages groups of neighbouring channels, as adaptive average pooling does.

    Args:
        channels: before.
        most: after; where it is None or not below `channels` nothing changes.

    Attributes:
        channels: after.
        matrix: (after, before), or None where nothing changes.
    """

    matrix: Tensor | None

    def __init__(self, channels: int, most: int | None) -> None:
        super().__init__()
        self.channels, matrix = channels, None
        if most is not None and most < channels:
            matrix = F.adaptive_avg_pool1d(torch.eye(channels)[None], most)[0].T.contiguous()
            self.channels = most
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, after, H, W), channels last in memory, of maps (B, before, H, W)."""
        _, _, H, W = maps.shape
        rows = self.of_rows(rearrange(maps, "b c h w -> (b h w) c"))
        return rearrange(rows, "(b h w) c -> b c h w", h=H, w=W)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return rows (P, after) of rows (P, before)."""
        if self.matrix is None:
            return rows
        with full_precision(rows.device):
            return linear(rows, self.matrix)

    def in_graph(self, maps: Tensor) -> Tensor:
        """Return what `forward` does, in a graph for any number of images."""
        if self.matrix is None:
            return maps
        return F.conv2d(maps, rearrange(self.matrix, "d c -> d c 1 1"))


class Neighbourhood:
    """Where the neighbours of a position lie: a square, all but one of its cells.

    Args:
        side: of the square, odd.
        released: leave out the cell right of the centre instead of the centre. The released code
            does so, by one off: what is to be predicted is among what it is predicted from.
    """

    def __init__(self, side: int, *, released: bool) -> None:
        self.side = side
        self.radius = side // 2
        centre = side * side // 2
        self.removed = centre + 1 if released else centre

    @property
    def count(self) -> int:
        """Neighbours of a position."""
        return self.side * self.side - 1

    def padded(self, features: Tensor) -> Tensor:
        """Return maps (B, C, H, W) as `gather` takes them, zeros around, (B, H + p, W + p, C)."""
        around = F.pad(features, [self.radius] * 4)
        return rearrange(around, "b c h w -> b h w c").contiguous()

    def gather(self, padded: Tensor, places: Tensor) -> Tensor:
        """Return the neighbours of some positions, side by side, (P, count * C).

        Args:
            padded: of B maps.
            places: (P,) int64, counted through images, then H, then W, without the zeros around.
        """
        _, height, width, _ = padded.shape
        H, W = height - 2 * self.radius, width - 2 * self.radius
        image, row, col = places // (H * W), places // W % H, places % W
        corners = (image * height + row) * width + col  # (P,), of the square around each
        cells = torch.arange(self.count, device=places.device)
        cells = cells + (cells >= self.removed)  # (count,), all but the removed one
        offsets = cells // self.side * width + cells % self.side
        index = rearrange(corners, "p -> p 1") + offsets  # (P, count)
        rows = rearrange(padded, "b h w c -> (b h w) c").index_select(0, index.flatten())
        return rearrange(rows, "(p n) c -> p (n c)", n=self.count)

    def kernel(self, weight: Tensor) -> Tensor:
        """Return the weight (R, count * C) of `gather`'s rows as that of a convolution.

        Returns:
            (R, C, side, side), zero at the cell left out.
        """
        cells = rearrange(weight, "r (n c) -> r n c", n=self.count)
        hole = torch.zeros_like(cells[:, :1])
        whole = torch.cat([cells[:, : self.removed], hole, cells[:, self.removed :]], dim=1)
        return rearrange(whole, "r (y x) c -> r c y x", y=self.side)


class NeighbourNetwork(nn.Module):
    """Predicts the class of a position from its neighbours: logits of D classes.

    Linear layers with batch normalisation, ReLU and dropout between them. The number of classes is
    that of the last fit; a stored network brings its own.

    Args:
        channels: C.
        neighbourhood: which neighbours.
        layers: linear layers, the last included.
        width: units of all but the last.
        dropout: share of them dropped in training.
    """

    def __init__(
        self,
        channels: int,
        neighbourhood: Neighbourhood,
        *,
        layers: int,
        width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.neighbourhood = neighbourhood
        self.dropout = dropout
        widths = [neighbourhood.count * channels, *[width] * (layers - 1)]
        hidden = [Linear(a, b) for a, b in itertools.pairwise(widths)]
        self.hidden = nn.ModuleList(hidden)
        self.norms = nn.ModuleList(nn.BatchNorm1d(layer.out_features) for layer in hidden)
        self.last = Classifier(widths[-1], 1)

    @property
    def linears(self) -> list[nn.Linear]:
        """All linear layers in order, with their type."""
        return [layer for layer in (*self.hidden, self.last) if isinstance(layer, nn.Linear)]

    def initialise(self, classes: int, generator: torch.Generator) -> None:
        """Draw all weights anew for D classes and forget the batch statistics."""
        self.last.resize(classes)
        for layer in self.linears:
            draw_linear(layer, "default", generator)
        for norm in self.norms:
            assert isinstance(norm, nn.BatchNorm1d)
            norm.reset_parameters()

    def forward(self, neighbours: Tensor, drops: torch.Generator | None = None) -> Tensor:
        """Return logits (P, D) of `Neighbourhood.gather`'s rows (P, count * C).

        Args:
            neighbours: the rows.
            drops: of their device, draws what is dropped; None drops nothing.
        """
        return self._after_first(self.linears[0](neighbours), drops)

    def on_maps(self, features: Tensor) -> Tensor:
        """Return logits (B * H * W, D) of every position of maps (B, C, H, W); nothing dropped.

        The first layer is a convolution here: no neighbour is read twice.
        """
        first = self.linears[0]
        weight = self.neighbourhood.kernel(first.weight)
        weight = weight.contiguous(memory_format=torch.channels_last)
        found = F.conv2d(features, weight, first.bias, padding=self.neighbourhood.radius)
        return self._after_first(rearrange(found, "b r h w -> (b h w) r"), None)

    def _after_first(self, hidden: Tensor, drops: torch.Generator | None) -> Tensor:
        for norm, layer in zip(self.norms, self.linears[1:], strict=True):
            hidden = F.relu(norm(hidden), inplace=True)
            if drops is not None and self.dropout > 0:
                kept = torch.empty_like(hidden).bernoulli_(1 - self.dropout, generator=drops)
                hidden = hidden * kept / (1 - self.dropout)
            hidden = layer(hidden)
        return hidden


class Classifier(Linear):
    """A linear layer whose outputs are as many as the last fit had classes."""

    def resize(self, classes: int) -> None:
        """Make room for the weights of D classes, whose values are undefined."""
        self.out_features = classes
        self.weight = nn.Parameter(self.weight.new_empty(classes, self.in_features))
        self.bias = nn.Parameter(self.weight.new_empty(classes))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take the stored number of classes first."""
        stored = state_dict.get(f"{prefix}bias")
        # As many stay the parameters that an optimizer knows.
        if stored is not None and len(stored) != len(self.bias):
            self.resize(len(stored))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class ExportedNetwork(nn.Module):
    """`NeighbourNetwork` on maps, for a graph."""

    kernel: Tensor
    bias: Tensor

    def __init__(self, network: NeighbourNetwork) -> None:
        super().__init__()
        first, *others = network.linears
        self.radius = network.neighbourhood.radius
        self.register_buffer("kernel", network.neighbourhood.kernel(first.weight.detach()))
        self.register_buffer("bias", first.bias.detach())
        rest: list[nn.Module] = []
        for norm, layer in zip(network.norms, others, strict=True):
            rest += [norm, nn.ReLU(), _plain(layer)]
        self.rest = nn.Sequential(*rest)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B * H * W, D) of maps (B, C, H, W)."""
        found = F.conv2d(features, self.kernel, self.bias, padding=self.radius)
        return self.rest(rearrange(found, "b r h w -> (b h w) r"))


def _plain(layer: nn.Linear) -> nn.Linear:
    """Return a layer whose product is not rewritten by the number of rows."""
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain
