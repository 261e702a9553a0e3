"""How a learning rate changes over a fit, as a factor of it; `Loop` asks for it."""

import math

LATE = (0.8, 0.9)
"""Parts of the epochs after which the rate falls (released code of DRAEM)."""
LATE_DROP = 0.2
"""What it is multiplied by (released code of DRAEM)."""


def late_drops(passed: float, epochs: int) -> float:
    """Return 1, after 80 % of all epochs 0.2, after 90 % 0.04.

    Args:
        passed: epochs so far.
        epochs: all of them.
    """
    return LATE_DROP ** sum(passed >= part * epochs for part in LATE)


def warmed_cosine(part: float, *, warmup: float, least: float) -> float:
    """Return a factor that rises linearly from `least` to 1, then falls by a half cosine to it.

    Args:
        part: of the fit that has passed, 0 to 1; what is above is 1.
        warmup: part of the fit in which it rises, below 1.
        least: the factor at both ends.
    """
    if part < warmup:
        return least + (1 - least) * part / warmup
    share = min(1.0, (part - warmup) / (1 - warmup))
    return least + (1 - least) * (1 + math.cos(math.pi * share)) / 2
