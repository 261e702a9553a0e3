"""How unlike the rest of an image each part is, by a frozen backbone.

With one object the rest is the image, with several it is the other objects. Unlike is half of one
minus the cosine of two features, in [0, 1].
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.backbone.extractor import FrozenExtractor
from models.features.multiscale import grid_size

LEAST_SIMILAR = 400
"""Cells whose mean unlikeness counts where there is one object (released code)."""
ROWS = 1024
"""Cells that are compared with all others at once."""


def cell_features(backbone: FrozenExtractor, image: Tensor, side: int) -> Tensor:
    """Return features of unit length of an image, (C, h, w), on the grid of the finest stage.

    Args:
        backbone: not pooled.
        image: (3, S, S), uint8.
        side: pixels that the image is resized to, antialiased.
    """
    pixels = rearrange(image, "c h w -> 1 c h w").float()
    resized = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    maps = backbone.stage_maps(resized)
    size = grid_size(maps)
    joined = torch.cat([F.interpolate(one, size) for one in maps], dim=1)  # (1, C, h, w)
    return F.normalize(joined, dim=1)[0]  # (C, h, w)


def unlike_the_image(features: Tensor) -> Tensor:
    """Return how unlike each cell is to the cells of the image that are least like it.

    Args:
        features: (C, h, w), of unit length.

    Returns:
        (h, w): the mean over the `LEAST_SIMILAR` cells, or all where there are fewer.
    """
    cells = rearrange(features, "c h w -> (h w) c")
    count = min(LEAST_SIMILAR, len(cells))
    means = [
        (rows @ cells.T).topk(count, dim=1, largest=False).values.mean(dim=1)
        for rows in cells.split(ROWS)
    ]
    return rearrange((1 - torch.cat(means)) / 2, "(h w) -> h w", h=features.shape[1])


def unlike_other_objects(features: Tensor, objects: Tensor) -> Tensor:
    """Return how unlike each cell of an object is to the most similar cell of any other object.

    Args:
        features: (C, h, w), of unit length.
        objects: (R, h, w), bool; a cell of several objects is of no other than itself, and has the
            highest value that it has in one of them.

    Returns:
        (h, w): 0 outside of objects, and where there is no other object to compare with.
    """
    cells = rearrange(features, "c h w -> (h w) c")
    masks = rearrange(objects, "r h w -> r (h w)")
    covering = masks.sum(dim=0)  # (h w,)
    found = cells.new_zeros(len(cells))
    for own in masks:
        places = own.nonzero().squeeze(1)
        others = cells[(covering > 0) & ~own]
        if not len(others):
            continue
        for some in places.split(ROWS):
            similarity = (cells[some] @ others.T).amax(dim=1)
            found[some] = torch.maximum(found[some], (1 - similarity) / 2)
    return rearrange(found, "(h w) -> h w", h=features.shape[1])


def resized_to_cells(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (R, S, S), bool, on a grid of cells (R, h, w), each its nearest pixel."""
    pixels = rearrange(masks, "r h w -> 1 r h w").float()
    return F.interpolate(pixels, size)[0] > 0.5  # (R, h, w)


def resized_to_pixels(saliency: Tensor, side: int) -> Tensor:
    """Return a map of cells (h, w) in pixels, (side, side), bilinearly."""
    cells = rearrange(saliency, "h w -> 1 1 h w")
    return F.interpolate(cells, (side, side), mode="bilinear")[0, 0]  # (side, side)
