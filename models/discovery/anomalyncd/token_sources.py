"""Where the tokens of views come from: made in each step, or made once and stored.

Files are read and views made in threads, a batch ahead of the network; the threads decide nothing.
"""

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from models.discovery.anomalyncd.views import central_view, draw_change, resized, training_view
from models.discovery.pieces import Piece, read_piece
from models.errors import ModelError
from models.training.epochs import epochs

HALF = torch.float16
MOST_THREADS = 16
Seeds = tuple[int, ...]
"""Of a piece's training views, one each; empty for its central view."""


@dataclass(frozen=True)
class Tokens:
    """What the frozen blocks make of views: the first views of B pieces, then their second ones.

    Attributes:
        values: (V*B, N, D), float32 or of the autocast's type.
        visible: (V*B, N) bool; see `MaskGuidedViT.visible`.
    """

    values: Tensor
    visible: Tensor


MakeTokens = Callable[[Tensor, Tensor], Tokens]
"""Runs the frozen blocks on images (M, 3, S, S) and masks (M, 1, S, S), uint8, on the CPU."""


@dataclass(frozen=True)
class Sight:
    """How pieces become views.

    Attributes:
        resize: pixels of a piece's shorter side, before a square is cut out.
        size: S, side of the square.
    """

    resize: int
    size: int

    def __call__(self, piece: Piece, seeds: Seeds) -> tuple[Tensor, Tensor]:
        """Return a piece's views, (V, 3, S, S) and masks (V, 1, S, S), uint8."""
        image, mask = resized(*read_piece(piece), self.resize)
        if seeds:
            views = [training_view(image, mask, self.size, draw_change(seed)) for seed in seeds]
        else:
            views = [central_view(image, mask, self.size)]
        images, masks = zip(*views, strict=True)
        return torch.stack(images), torch.stack(masks)

    def batches(
        self, batches: Sequence[Sequence[tuple[Piece, Seeds]]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the views of each batch, (V*B, 3, S, S) and (V*B, 1, S, S), uint8, in order.

        Of B pieces with V views each the first views come first.
        """
        ahead: deque[list[Future[tuple[Tensor, Tensor]]]] = deque()
        threads = min(MOST_THREADS, torch.get_num_threads())
        pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
        try:
            for batch in batches:
                ahead.append([pool.submit(self, piece, seeds) for piece, seeds in batch])
                if len(ahead) > 1:
                    yield _joined(ahead.popleft())
            while ahead:
                yield _joined(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


class TokenSource(ABC):
    """Tokens of two views of each piece of a batch."""

    @abstractmethod
    def epoch(self, rows: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tokens]:
        """Yield the tokens of each batch's views.

        Args:
            rows: of each batch, (B,) int64, which pieces; one may come twice.
            generator: a CPU generator that decides on the views.
        """


class FreshTokens(TokenSource):
    """Two new views of each piece, each time.

    Args:
        pieces: that rows count in.
        sight: how they become views.
        make: runs the frozen blocks.
    """

    def __init__(self, pieces: Sequence[Piece], sight: Sight, make: MakeTokens) -> None:
        self._pieces, self._sight, self._make = pieces, sight, make

    def epoch(self, rows: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tokens]:
        """See `TokenSource.epoch`."""
        batches = []
        for batch in rows:
            seeds = draw_seeds(len(batch), 2, generator)
            batches.append(
                [(self._pieces[i], pair) for i, pair in zip(batch.tolist(), seeds, strict=True)]
            )
        for images, masks in self._sight.batches(batches):
            yield self._make(images, masks)


class StoredTokens(TokenSource):
    """Two of a few views of each piece, whose tokens lie in a file of half precision.

    Args:
        pieces: that rows count in.
        views: of each, at least 2.
        folder: where the file is written.
        generator: a CPU generator that decides on the views.
        sight: how pieces become views.
        make: runs the frozen blocks.
        batch_size: views that are made at a time, about.
        shape: N, D of one view's tokens.

    Raises:
        ModelError: the disk has no room, or half precision has no number for a token.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        views: int,
        folder: Path,
        generator: torch.Generator,
        *,
        sight: Sight,
        make: MakeTokens,
        batch_size: int,
        shape: tuple[int, int],
    ) -> None:
        N, D = shape
        _require_room(folder, len(pieces) * views * N * D * HALF.itemsize)
        self._values = np.memmap(
            folder / "tokens.f16", np.float16, "w+", shape=(len(pieces), views, N, D)
        )
        self._visible = torch.zeros(len(pieces), views, N, dtype=torch.bool)
        seeds = draw_seeds(len(pieces), views, generator)
        jobs = list(zip(pieces, seeds, strict=True))
        at_once = max(1, batch_size // views)
        starts = range(0, len(jobs), at_once)
        made = sight.batches([jobs[start : start + at_once] for start in starts])
        bar = epochs(len(starts), "AnomalyNCD, batches stored")
        for _, start, (images, masks) in zip(bar, starts, made, strict=True):
            tokens = make(images, masks)
            half = rearrange(tokens.values, "(v b) n d -> b v n d", v=views).to(HALF).cpu()
            if not half.isfinite().all():
                raise ModelError(
                    "tokens of this backbone are too large for half precision: they cannot be "
                    "stored",
                    {"stored_views": "0"},
                )
            self._values[start : start + len(half)] = half.numpy()
            seen = rearrange(tokens.visible, "(v b) n -> b v n", v=views).cpu()
            self._visible[start : start + len(half)] = seen
        self._device = tokens.values.device

    def close(self) -> None:
        """Let go of the file: Windows removes none that is in use."""
        del self._values

    def epoch(self, rows: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tokens]:
        """See `TokenSource.epoch`."""
        views = self._values.shape[1]
        for batch in rows:
            # Two different ones: the first two of a random order.
            order = torch.rand(len(batch), views, generator=generator).argsort(dim=1)
            chosen = rearrange(order[:, :2], "b v -> (v b)")
            both = batch.repeat(2)  # (2B,)
            values = torch.from_numpy(self._values[both.numpy(), chosen.numpy()])  # (2B, N, D)
            yield Tokens(
                values.to(self._device).float(), self._visible[both, chosen].to(self._device)
            )


def draw_seeds(pieces: int, views: int, generator: torch.Generator) -> list[Seeds]:
    """Draw a seed for each view of each piece."""
    drawn = torch.randint(2**63 - 1, (pieces, views), generator=generator)
    return [tuple(row) for row in drawn.tolist()]


def temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder that is removed with all in it at the end of a `with`."""
    # Of an error that ends the writing, not one about a file that is still in use is to be shown.
    return tempfile.TemporaryDirectory(prefix="tokens-", ignore_cleanup_errors=True)


def _joined(waiting: Sequence["Future[tuple[Tensor, Tensor]]"]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*(one.result() for one in waiting), strict=True)
    together = "b v c h w -> (v b) c h w"
    return rearrange(list(images), together), rearrange(list(masks), together)


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"stored views take {needed / 1e9:.1f} GB of the temporary folder {folder.parent}, "
            f"which has {free / 1e9:.1f}; the variable TMPDIR names another one",
            {"stored_views": "fewer, or 0"},
        )
