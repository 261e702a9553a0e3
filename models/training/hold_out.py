"""Normal images that a fit keeps aside, to stop or to scale by."""

import torch

from models.detector import FeatureSource


def hold_out(
    bank: FeatureSource, share: float, generator: torch.Generator
) -> tuple[FeatureSource, FeatureSource | None]:
    """Split images at random into those to train on and a share that is kept aside.

    Args:
        bank: the images.
        share: of them, rounded to whole images.
        generator: draws which.

    Returns:
        Those to train on, perhaps none, and those kept aside; None where the share is no image.
    """
    num_held = round(share * len(bank))
    if num_held == 0:
        return bank, None
    order = torch.randperm(len(bank), generator=generator)
    return bank.subset(order[num_held:]), bank.subset(order[:num_held])
