"""Features of several sets of images, read as one."""

import functools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from utils.features.features import Features, Rows, joined_boxes
from utils.features.streamed import StreamedFeatures


class JoinedFeatures(Features):
    """Features of the images of several banks, one after another; nothing is copied.

    `indices` counts all images anew.
    """

    def __init__(self, parts: Sequence[Features], rows: Tensor | None = None) -> None:
        self._parts = list(parts)
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)  # (P + 1,)
        total = int(starts[-1])
        self._rows = torch.arange(total) if rows is None else rows
        self._starts = starts
        super().__init__(
            self._rows.tolist(),
            parts[0].channels,
            parts[0]._assemble,
            extract_seconds=sum(part.extract_seconds for part in parts),
            pass_seconds=sum(part.pass_seconds for part in parts),
            skipped=[why for part in parts for why in part.skipped],
        )
        boxes = joined_boxes(parts)
        self.boxes = None if boxes is None else boxes[self._rows]

    @property
    def nbytes(self) -> int:
        """Memory the stored features take, in bytes."""
        return sum(part.nbytes for part in self._parts)

    def subset(self, rows: Rows) -> "JoinedFeatures":
        """Return a view of the images at `rows` of these; nothing is copied."""
        wanted = self._rows[torch.as_tensor(rows, dtype=torch.long)]
        found = JoinedFeatures(self._parts, wanted)
        found.held_out = self.held_out
        return found

    def join(self, other: "JoinedFeatures") -> "JoinedFeatures":
        """Return the images of both, first these; `indices` counts them anew."""
        return JoinedFeatures([self, other])

    def _maps(self, batch_size: int, order: Tensor) -> Iterator[list[Tensor]]:
        for rows in self._rows[order].split(batch_size):
            owners = torch.searchsorted(self._starts, rows, right=True) - 1  # (B,)
            found: list[Tensor] = []
            for owner in owners.unique().tolist():
                places = (owners == owner).nonzero().flatten()
                local = rows[places] - self._starts[owner]
                (stages,) = self._parts[owner]._maps(len(local), local)
                if len(places) == len(rows):
                    found = stages
                    break
                if not found:
                    found = [_like(stage, len(rows)) for stage in stages]
                for stage, read in zip(found, stages, strict=True):
                    stage[places.to(stage.device)] = read
            yield found


def join_features(parts: Sequence[Features]) -> Features:
    """Return the images of all parts as one set of features, in order.

    What is held out of all parts is held out of the whole; where one has nothing held out, the
    whole has neither.

    Args:
        parts: at least one; all stored, or none.
    """
    if len(parts) == 1:
        return parts[0]
    whole: Features
    if isinstance(parts[0], StreamedFeatures):
        # It reads each set's images once a pass, whatever the order; a batch at a time would not.
        whole = functools.reduce(StreamedFeatures.join, cast("Sequence[StreamedFeatures]", parts))
    else:
        whole = JoinedFeatures(parts)
    held = [part.held_out for part in parts if part.held_out is not None]
    if len(held) == len(parts):
        whole.held_out = join_features(held)
    return whole


def _like(stage: Tensor, count: int) -> Tensor:
    """Return room for `count` images of a stage, with its layout in memory."""
    room = stage.new_empty(count, *stage.shape[1:])
    return room.to(memory_format=torch.channels_last)  # (B, C_l, H_l, W_l)
