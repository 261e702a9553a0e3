"""Windows over an image: where they lie, their pixels, and a map of what is found in each."""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

AT_ONCE = 2048
"""Windows that go through the network together."""


def starts(size: int, window: int, stride: int) -> Tensor:
    """Return the first pixel of each window along an axis, (G,) int64, from 0 to size - window.

    They are `stride` apart; where that does not end at the border, a little less, evenly.
    """
    count = -(-(size - window) // stride) + 1
    return torch.linspace(0, size - window, count, dtype=torch.float64).round().long()


def windows(
    pixels: Tensor, window: int, stride: int, *, rows: int | None
) -> Iterator[tuple[Tensor, int]]:
    """Yield the windows of images, some rows of their grid after the other.

    Args:
        pixels: (B, C, S, S).
        window: side.
        stride: pixels between two.
        rows: of the grid (G, G) at once; None for as many as have `AT_ONCE` windows.

    Yields:
        (B * R * G, C, window, window), images first, then rows; and R.
    """
    first = starts(pixels.shape[-1], window, stride).to(pixels.device, non_blocking=True)
    G = len(first)
    if rows is None:
        rows = max(1, AT_ONCE // (len(pixels) * G))
    offsets = torch.arange(window, device=pixels.device)
    across = (first[:, None] + offsets).flatten()  # (G * window,)
    for some in first.split(rows):
        down = (some[:, None] + offsets).flatten()  # (R * window,)
        drawn = pixels.index_select(2, down).index_select(3, across)
        yield rearrange(drawn, "b c (r y) (g x) -> (b r g) c y x", y=window, x=window), len(some)


def spread(scores: Tensor, size: int, window: int, stride: int, deviation: float) -> Tensor:
    """Return maps (B, S, S) of what each window was given.

    A window counts for its own pixels, by a Gaussian about its centre. The weights of all windows
    at a pixel sum to 1, so that the borders, which fewer windows see, are not lower.

    Args:
        scores: (B, G, G).
        size: S.
        window: side.
        stride: of the windows.
        deviation: standard deviation of the Gaussian, in pixels.
    """
    first = starts(size, window, stride).to(scores.device, non_blocking=True)
    away = torch.arange(size, device=scores.device)[:, None] - first  # (S, G)
    weights = torch.exp(-0.5 * ((away - (window - 1) / 2) / deviation).square())
    weights = weights * ((away >= 0) & (away < window))
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(scores.dtype)
    return weights @ scores @ weights.T
