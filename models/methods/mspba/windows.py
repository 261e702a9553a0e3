"""Where the windows of an image are, their embeddings, and how their scores become a map."""

from collections.abc import Iterable, Mapping

import torch
from einops import rearrange
from torch import Tensor

from models.features.matmul import full_precision
from models.features.nearest import nearest
from models.methods.mspba.networks import PatchNetwork
from models.methods.mspba.sampling import crop

PASS_PIXELS = 2**18
"""Pixels of the windows that a network sees at once: bounds memory."""


def starts(side: int, size: int, stride: int) -> list[int]:
    """Return where windows begin along an axis of `side` pixels, ascending.

    The last one ends with the axis, so that every pixel is seen: where the stride does not lead
    there, it is nearer to the one before.
    """
    last = side - size
    return [*range(0, last, stride), last]


def spreading(side: int, size: int, stride: int) -> Tensor:
    """Return the (windows, side) matrix that spreads scores along one axis.

    For scores M of windows, A' M A holds at each pixel the mean over all windows that cover it: the
    windows that do are those of the rows times those of the columns, and so is their number.
    """
    begins = torch.tensor(starts(side, size, stride)).unsqueeze(1)  # (P, 1)
    pixels = torch.arange(side)
    covers = ((begins <= pixels) & (pixels < begins + size)).float()  # (P, side)
    return covers / covers.sum(dim=0)


def spread(scores: Tensor, matrix: Tensor) -> Tensor:
    """Return maps (B, S, S) of the scores (B, P, P) of windows, by `spreading`."""
    return matrix.T @ scores @ matrix


def window_corners(side: int, size: int, stride: int) -> Tensor:
    """Return the corners (P * P, 2) of all windows of an image, by rows."""
    begins = torch.tensor(starts(side, size, stride))
    return torch.cartesian_prod(begins, begins)


@torch.no_grad()
def embed_windows(
    network: PatchNetwork, pixels: Tensor, corners: Tensor, rows: Tensor, size: int
) -> Tensor:
    """Return embeddings (R, D) of windows, a few at a time.

    Args:
        network: embeds them.
        pixels: (B, 3, S, S).
        corners: of an image's windows, (P, 2).
        rows: which, counted through images and then windows, (R,).
        size: pixels of the windows.
    """
    found = pixels.new_empty(len(rows), network.outputs)
    chunk = max(1, PASS_PIXELS // size**2)
    for part, some in zip(found.split(chunk), rows.split(chunk), strict=True):
        owners = (some // len(corners)).to(pixels.device, non_blocking=True)
        places = corners[some % len(corners)].to(pixels.device, non_blocking=True)
        part.copy_(network(crop(pixels, owners, places, size)))
    return found


def window_map(
    network: PatchNetwork, memory: Tensor, pixels: Tensor, size: int, stride: int
) -> Tensor:
    """Return the mean distance of the windows over each pixel to the nearest remembered one.

    Args:
        network: embeds windows.
        memory: embeddings (M, D).
        pixels: (B, 3, S, S).
        size: pixels of the windows.
        stride: pixels from window to window.

    Returns:
        (B, S, S).
    """
    side = pixels.shape[-1]
    corners = window_corners(side, size, stride)  # (P * P, 2)
    rows = torch.arange(len(pixels) * len(corners))
    distances, _ = nearest(embed_windows(network, pixels, corners, rows, size), memory, 1)
    matrix = spreading(side, size, stride).to(pixels.device, non_blocking=True)  # (P, S)
    scores = rearrange(distances, "(b h w) 1 -> b h w", b=len(pixels), h=len(matrix))
    with full_precision(pixels.device):
        return spread(scores, matrix)


def draw_kept(total: int, most: int | None, generator: torch.Generator) -> Tensor:
    """Draw which of all windows are remembered, ascending; (M,), all where they are few enough."""
    if most is None or total <= most:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:most].sort().values


def embed_kept(
    network: PatchNetwork,
    batches: Iterable[Tensor],
    corners: Mapping[int, Tensor],
    kept: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """Return embeddings (M, D) of some windows of all images, for each size.

    Args:
        network: embeds them.
        batches: of pixels, (B, 3, S, S) each.
        corners: of an image's windows, (P, 2), for each size.
        kept: which windows, counted through images and then windows; (M,), ascending.
    """
    found: dict[int, list[Tensor]] = {size: [] for size in kept}
    first = 0
    for pixels in batches:
        for size, rows in kept.items():
            count = len(corners[size])
            bounds = torch.tensor([first, first + len(pixels)]) * count
            low, high = torch.searchsorted(rows, bounds).tolist()
            here = rows[low:high] - first * count
            found[size].append(embed_windows(network, pixels, corners[size], here, size))
        first += len(pixels)
    return {size: torch.cat(parts) for size, parts in found.items()}
