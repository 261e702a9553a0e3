"""Parts of images that a network of a fixed size sees: random crops, and windows that overlap."""

from collections.abc import Callable

import torch
from torch import Tensor


def random_crops(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return one crop (B, C, size, size) at a random place of each image (B, C, S, S).

    Args:
        images: of any type.
        size: of the crops, at most S.
        generator: a CPU generator.
    """
    S = images.shape[-1]
    places = torch.randint(S - size + 1, (2, len(images)), generator=generator)
    rows, columns = places.to(images.device, non_blocking=True)  # (B,) each
    along = torch.arange(size, device=images.device)
    y = (rows[:, None] + along)[:, None, :, None]  # (B, 1, size, 1)
    x = (columns[:, None] + along)[:, None, None, :]  # (B, 1, 1, size)
    which = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[which, channels, y, x]  # (B, C, size, size)


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Return where windows begin along an axis: every `stride`, and one that ends at its end."""
    last = length - size
    return sorted({*range(0, last + 1, stride), last})


def averaged_over_windows(
    pixels: Tensor, size: int, stride: int, look: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return, at each pixel, the mean over all windows that hold it, (B, K, S, S).

    Args:
        pixels: (B, C, S, S), S at least `size`.
        size: of the windows.
        stride: of their beginnings.
        look: maps windows (B, C, size, size) to (B, K, size, size); is given one of each image.
    """
    S = int(pixels.shape[-1])  # a tensor while a graph is traced
    starts = window_starts(S, size, stride)
    if len(starts) == 1:
        return look(pixels)
    total: Tensor | None = None
    along = torch.zeros(S, device=pixels.device)  # windows that hold a row, or a column
    for y in starts:
        along[y : y + size] += 1
        for x in starts:
            found = look(pixels[:, :, y : y + size, x : x + size])
            if total is None:
                total = found.new_zeros(*found.shape[:2], S, S)
            total[:, :, y : y + size, x : x + size] += found
    assert total is not None
    return total / (along[:, None] * along)
