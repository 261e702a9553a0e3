"""Features of images that were cut into windows, as a fit reads them: a window is an image."""

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor

from configs.tiles import Tiling
from models.detector import FeatureSource
from utils.features.features import Features, widened, windows_of

POOL = 256
"""Windows that are read together, at least those of one image: batches are shuffled within."""


def of_windows(features: Features, tiles: int) -> FeatureSource:
    """Return what a head is fitted on.

    Args:
        features: of N images, of the T windows of each below each other: (B, C_l, T * h_l, w_l).
        tiles: T; with 1 the features are returned as they are.

    Returns:
        Features of N * T images, those of an image next to each other.
    """
    if tiles == 1:
        return features
    return _Windows(features, tiles, torch.arange(len(features) * tiles))


def whole_stages(stages: Sequence[Tensor], tiling: Tiling) -> list[Tensor]:
    """Return maps of whole images of those of their windows.

    Each position is taken from the window whose edge is farthest from it.

    Args:
        stages: (B * T, C_l, h_l, w_l), those of an image next to each other.
        tiling: the windows.

    Returns:
        (B, C_l, H_l, H_l) each, with positions as dense as in a window; of images the whole images.
    """
    found = []
    for stage in stages:
        grid = stage.shape[-1]
        side = round(tiling.image_size / tiling.tile_size * grid)
        centres = (torch.arange(side) + 0.5) * (tiling.image_size / side)  # (H_l,), in pixels
        within = centres - torch.tensor(tiling.starts)[:, None]  # (n, H_l)
        number = torch.minimum(within, tiling.tile_size - within).argmax(0)  # (H_l,)
        local = (within.gather(0, number[None])[0] * grid / tiling.tile_size).long()
        n, place = tiling.per_side, (number * grid + local.clamp(0, grid - 1)).to(stage.device)
        mosaic = rearrange(stage, "(b r k) c h w -> b c (r h) (k w)", r=n, k=n)
        found.append(mosaic[..., place, :][..., place])
    return found


class _Windows:
    """Some windows of images, at `rows`: that of number k is of the image k // T.

    Where images are shuffled, so are the windows, among those of some images: each image is read
    once, whatever the number of its windows.
    """

    def __init__(self, features: Features, tiles: int, rows: Tensor) -> None:
        self._features = features
        self._tiles = tiles
        self._rows = rows
        self.channels = features.channels

    @property
    def held_out(self) -> FeatureSource | None:
        held = self._features.held_out
        return None if held is None else of_windows(held, self._tiles)

    def __len__(self) -> int:
        return len(self._rows)

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        for stages in self._maps(batch_size, generator):
            yield self._features._assemble(stages)

    def stage_batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[list[Tensor]]:
        for stages in self._maps(batch_size, generator):
            yield widened(stages)

    def subset(self, rows: Tensor) -> "_Windows":
        return _Windows(self._features, self._tiles, self._rows[rows])

    def _maps(self, batch_size: int, generator: torch.Generator | None) -> Iterator[list[Tensor]]:
        """Yield batches of exactly `batch_size` windows; the last may be smaller."""
        left: list[Tensor] = []
        for pool in self._pools(generator):
            stages = [torch.cat(pair) for pair in zip(left, pool, strict=True)] if left else pool
            whole = len(stages[0]) // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield [stage[start : start + batch_size] for stage in stages]
            left = [stage[whole:] for stage in stages]
        if left and len(left[0]):
            yield left

    def _pools(self, generator: torch.Generator | None) -> Iterator[list[Tensor]]:
        """Yield the windows of some images after the other, as they are stored."""
        rows = self._rows
        if generator is not None:
            of_image = torch.randperm(len(self._features), generator=generator)[rows // self._tiles]
            rows = rows[of_image.argsort(stable=True)]
        images, counts = torch.unique_consecutive(rows // self._tiles, return_counts=True)
        at_once = max(1, POOL // self._tiles)
        chunks = zip(
            rows.split([int(part.sum()) for part in counts.split(at_once)]),
            counts.split(at_once),
            self._features._maps(at_once, images),
            strict=True,
        )
        for some, of_each, tall in chunks:
            # Of each wanted window, its place among those that were read.
            read = torch.arange(len(of_each)).repeat_interleave(of_each)
            wanted = read * self._tiles + some % self._tiles
            if generator is not None:
                wanted = wanted[torch.randperm(len(wanted), generator=generator)]
            yield [stage[wanted.to(stage.device)] for stage in windows_of(tall, self._tiles)]
