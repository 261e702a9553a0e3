"""Features that are never stored: every reading decodes the images and runs the backbone again."""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from datasets.samples import ImageLoader
from models.detector import Extractor
from utils.errors import UsageError
from utils.features.features import Features, Rows, boxes_at, joined_boxes, rounded_maps


class StreamedFeatures(Features):
    """Features of N images, computed anew at each reading and dropped after it.

    Between two readings nothing is held; during one, no more than a batch of the loader and a batch
    of the reader, whatever N is. Order, shuffling and rounding are those of a `FeatureBank`. So are
    the features, to the bit, though libraries choose their algorithms by the size of the batch
    (measured on one thread: of batches below 16, 1 in 10,000 half-precision values is another): the
    backbone gets batches of the loader's size whatever size is asked for, and where a reading ends
    with fewer images, copies fill up. Only images that a bank reads in a last, smaller batch may
    be rounded otherwise, when they are read in another order.

    Attributes:
        extract_seconds: time it took to learn which images can be read; nothing where an unreadable
            one stops the run.
        pass_seconds: 0; whoever reads the features waits for the backbone.

    See `Features` for the others.
    """

    def __init__(
        self,
        sources: Sequence["_Source"],
        owners: Tensor,
        rows: Tensor,
        indices: Sequence[int],
        *,
        extract_seconds: float,
        skipped: Sequence[str],
    ) -> None:
        """Give image i the row `rows[i]` of `sources[owners[i]]`; see `of` and `join`."""
        super().__init__(
            indices,
            sources[0].extractor.channels,
            sources[0].extractor.assemble,
            extract_seconds=extract_seconds,
            pass_seconds=0.0,
            skipped=skipped,
        )
        self._sources = tuple(sources)
        self._owners = owners
        self._rows = rows

    @classmethod
    def of(
        cls,
        extractor: Extractor,
        loader: ImageLoader,
        *,
        dtype: torch.dtype = torch.float16,
        description: str = "features",
    ) -> "StreamedFeatures":
        """Return the features that `loader`'s images have in `extractor`.

        A loader that leaves unreadable images out is read once, without the backbone, to learn
        which they are: labels and masks are aligned with the others before any feature is needed.
        With any other loader nothing is read here.

        Args:
            extractor: the backbone.
            loader: the images.
            dtype: features are rounded to it, as banks do; images stay uint8.
            description: what messages and the progress bars call the images.

        Raises:
            UsageError: there is not one readable image.
        """
        start = time.perf_counter()
        indices, skipped = loader.indices, []
        rows = list(range(len(indices)))
        if loader.skips_unreadable:
            readable = _readable(loader, f"{description}: which can be read")
            rows = [row for row in rows if indices[row] in readable]
            indices = [indices[row] for row in rows]
            skipped = [why for _, why in loader.skipped]
        if not rows:
            raise UsageError(f"{description}: not one image could be read")
        return cls(
            [_Source(extractor, loader, dtype, description)],
            torch.zeros(len(rows), dtype=torch.long),
            torch.tensor(rows),
            indices,
            extract_seconds=time.perf_counter() - start,
            skipped=skipped,
        )

    @property
    def nbytes(self) -> int:
        """Nothing is stored."""
        return 0

    def subset(self, rows: Rows) -> "StreamedFeatures":
        """Return the images at `rows` of these, which are the only ones it reads."""
        wanted = torch.as_tensor(rows, dtype=torch.long)
        found = StreamedFeatures(
            self._sources,
            self._owners[wanted],
            self._rows[wanted],
            [self.indices[i] for i in wanted.tolist()],
            extract_seconds=self.extract_seconds,
            skipped=self.skipped,
        )
        found.held_out = self.held_out
        found.boxes = boxes_at(self, wanted)
        return found

    def join(self, other: "StreamedFeatures") -> "StreamedFeatures":
        """Return the images of both, first these; `indices` counts them anew."""
        found = StreamedFeatures(
            self._sources + other._sources,
            torch.cat([self._owners, other._owners + len(self._sources)]),
            torch.cat([self._rows, other._rows]),
            range(len(self) + len(other)),
            extract_seconds=0.0,
            skipped=(),
        )
        found.boxes = joined_boxes([self, other])
        return found

    def _maps(self, batch_size: int, order: Tensor) -> Iterator[list[Tensor]]:
        owners, rows = self._owners[order], self._rows[order]
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(contextlib.closing(source.maps(rows[owners == k].tolist())))
                for k, source in enumerate(self._sources)
            ]
            images: list[list[Tensor]] = []
            for done, owner in enumerate(owners.tolist(), start=1):
                images.append(next(streams[owner]))
                if len(images) == batch_size or done == len(owners):
                    stages = [torch.stack(maps) for maps in zip(*images, strict=True)]
                    images.clear()
                    yield [rearrange(stage, "b h w c -> b c h w") for stage in stages]


@dataclass(frozen=True)
class _Source:
    """Images and the backbone they go through."""

    extractor: Extractor
    loader: ImageLoader
    dtype: torch.dtype
    description: str

    def maps(self, rows: Sequence[int]) -> Generator[list[Tensor], None, None]:
        """Yield the stages (H_l, W_l, C_l) of one image after another.

        Raises:
            UsageError: an image cannot be read that could be before.
        """
        loader, done = self.loader.at(rows), 0
        expected = loader.indices
        with _progress(len(rows), self.description) as bar:
            for batch in loader:
                stop = done + len(batch.indices)
                if batch.indices != expected[done:stop]:
                    break
                images = self._filled_up(batch.images, rows[done:stop])
                maps = rounded_maps(
                    self.extractor, images, self.dtype, self.description, at_once=loader.at_once
                )
                bar.update(len(batch.indices))
                yield from map(list, zip(*(m[: stop - done] for m in maps), strict=True))
                done = stop
        if done < len(rows):
            reason = loader.skipped[0][1]
            raise UsageError(f"{self.description}: {reason} (it could be read before)")

    def _filled_up(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """Add copies of the first image up to the size of the batch a bank reads these in."""
        count, size = self.loader.num_images, self.loader.batch_size
        if list(rows) == list(range(count - count % size, count)):  # the loader's own last batch
            return images
        missing = min(size, count) - len(images)
        if missing <= 0:
            return images
        return torch.cat([images, images[:1].expand(missing, -1, -1, -1)])


def _readable(loader: ImageLoader, description: str) -> set[int]:
    """Return the indices of the images that can be read, having read them all."""
    found: set[int] = set()
    with _progress(loader.num_images, description) as bar:
        for batch in loader:
            found.update(batch.indices)
            bar.update(len(batch.indices))
    return found


def _progress(total: int, description: str) -> tqdm:
    return tqdm(total=total, desc=description, leave=False, disable=None)
