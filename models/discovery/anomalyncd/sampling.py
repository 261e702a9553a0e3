"""Which pieces make a batch: as many with a label as without, on average, and some of each."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The pieces of a batch.

    Attributes:
        labelled: (n_l,) int64, at least one.
        unlabelled: (n_u,) int64, at least one.
    """

    labelled: Tensor
    unlabelled: Tensor


def draw_epoch(
    num_labelled: int, num_unlabelled: int, batch_size: int, generator: torch.Generator
) -> list[Draw]:
    """Draw the batches of an epoch, with replacement: in all, as many pieces as there are.

    Each piece has a label or none by equal chance, and then is any of that sort. A batch of one
    sort alone, which the released code leaves out, is drawn again; so is a last batch of one piece
    left out.

    Args:
        num_labelled: at least 1.
        num_unlabelled: at least 1.
        batch_size: at least 2; the last batch may be smaller.
        generator: a CPU generator.
    """
    total = num_labelled + num_unlabelled
    sizes = [min(batch_size, total - start) for start in range(0, total, batch_size)]
    draws = []
    for size in sizes:
        if size < 2:
            continue
        n_l = 0
        while n_l in (0, size):
            n_l = int((torch.rand(size, generator=generator) < 0.5).sum())
        labelled = torch.randint(num_labelled, (n_l,), generator=generator)
        unlabelled = torch.randint(num_unlabelled, (size - n_l,), generator=generator)
        draws.append(Draw(labelled, unlabelled))
    return draws
