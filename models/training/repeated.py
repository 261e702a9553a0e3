"""Epochs that have as many images as they are given, whatever the size of the data set."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.detector import FeatureSource


def repeated_batches(
    bank: FeatureSource, batch_size: int, count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield `count` shuffled features in batches, all but the last of which are full.

    The bank is passed as often as that takes, in a new order each time: no features come again
    before all have come.

    Args:
        bank: at least one image.
        batch_size: of the batches; they may be larger than the bank.
        count: features in all.
        generator: a CPU generator.
    """
    waiting: list[Tensor] = []
    there, left = 0, count
    while left > 0:
        for features in bank.batches(min(batch_size, len(bank)), generator=generator):
            waiting.append(features)
            there += len(features)
            while there >= min(batch_size, left):
                joined = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
                size = min(batch_size, left)
                yield joined[:size]
                waiting, there, left = [joined[size:]], there - size, left - size
                if left == 0:
                    return
