"""From the pieces of an image to the image: pieces with larger defects count more."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.errors import ModelError


def merged_probabilities(
    probabilities: Tensor, areas: Sequence[int], images: Sequence[int], temperature: float
) -> Tensor:
    """Return the probabilities of images, as means of their pieces'.

    A piece's weight is the softmax, over the pieces of its image, of the root of its mask's area
    (pixels) over the temperature. Source: AnomalyNCD (CVPR 2025), its released code.

    Args:
        probabilities: (N, U), of pieces.
        areas: (N,), pixels inside each piece's mask, at its own size.
        images: (N,), to which image each belongs; those of M images are 0 to M - 1, in any order.
        temperature: in pixels; a larger one makes pieces count more alike.

    Returns:
        (M, U), each row summing to 1 where those of the pieces do.

    Raises:
        ModelError: an image has no piece, or the three do not have the same length.
    """
    if not len(probabilities) == len(areas) == len(images):
        raise ModelError(
            f"{len(probabilities)} rows of probabilities, {len(areas)} areas and {len(images)} "
            "images are not of the same pieces"
        )
    missing = sorted(set(range(max(images, default=-1) + 1)) - set(images))
    if missing or min(images, default=0) < 0:
        raise ModelError(f"images {missing[:5]} have no piece, or one has a number below 0")
    sides = probabilities.new_tensor(areas).sqrt()  # (N,)
    image_of = torch.tensor(images, device=probabilities.device)
    merged = []
    for image in range(max(images, default=-1) + 1):
        (own,) = (image_of == image).nonzero(as_tuple=True)
        weights = (sides[own] / temperature).softmax(dim=0)
        merged.append(weights @ probabilities[own])  # (U,)
    return torch.stack(merged) if merged else probabilities[:0]
