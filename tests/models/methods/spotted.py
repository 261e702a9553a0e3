"""Striped images with a visible defect: a square of coloured noise."""

import torch

from models.detector import Detector
from tests.models.banks import seeded
from tests.models.methods.striped import SIDE, draw_striped

SPOT = 12


def draw_spotted(count, *, seed=1):
    """Stripes (N, 3, SIDE, SIDE), uint8, with a square of noise somewhere; and where, bool."""
    images = draw_striped(count, seed=seed)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    places = torch.randint(SIDE - SPOT, (count, 2), generator=seeded(seed)).tolist()
    noise = torch.randint(256, (count, 3, SPOT, SPOT), generator=seeded(seed + 1)).byte()
    for image, mask, (y, x), spot in zip(images, masks, places, noise, strict=True):
        image[:, y : y + SPOT, x : x + SPOT] = spot
        mask[y : y + SPOT, x : x + SPOT] = True
    return images, masks


@torch.inference_mode()
def image_scores(detector: Detector, images):
    """A detector's own scores, or the largest values of its maps."""
    maps, scores = detector.score(images)
    return maps.amax(dim=(1, 2)) if scores is None else scores


def auroc(normal, anomalous):
    """The share of pairs in which the anomalous one is higher; ties count half."""
    wins, ties = anomalous[:, None] > normal, anomalous[:, None] == normal
    return (wins.double() + ties / 2).mean().item()
