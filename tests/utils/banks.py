"""Stored features and test sets that are written down, not extracted."""

import torch

from utils.evaluation.scoring import Scoring
from utils.evaluation.test_set import TestSet
from utils.features.bank import FeatureBank


def bank_of(features):
    """A bank of features (N, C, H, W), which come back to the bit."""
    return FeatureBank(
        [features.float().permute(0, 2, 3, 1)],
        range(len(features)),
        assemble=lambda stages: stages[0],
        device=torch.device("cpu"),
    )


def constant_bank(values, side):
    """N images of one channel that is the image's value everywhere on a grid."""
    return bank_of(torch.tensor(values)[:, None, None, None].expand(-1, 1, side, side))


def set_of(bank, labels, *, masks=None, **options):
    """A test set whose anomalies are holes; `options` are those of the scoring."""
    names = [f"{index}.png" for index in range(len(labels))]
    kinds = ["hole" if label else "good" for label in labels]
    about = {"names": names, "kinds": kinds, "masks": masks, "scoring": Scoring(**options)}
    return TestSet(bank, torch.tensor(labels), **about)
