"""The transformer of UniAD: neighbour-masked attention and decoder layers with own queries.

Tokens are (B, N, E): the positions of a grid (H, W), row by row, N = H * W. Projections, dropout
and norms are those of the original transformer, norms after the sums. A dropout is an argument of
`forward`, not a mode: whoever trains says where its random numbers come from, and without one the
network scores.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.detector import SizedByFit

LEVELS = 1 << 16
"""Values of the random numbers that a dropout compares."""

Drop = Callable[[Tensor], Tensor] | None


class Dropout:
    """Sets entries to 0 with some probability, and scales the others by 1 / (1 - probability).

    A random number of 64 bits serves for four entries, a fifth of the time of a number for each,
    which would be a sixth of a training step on a CPU. The probability is rounded to a multiple of
    2^-16, and the scale is that of the rounded one.

    Args:
        probability: at least 0, below 1.
        generator: on the device of what will be dropped.
    """

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        self.generator = generator
        self.dropped = min(round(probability * LEVELS), LEVELS - 1)
        self.scale = LEVELS / (LEVELS - self.dropped)

    def __call__(self, values: Tensor) -> Tensor:
        """Return what is kept of values of any shape."""
        if self.dropped == 0:
            return values
        words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
        words.random_(-(2**63), None, generator=self.generator)
        levels = words.view(torch.int16)[: values.numel()].view(values.shape)
        is_kept = levels >= self.dropped - LEVELS // 2
        return values * is_kept.to(values.dtype).mul_(self.scale)


def neighbour_mask(
    height: int, width: int, neighbourhood: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return what is added to the logits of each query (row) and key (column), (N, N).

    It is -inf where the key lies in the window around the query, itself included, and else 0.

    Args:
        height: of the grid.
        width: of the grid.
        neighbourhood: odd side of the window; what would lie outside of the grid is left out.
        device: of the result.
    """
    reach = neighbourhood // 2
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    is_near_down = (rows.unsqueeze(1) - rows).abs() <= reach  # (H, H)
    is_near_across = (columns.unsqueeze(1) - columns).abs() <= reach  # (W, W)
    both = rearrange(is_near_down, "i j -> i 1 j 1") & rearrange(is_near_across, "i j -> 1 i 1 j")
    is_near = rearrange(both, "y x v u -> (y x) (v u)")  # (N, N)
    return torch.zeros(is_near.shape, device=device).masked_fill(is_near, -torch.inf)


def blocks_everything(height: int, width: int, neighbourhood: int) -> bool:
    """Return whether `neighbour_mask` leaves some query, that in the middle first, no key."""
    reach = neighbourhood // 2
    return height // 2 <= reach and width // 2 <= reach


class Attention(nn.Module):
    """Multi-head attention, with the parameters of `nn.MultiheadAttention`.

    Args:
        width: E.
        heads: a divisor of E.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.zeros(3 * width, width))  # of queries, keys, values
        self.bias = nn.Parameter(torch.zeros(3 * width))
        self.out = nn.Linear(width, width)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        drop: Drop = None,
    ) -> Tensor:
        """Return what each query attends to, (B, N, E).

        Args:
            queries: (B, N, E), or (1, N, E) where they are those of all images.
            keys: (B, N, E); the queries themselves share a product with them.
            values: (B, N, E).
            mask: (N, N), added to the logits.
            drop: of the attention's weights.
        """
        E = self.out.in_features
        if queries is keys:
            both = F.linear(queries, self.weight[: 2 * E], self.bias[: 2 * E])  # (B, N, 2E)
            asking, asked = both.chunk(2, dim=2)
        else:
            asking = F.linear(queries, self.weight[:E], self.bias[:E])
            asked = F.linear(keys, self.weight[E : 2 * E], self.bias[E : 2 * E])
        given = F.linear(values, self.weight[2 * E :], self.bias[2 * E :])
        by_head = "b n (h d) -> b h n d"
        q, k, v = (rearrange(part, by_head, h=self.heads) for part in (asking, asked, given))
        if drop is None:
            found = F.scaled_dot_product_attention(q.expand_as(k), k, v, mask)  # (B, h, N, d)
        else:
            logits = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, h, N, N)
            if mask is not None:
                logits += mask
            found = drop(logits.softmax(dim=-1)) @ v  # (B, h, N, d)
        return self.out(rearrange(found, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Two linear layers, a rectifier between them, on each token alone.

    Args:
        width: E.
        inner: of the layer between.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(inner, width)

    def forward(self, tokens: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """Map tokens (B, N, E) to as many."""
        return self.second(drop(self.first(tokens).relu()))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each added and normalised."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, inner)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, drop: Drop) -> Tensor:
        """Map tokens (B, N, E) to as many; positions (N, E) are added to queries and keys."""
        dropped = drop or _kept
        placed = tokens + positions
        found = self.attention(placed, placed, tokens, mask, drop)
        tokens = self.norms[0](tokens + dropped(found))
        return self.norms[1](tokens + dropped(self.feed_forward(tokens, dropped)))


class DecoderLayer(SizedByFit):
    """A layer with a learned query for each position, the same for all images.

    The query attends to the encoder's tokens, the result to those of the layer before: no image
    gets past an attention, so none gets past a mask.
    """

    sized_by_fit = ("query",)

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(0, width))  # (N, E)
        self.to_encoded = Attention(width, heads)
        self.to_previous = Attention(width, heads)
        self.feed_forward = FeedForward(width, inner)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        previous: Tensor,
        encoded: Tensor,
        placed: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        drop: Drop,
    ) -> Tensor:
        """Return tokens (B, N, E).

        Args:
            previous: of the layer before, (B, N, E); the encoder's at the first.
            encoded: the encoder's, (B, N, E).
            placed: the encoder's with positions.
            positions: (N, E).
            mask: (N, N), of both attentions.
            drop: in training.
        """
        dropped = drop or _kept
        asking = rearrange(self.query + positions, "n e -> 1 n e")
        found = self.to_encoded(asking, placed, encoded, mask, drop)
        tokens = self.norms[0](self.query + dropped(found))
        found = self.to_previous(tokens + positions, previous + positions, previous, mask, drop)
        tokens = self.norms[1](tokens + dropped(found))
        return self.norms[2](tokens + dropped(self.feed_forward(tokens, dropped)))


class Transformer(SizedByFit):
    """Rebuilds tokens of C channels on a grid that `start` sets.

    Args:
        channels: C.
        width: E, even and a multiple of the heads.
        heads: of each attention.
        inner: width of the feed-forward networks.
        num_encoder: layers of the encoder.
        num_decoder: layers of the decoder.
        neighbourhood: side of the window that each attention leaves out; None for no mask.
    """

    sized_by_fit = ("rows", "columns")

    def __init__(
        self,
        channels: int,
        *,
        width: int,
        heads: int,
        inner: int,
        num_encoder: int,
        num_decoder: int,
        neighbourhood: int | None,
    ) -> None:
        super().__init__()
        self.neighbourhood = neighbourhood
        self.first = nn.Linear(channels, width)
        self.rows = nn.Parameter(torch.zeros(0, width // 2))  # (H, E / 2)
        self.columns = nn.Parameter(torch.zeros(0, width // 2))  # (W, E / 2)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, inner) for _ in range(num_encoder))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, inner) for _ in range(num_decoder))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid."""
        return len(self.rows), len(self.columns)

    def start(self, height: int, width: int, generator: torch.Generator) -> None:
        """Set the grid and draw all parameters anew from a CPU generator.

        Matrices are Xavier-uniform, those of an attention's three inputs as one; biases are 0,
        positions uniform in 0 to 1, queries standard normal.
        """
        self.resize("rows", height)
        self.resize("columns", width)
        for module in self.modules():
            if isinstance(module, nn.Linear | Attention):
                _draw_xavier(module.weight, generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, DecoderLayer):
                module.resize("query", height * width)
                _draw(module.query, torch.empty(module.query.shape).normal_(generator=generator))
        for table in (self.rows, self.columns):
            _draw(table, torch.empty(table.shape).uniform_(generator=generator))

    def forward(self, tokens: Tensor, drop: Drop = None) -> Tensor:
        """Return rebuilt tokens (B, N, C).

        Args:
            tokens: (B, N, C).
            drop: a dropout in training; None to score.
        """
        positions, mask = self.positions(), self.mask()
        tokens = self.first(tokens)  # (B, N, E)
        for layer in self.encoder:
            tokens = layer(tokens, positions, mask, drop)
        encoded, placed = tokens, tokens + positions
        for layer in self.decoder:
            tokens = layer(tokens, encoded, placed, positions, mask, drop)
        return self.last(self.norm(tokens))

    def positions(self) -> Tensor:
        """Return the learned positions (N, E): that of the column, then that of the row."""
        H, W = self.grid
        across = repeat(self.columns, "w e -> (h w) e", h=H)
        down = repeat(self.rows, "h e -> (h w) e", w=W)
        return torch.cat([across, down], dim=1)

    def mask(self) -> Tensor | None:
        """Return the mask (N, N) of all attentions; None where nothing is masked."""
        if self.neighbourhood is None:
            return None
        return neighbour_mask(*self.grid, self.neighbourhood, self.rows.device)


def _kept(values: Tensor) -> Tensor:
    return values


@torch.no_grad()
def _draw(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)


def _draw_xavier(weight: Tensor, generator: torch.Generator) -> None:
    outputs, inputs = weight.shape
    bound = (6 / (inputs + outputs)) ** 0.5
    _draw(weight, torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
