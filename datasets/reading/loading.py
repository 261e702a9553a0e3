"""Loads images in batches, in order, ahead of their use, and says which could not be read."""

import hashlib
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.reading.fingerprints import digest, stamp
from datasets.reading.images import read_image, read_size
from datasets.reading.transforms import Box, PairTransform
from datasets.samples import Batch, DataError, ImageLoader, ImageSet

Item = tuple[int, Tensor | str]

BATCHES_AHEAD = 2
"""Batches that threads have read or are reading while one is in use."""


class Images(Dataset[Item]):
    """Images that a `BatchLoader` can read; an item is as `ImageDataset` says."""

    tiles: int = 1
    """Windows below each other in an image, where images are cut into some."""

    def __len__(self) -> int:
        raise NotImplementedError

    def index(self, place: int) -> int:
        """The index that comes with the item at `place`."""
        return place

    def source(self, index: int) -> Path | int:
        """What to call an image in a message."""
        raise NotImplementedError

    def box(self, index: int) -> Box | None:
        """Where the image at `index` lies in the square it became; None for everywhere.

        Raises:
            DataError: Its size cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of all that makes the images what they are, without reading the files.

        It holds the versions of what makes them, too: images of an earlier one are others.
        """
        raise NotImplementedError


class ImageDataset(Images):
    """Transformed images of files.

    An item is its index with the image, (3, S, S) uint8, or, where the file cannot be read, with
    the error's text, so that the error crosses from a worker process as data.
    """

    def __init__(self, paths: Sequence[Path], transform: PairTransform) -> None:
        self.paths = tuple(paths)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path = self.paths[index]
        try:
            image = read_image(path, self.transform.reading)  # (H, W, 3)
        except DataError as error:
            return index, str(error)
        try:
            return index, _to_tensor(self.transform.image(image))
        except DataError as error:
            return index, f"cannot resize the image {path}: {error}"

    def source(self, index: int) -> Path | int:
        """What to call an image in a message: its file."""
        return self.paths[index]

    def box(self, index: int) -> Box | None:
        """See `Images.box`; of the file no more than its header is read."""
        if not self.transform.pads:
            return None
        return self.transform.box(*read_size(self.paths[index], self.transform.reading))

    def fingerprint(self) -> str:
        """A hash of the files' paths, sizes and times of change, and of the transform."""
        return digest([repr(self.transform), *map(stamp, self.paths)])


class ArrayDataset(Images):
    """Transformed images of an array; an item is its index with the image, (3, S, S) uint8.

    Raises:
        ValueError: The array is not (N, H, W) or (N, H, W, 3) uint8.
    """

    def __init__(self, images: np.ndarray, transform: PairTransform) -> None:
        grey = images.ndim == 3
        if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] == 3)):
            raise ValueError(
                "images must be uint8 of shape (N, H, W) or (N, H, W, 3), "
                f"got {images.dtype} of shape {images.shape}"
            )
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        image = self.images[index]  # (H, W) or (H, W, 3)
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)  # (H, W, 3)
        return index, _to_tensor(self.transform.image(image))

    def source(self, index: int) -> Path | int:
        """What to call an image in a message: its index."""
        return index

    def box(self, index: int) -> Box | None:
        """See `Images.box`."""
        del index
        return self.transform.box(*self.images.shape[1:3])

    def fingerprint(self) -> str:
        """A hash of the array and of the transform."""
        array = np.ascontiguousarray(self.images)
        content = hashlib.blake2b(array.data, digest_size=16).hexdigest()
        return digest([repr(self.transform), str(array.shape), content])


def images_of(image_set: ImageSet, transform: PairTransform) -> ImageDataset | ArrayDataset:
    """The transformed images of a split, in its order."""
    if image_set.paths is not None:
        return ImageDataset(image_set.paths, transform)
    assert image_set.images is not None
    return ArrayDataset(image_set.images, transform)


class BatchLoader(ImageLoader):
    """Iterates over a data set in a fixed order, as `Batch`; workers read the images ahead.

    Processes read fastest, but are forks that share the parent's memory: each page that the parent
    writes while they live is copied first. Where the network runs on the CPU those are the pages of
    its feature maps, which costs more than reading small images does (measured: forward passes
    over 760 images took 1.3 times as long, over 40 images 6 times). So there, threads read.

    Args:
        dataset: what to read.
        batch_size: images of a batch; where they are cut, windows, and at least those of an image.
        workers: processes, or threads; 0 reads when a batch is asked for.
        skip_unreadable: leave unreadable images out.
        for_gpu: the workers are processes and batches lie in pinned memory; else they are threads.
        places: items of the data set to read, in this order; None for all.

    See `ImageLoader` for the attributes.

    Raises:
        DataError: On iteration, at the first unreadable image, unless skip_unreadable; or when a
            worker process was killed.
    """

    def __init__(
        self,
        dataset: Images,
        *,
        batch_size: int,
        workers: int,
        skip_unreadable: bool,
        for_gpu: bool = False,
        places: Sequence[int] | None = None,
    ) -> None:
        self._places = range(len(dataset)) if places is None else tuple(places)
        self.num_images = len(self._places)
        self.at_once = batch_size
        self.batch_size = batch_size = max(1, batch_size // dataset.tiles)
        self.skipped: list[tuple[Path | int, str]] = []
        self._dataset = dataset
        self._workers = workers
        self.skips_unreadable = skip_unreadable
        num_batches = -(-self.num_images // batch_size)
        self._threads = 0 if for_gpu else min(workers, self.num_images)
        self._loader: DataLoader[Item] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self._places,
            num_workers=min(workers, num_batches) if for_gpu else 0,
            collate_fn=_collate,
            pin_memory=for_gpu,
            worker_init_fn=_init_worker,
            persistent_workers=False,
            # Without a generator of its own each iteration would draw from the global one, and
            # the numbers of a run would depend on how often images were read.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def indices(self) -> list[int]:
        """See `ImageLoader.indices`; no image is read for it."""
        return [self._dataset.index(place) for place in self._places]

    def at(self, rows: Sequence[int]) -> "BatchLoader":
        """See `ImageLoader.at`."""
        return BatchLoader(
            self._dataset,
            batch_size=self.at_once,
            workers=self._workers,
            skip_unreadable=self.skips_unreadable,
            for_gpu=self._loader.pin_memory,
            places=[self._places[row] for row in rows],
        )

    def fingerprint(self) -> dict[str, Any]:
        """What tells these images from any others; the size of batches moves the last bits."""
        images = self._dataset.fingerprint()
        if self._places != range(len(self._dataset)):
            images = digest([images, str(self._places)])
        return {
            "images": images,
            "batch_size": self.at_once,
            "skip_unreadable": self.skips_unreadable,
        }

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        for indices, images, errors in self._by_threads() if self._threads else self._batches():
            for index, error in errors:
                if not self.skips_unreadable:
                    raise DataError(f"{error}; pass --skip-unreadable to leave such images out")
                self.skipped.append((self._dataset.source(index), error))
            if indices:
                yield Batch(indices, images)

    def _by_threads(self) -> Iterator[tuple[list[int], Tensor, list[tuple[int, str]]]]:
        """Iterates over the images; threads read the next batches."""
        size = self.batch_size
        starts = iter(range(0, self.num_images, size))
        ahead: deque[list[Future[Item]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="images")

        def read_one_more() -> None:
            if (start := next(starts, None)) is not None:
                places = self._places[start : start + size]
                ahead.append([pool.submit(self._dataset.__getitem__, place) for place in places])

        try:
            for _ in range(BATCHES_AHEAD):
                read_one_more()
            while ahead:
                batch = ahead.popleft()
                read_one_more()
                yield _collate([future.result() for future in batch])
        finally:
            pool.shutdown(cancel_futures=True)

    def _batches(self) -> Iterator[tuple[list[int], Tensor, list[tuple[int, str]]]]:
        """Iterates over the loader; a worker's death becomes an error that names the images."""
        done = 0
        batches = iter(self._loader)
        while True:
            try:
                batch: Any = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                near = self._dataset.source(self.indices[min(done, self.num_images - 1)])
                raise DataError(
                    "a process that reads images was killed, perhaps for want of memory, near "
                    f"{near}: run the same command again, or with fewer processes (--workers 0 "
                    "for none)"
                ) from error
            done += len(batch[0]) + len(batch[2])
            yield batch


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)  # (3, S, S)


def _collate(items: list[Item]) -> tuple[list[int], Tensor, list[tuple[int, str]]]:
    indices, images, errors = [], [], []
    for index, image in items:
        if isinstance(image, str):
            errors.append((index, image))
        else:
            indices.append(index)
            images.append(image)
    stacked = torch.stack(images) if images else torch.empty(0)  # (B, 3, S, S)
    return indices, stacked, errors


def _init_worker(worker_id: int) -> None:  # noqa: ARG001  (the signature is DataLoader's)
    # Workers are the parallelism: threads inside of them would only compete, and OpenCV's pool
    # does not survive a fork.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    # An interrupt reaches the whole process group; only the main process answers it, and ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
