"""Striped images with a defect that no grey level and no gradient gives away.

In a square the stripes are missing, or turned: only a detector that has learned the stripes finds
it.
"""

import torch
from sklearn.metrics import roc_auc_score

from tests.models.banks import seeded

SIDE = 32
SQUARE = 14


def squares(count, seed):
    """Where the defect of each image is, (N, SIDE, SIDE) bool."""
    start = torch.randint(SIDE - SQUARE, (2, count, 1), generator=seeded(seed))
    rows, columns = (torch.arange(SIDE) >= start) & (torch.arange(SIDE) < start + SQUARE)
    return rows[:, :, None] & columns[:, None]


def draw_striped(count, *, seed=1, defect=None):
    """Noisy stripes down the image (N, 3, SIDE, SIDE), uint8.

    The defect is "blank" or "turned", or "all" for images that are blank everywhere.
    """
    wave = 60 * torch.sin(torch.arange(SIDE) * (2 * torch.pi / 8)) + 128
    down = wave.expand(SIDE, SIDE)
    others = {"blank": torch.full_like(down, 128), "turned": down.T}
    images = down.expand(count, -1, -1).clone()
    if defect in others:
        images = torch.where(squares(count, seed), others[defect], images)
    elif defect == "all":
        images.fill_(128)
    noise = torch.randint(-8, 9, (count, SIDE, SIDE), generator=seeded(seed + 1000))
    return (images + noise).byte()[:, None].expand(-1, 3, -1, -1).contiguous()


@torch.inference_mode()
def separation(detector, defect, count=16):
    """AUROC of a detector's largest map values, images with a defect against others."""
    good = detector(draw_striped(count, seed=11)).amax(dim=(1, 2))
    bad = detector(draw_striped(count, seed=12, defect=defect)).amax(dim=(1, 2))
    return roc_auc_score([0] * count + [1] * count, torch.cat([good, bad]))


@torch.inference_mode()
def localisation(detector, defect, count=16):
    """AUROC of a detector's map values, pixels in a defect against those beside it."""
    maps = detector(draw_striped(count, seed=12, defect=defect))
    return roc_auc_score(squares(count, 12).flatten(), maps.flatten())
