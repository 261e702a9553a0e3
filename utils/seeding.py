"""One seed for everything random in a run."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> torch.Generator:
    """Seed python, numpy and torch and return a CPU generator for whatever is drawn explicitly.

    Called anew for each category, so that a category alone gives the number it has in the full
    table. The generator lives on the CPU: a seed draws the same vector for every device.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries still read the global state
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
