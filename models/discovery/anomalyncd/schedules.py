"""What changes from epoch to epoch: the learning rate, and how sharp the teacher is."""

import math

import numpy as np

LEAST_RATE = 1e-3
"""To which share of the first learning rate the last ones come near."""


def learning_rates(first: float, epochs: int) -> list[float]:
    """Return that of each epoch, along half a cosine; the end of it would be epoch `epochs`."""
    last = first * LEAST_RATE
    return [last + (first - last) * (1 + math.cos(math.pi * i / epochs)) / 2 for i in range(epochs)]


def teacher_temperatures(
    warm: float, final: float, *, warmup: int, repeats: int, epochs: int
) -> list[float]:
    """Return the teacher's temperature in each epoch.

    In the warm-up it goes from `warm` to `final` in equal steps, both ends included, each of which
    lasts `repeats` epochs, the last one fewer where `warmup` is no multiple. Then it is `final`.

    Args:
        warm: in the first epoch.
        final: after the warm-up.
        warmup: epochs.
        repeats: epochs of one temperature.
        epochs: in all, at least `warmup`.
    """
    steps = np.linspace(warm, final, math.ceil(warmup / repeats)).tolist()
    return [steps[i // repeats] if i < warmup else final for i in range(epochs)]
