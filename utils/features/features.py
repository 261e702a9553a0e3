"""What features of a set of images are to the code that reads them, wherever they are kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from models.detector import Extractor

Rows = Sequence[int] | np.ndarray | Tensor
SomeFeatures = TypeVar("SomeFeatures", bound="Features")


class Features(ABC):
    """Features of N images, in batches for small heads.

    Attributes:
        indices: position in the data set of each image; an unreadable image that was left out is
            missing here.
        channels: of the joined features; 3 where only images are taken.
        extract_seconds: time until the features could be read, of the whole where this is a subset.
        pass_seconds: time the backbone took for what is stored, be it in an earlier run.
        skipped: unreadable images that were left out, with the reason.
        thumbnails: (N, 32, 32) uint8, of `utils.features.thumbnails`; None where none are kept.
        held_out: normal images beside these, for scales and thresholds; None where there are none.
        boxes: (N, 4) first row and column, height and width of each image in the square it became,
            in pixels; None where images fill it.
    """

    thumbnails: Tensor | None = None
    boxes: Tensor | None = None
    held_out: "Features | None" = None

    def __init__(
        self,
        indices: Sequence[int],
        channels: int,
        assemble: Callable[[list[Tensor]], Tensor],
        *,
        extract_seconds: float,
        pass_seconds: float,
        skipped: Sequence[str],
    ) -> None:
        self.indices = list(indices)
        self.channels = channels
        self.extract_seconds = extract_seconds
        self.pass_seconds = pass_seconds
        self.skipped = list(skipped)
        self._assemble = assemble

    def __len__(self) -> int:
        return len(self.indices)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory the features take between two readings, in bytes."""

    @abstractmethod
    def subset(self: SomeFeatures, rows: Rows) -> SomeFeatures:
        """Return a view of the images at `rows` of these; nothing is copied."""

    @abstractmethod
    def join(self: SomeFeatures, other: SomeFeatures) -> SomeFeatures:
        """Return the images of both, first these; `indices` counts them anew."""

    @abstractmethod
    def _maps(self, batch_size: int, order: Tensor) -> Iterator[list[Tensor]]:
        """Yield the stages (B, C_l, H_l, W_l) of the images at `order`, as they are stored."""

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yield features (B, C, H, W), float32, on the device of the heads.

        Args:
            batch_size: images per batch; the last one may be smaller.
            generator: a CPU generator; when given the images are shuffled, else they come in order.
        """
        for stages in self._maps(batch_size, self._order(generator)):
            yield self._assemble(stages)

    def stage_batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[list[Tensor]]:
        """Yield the same images as `batches` before their stages are joined.

        Returns:
            One (B, C_l, H_l, W_l) map per stage, float32 (images stay uint8).
        """
        for stages in self._maps(batch_size, self._order(generator)):
            yield widened(stages)

    def _order(self, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return torch.arange(len(self))
        return torch.randperm(len(self), generator=generator)


def boxes_at(features: Features, rows: Tensor) -> Tensor | None:
    """Return the boxes (M, 4) of the images at `rows`; None where they fill their squares."""
    return None if features.boxes is None else features.boxes[rows]


def joined_boxes(parts: Sequence[Features]) -> Tensor | None:
    """Return the boxes of the images of all parts, one after another."""
    boxes = [part.boxes for part in parts if part.boxes is not None]
    return torch.cat(boxes) if len(boxes) == len(parts) else None


def widened(stages: Sequence[Tensor]) -> list[Tensor]:
    """Return stages as heads read them: stored halves as float32, images as they are."""
    return [stage.float() if stage.is_floating_point() else stage for stage in stages]


def windows_of(stages: Sequence[Tensor], tiles: int) -> list[Tensor]:
    """Return the windows' maps (B * T, C_l, h_l, w_l) of those that lie below each other."""
    return [rearrange(stage, "b c (t h) w -> (b t) c h w", t=tiles) for stage in stages]


def rounded_maps(
    extractor: Extractor,
    images: Tensor,
    dtype: torch.dtype,
    description: str,
    *,
    at_once: int,
) -> list[Tensor]:
    """Run the backbone and round its maps as banks store them.

    Args:
        extractor: the backbone.
        images: (B, 3, T * S, S), uint8: the T windows of each image below each other; T is 1 of
            images that are whole.
        dtype: of the result; images in place of features stay uint8.
        description: what a message calls the images.
        at_once: windows that the backbone sees at once; whole images are all seen at once.

    Returns:
        One (B, T * H_l, W_l, C_l) tensor per stage, with the windows' maps below each other.

    Raises:
        FloatingPointError: a feature is beyond the range of `dtype`.
    """
    tiles = images.shape[2] // images.shape[3]
    layout = "(b t) h w c -> b (t h) w c"
    (windows,) = windows_of([images], tiles)
    parts = [
        [
            rearrange(m, "b c h w -> b h w c").to(dtype if m.is_floating_point() else m.dtype)
            for m in extractor.stage_maps(part)
        ]
        for part in windows.split(at_once if tiles > 1 else len(windows))
    ]
    maps = [
        rearrange(stage[0] if len(stage) == 1 else torch.cat(stage), layout, t=tiles)
        for stage in zip(*parts, strict=True)
    ]
    for stage_map in maps:
        if not torch.isfinite(stage_map).all():
            raise FloatingPointError(
                f"{description}: a feature is not finite in {stage_map.dtype}; weights or "
                "precision (--precision) do not suit this backbone"
            )
    return maps
