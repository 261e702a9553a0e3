"""Near-duplicate images across a split: the same object photographed again, the next frame, a copy.

Found by thumbnails, confirmed by the stored features; no image is read again.

Two thumbnails are alike where what is left of them agrees, and agrees much better than with others:
each is cut to middle frequencies (neither exposure nor noise), to zero mean and unit deviation, and
the mean of the images looked among is taken off, so that objects that all lie alike do not count.
Then their correlation, at the best of shifts by up to a pixel, must exceed `CORRELATION`, and in
Fisher's z it must exceed that to the `RANK`-th best of the images looked among by `MARGIN`: where
many images are alike, none is a twin. Of the pairs that are left, the maps of the deepest stage,
each position less its mean over other images and over its deviation, must agree too: by
`FEATURE_MARGIN` better than with the `FEATURE_RANK`-th best of those others. That tells bottles
that stand alike from one bottle.

The limits were set on photographs of tiles, each taken six times, once split by tile and once at
random, and on photographs of bottles.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from utils.evaluation.smoothing import upsample_and_blur
from utils.features.features import Features

CORRELATION = 0.96
MARGIN = 0.9
RANK = 20
"""A group of twins larger than this, or than a quarter of the images, is not seen."""
FEATURE_MARGIN = 0.4
FEATURE_RANK = 5
BACKGROUND = 60
"""Images, evenly spread over those looked among, that tell how well features usually agree."""
FEWEST = 20
"""Images to look among; fewer say nothing of what is usual."""
_FINE, _COARSE = 0.75, 4.0  # in pixels: sigma of the blurs between which frequencies are kept
_FLAT = 2.0  # in grey levels: images of less deviation have no content to agree in
_LARGEST = 4.95  # Fisher's z of 0.9999
_CHUNK = 512
_PAIRS = 64
_GRID = 14
_CANDIDATES = 5  # of each image, the nearest unmoved
_WORTH_MOVING = 0.8  # of correlations: what is further off will not come to the limit
_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Twin:
    """An image with its twin.

    Attributes:
        place: of the image among those it was looked for.
        other: place of its twin among those looked among.
        correlation: of what is compared of them, in (CORRELATION, 1].
    """

    place: int
    other: int
    correlation: float


def find_twins(images: Features, among: Features) -> list[Twin]:
    """Find the images that have a twin among others, each with its nearest one.

    Args:
        images: N, with thumbnails.
        among: M others, with thumbnails.
    """
    assert images.thumbnails is not None, "features without thumbnails"
    assert among.thumbnails is not None, "features without thumbnails"
    candidates = alike(images.thumbnails, among.thumbnails)
    confirmed = _confirm(candidates, images, among)
    return [twin for twin, sure in zip(candidates, confirmed, strict=True) if sure]


def alike(images: Tensor, among: Tensor) -> list[Twin]:
    """Find the thumbnails that have one alike among others, each with its nearest one.

    Args:
        images: (N, 32, 32) uint8, as `utils.features.thumbnails` makes them.
        among: (M, 32, 32) uint8, none of `images`.
    """
    if min(len(images), len(among)) == 0 or len(among) < FEWEST:
        return []
    rank = min(RANK, len(among) // 4)
    known = _structure(among)
    usual = known.mean(dim=0)  # (32, 32)
    known = _unit(known - usual)  # (M, D)
    known[_is_flat(among)] = 0
    twins = []
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        looked_for = _structure(chunk)
        best, places = (_unit(looked_for - usual) @ known.T).topk(rank + 1, dim=1)
        nearest = places[:, :_CANDIDATES]
        near = best[:, 0] > _WORTH_MOVING
        shifted = best[:, :_CANDIDATES].clone()  # (B, candidates)
        shifted[near] = _at_the_best_shift(looked_for[near], usual, known[nearest[near]])
        found, which = shifted.max(dim=1)
        is_alike = (found > CORRELATION) & (_fisher(found) - _fisher(best[:, rank]) > MARGIN)
        for row in (is_alike & ~_is_flat(chunk)).nonzero().flatten().tolist():
            other = int(nearest[row, which[row]])
            twins.append(Twin(start + row, other, min(1.0, float(found[row]))))
    return twins


def _confirm(twins: Sequence[Twin], images: Features, among: Features) -> Iterator[bool]:
    """Tell of each pair whether the features agree as well."""
    if not twins:
        return
    rows = torch.linspace(0, len(among) - 1, min(BACKGROUND, len(among))).long().unique()
    others = _maps(among.subset(rows))  # (K, D)
    mean, deviation = others.mean(dim=0), others.std(dim=0).clamp_min(1e-3)
    others = F.normalize((others - mean) / deviation, dim=1)
    rank = min(FEATURE_RANK, len(rows) // 2)
    for start in range(0, len(twins), _PAIRS):
        some = twins[start : start + _PAIRS]
        left = _maps(images.subset([twin.place for twin in some]))
        right = _maps(among.subset([twin.other for twin in some]))
        left, right = (F.normalize((x - mean) / deviation, dim=1) for x in (left, right))
        usual = (left @ others.T).topk(rank, dim=1).values[:, -1]
        margin = _fisher((left * right).sum(dim=1)) - _fisher(usual)
        yield from (margin > FEATURE_MARGIN).tolist()


def _maps(features: Features) -> Tensor:
    """Return the maps of the deepest stage, (N, D), pooled where they are large."""
    parts = []
    for stages in features.stage_batches(_PAIRS):
        deepest = stages[-1].float().cpu()
        if deepest.shape[-1] > _GRID:
            deepest = F.adaptive_avg_pool2d(deepest, _GRID)
        parts.append(rearrange(deepest, "n c h w -> n (c h w)"))
    return torch.cat(parts)


def _at_the_best_shift(structure: Tensor, usual: Tensor, candidates: Tensor) -> Tensor:
    """Return correlations (B, K) of images (B, 32, 32) with candidates (B, K, D) of each."""
    found = []
    for rows, columns in itertools.product(_SHIFTS, _SHIFTS):
        moved = _moved(_moved(structure, rows, 1), columns, 2)
        found.append(torch.einsum("bd,bkd->bk", _unit(moved - usual), candidates))
    return torch.stack(found).amax(dim=0)


def _moved(images: Tensor, pixels: float, dim: int) -> Tensor:
    """Return images moved by a whole or a half number of pixels."""
    whole = math.floor(pixels)
    moved = images.roll(whole, dim)
    return moved if whole == pixels else (moved + images.roll(whole + 1, dim)) / 2


def _fisher(correlations: Tensor) -> Tensor:
    return correlations.clamp(-1, 1).atanh().clamp(max=_LARGEST)


def _structure(images: Tensor) -> Tensor:
    """Return the middle frequencies of images at zero mean and unit deviation, (N, 32, 32)."""
    parts = []
    for chunk in images.split(_CHUNK):
        grey = chunk.float()
        kept = upsample_and_blur(grey, None, _FINE) - upsample_and_blur(grey, None, _COARSE)
        deviation = kept.std(dim=(1, 2), keepdim=True).clamp_min(1e-3)
        parts.append((kept - kept.mean(dim=(1, 2), keepdim=True)) / deviation)
    return torch.cat(parts)


def _unit(structure: Tensor) -> Tensor:
    rows = rearrange(structure, "n h w -> n (h w)")
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)


def _is_flat(images: Tensor) -> Tensor:
    return images.float().std(dim=(1, 2)) < _FLAT
