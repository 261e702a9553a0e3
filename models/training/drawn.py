"""Training images with something drawn into each: corrupted copies, pasted patches, their masks."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from models.detector import FeatureSource

Drawn = tuple[np.ndarray, ...]
"""Of one image: images (S, S, 3) uint8, and masks (S, S) bool, in an order of the caller's."""
DrawOne = Callable[[np.ndarray, np.random.Generator], Drawn]
MOST_THREADS = 8


def drawn_batches(
    bank: FeatureSource, batch_size: int, draw: DrawOne, generator: torch.Generator
) -> Iterator[tuple[Tensor, ...]]:
    """Yield shuffled images and what is drawn of each, on the device of the images.

    Every image has random numbers of its own, which follow from `generator`, so nothing depends on
    the number of threads. The next batch is drawn while this one is used.

    Args:
        bank: of uint8 images.
        batch_size: images of a batch.
        draw: makes something of an image (S, S, 3) uint8, which it leaves as it is.
        generator: a CPU generator.

    Yields:
        The images (B, 3, S, S) uint8, then each thing that `draw` returns: images alike, masks
        (B, S, S) bool.
    """
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        waiting: tuple[Tensor, list[Future[Drawn]]] | None = None
        for images in bank.batches(batch_size, generator=generator):
            seeds = torch.randint(2**62, (len(images),), generator=generator).tolist()
            arrays = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, S, S, 3)
            jobs = [
                threads.submit(draw, np.ascontiguousarray(array), np.random.default_rng(seed))
                for array, seed in zip(arrays, seeds, strict=True)
            ]
            if waiting is not None:
                yield _collected(*waiting)
            waiting = images, jobs
        if waiting is not None:
            yield _collected(*waiting)


def _collected(images: Tensor, jobs: list[Future[Drawn]]) -> tuple[Tensor, ...]:
    columns = zip(*(job.result() for job in jobs), strict=True)
    stacked = [torch.from_numpy(np.stack(column)) for column in columns]
    found = [one.permute(0, 3, 1, 2) if one.ndim == 4 else one for one in stacked]
    return images, *(one.to(images.device) for one in found)
