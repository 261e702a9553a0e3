"""What every loop over epochs needs: a bar, and a look at the losses that costs one copy."""

import torch
from torch import Tensor
from tqdm import tqdm


def epochs(count: int, description: str = "epochs", *, start: int = 0) -> tqdm:
    """Count from 1, or from after `start`, to `count` behind a bar, which only a terminal shows."""
    numbers = range(start + 1, count + 1)
    return tqdm(numbers, desc=description, total=count, initial=start, leave=False, disable=None)


def mean_of_finite(losses: list[Tensor], epoch: int) -> float:
    """Average an epoch's losses with one device-to-host copy.

    Raises:
        FloatingPointError: one is not finite; epoch and step are named.
    """
    values = torch.stack(losses).double().cpu()
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        step = int(bad[0]) + 1
        raise FloatingPointError(f"loss is {values[step - 1].item()} at epoch {epoch}, step {step}")
    return values.mean().item()
