"""From anomaly maps to masks by what normal images reach, which MEBin has no knowledge of."""

from dataclasses import dataclass

import numpy as np

NORMAL_SHARE = 0.995
"""Share of the pixels of normal maps that lie below the floor of masks."""
DEPTH = 0.5
"""Where a map is cut, between the floor and its peak."""
EVERY = 2
"""Rows and columns of normal maps that are looked at: blurred maps hold no more than that."""


@dataclass(frozen=True)
class Levels:
    """What maps and scores of normal images reach that the head was not fitted on.

    Attributes:
        threshold: images that score higher get a mask.
        floor: the value of a map that masks start above.
        lowest_peak: of all their maps.
    """

    threshold: float
    floor: float
    lowest_peak: float


def levels_of(maps: np.ndarray, scores: np.ndarray, false_alarm_rate: float) -> Levels:
    """Measure normal images.

    Args:
        maps: (N, S, S) of images that the head was not fitted on.
        scores: (N,) of the same images.
        false_alarm_rate: share of them that scores above the threshold.
    """
    return Levels(
        threshold=float(np.quantile(scores, 1 - false_alarm_rate)),
        floor=float(np.quantile(maps[:, ::EVERY, ::EVERY], NORMAL_SHARE)),
        lowest_peak=float(maps.max(axis=(1, 2)).min()),
    )


def above_levels(anomaly_map: np.ndarray, score: float, levels: Levels) -> np.ndarray:
    """Return how far each pixel of a map exceeds the cut, 0 outside the mask.

    Pixels count the more the surer they belong to the defect, so its outline, which the blur of
    maps has widened, counts little. An image that scores like normal ones has no mask.

    Args:
        anomaly_map: (S, S).
        score: of the image.
        levels: of normal images.

    Returns:
        (S, S) float32.
    """
    if score <= levels.threshold:
        return np.zeros(anomaly_map.shape, dtype=np.float32)
    peak = float(anomaly_map.max())
    # The score of some methods is not the map's peak: the map may lie below the floor everywhere.
    floor = levels.floor if peak > levels.floor else float(np.median(anomaly_map))
    cut = floor + DEPTH * (peak - floor)
    return np.maximum(anomaly_map - cut, 0).astype(np.float32)
