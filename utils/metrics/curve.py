"""The counts behind every metric, at each distinct anomalous score."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Counts at the K distinct anomalous scores, from the highest down.

    Every curve of a ranking changes its true positives only at these thresholds: there is no grid.

    Attributes:
        order: (P,), ranks the anomalous scores from the highest down.
        thresholds: (K,), the scores.
        true_positives: (K,) int64, anomalous scores >= threshold.
        normal_above: (K,) int64, normal scores > threshold.
        false_positives: (K,) int64, normal scores >= threshold.
        num_normal: how many scores are normal.
        region_weights: (P,), of pixels: what each anomalous one adds to the overlap of the defect
            it belongs to, 1 / its area, in the order of the masks; None of images.
    """

    order: np.ndarray
    thresholds: np.ndarray
    true_positives: np.ndarray
    normal_above: np.ndarray
    false_positives: np.ndarray
    num_normal: int
    region_weights: np.ndarray | None = None

    @property
    def num_anomalous(self) -> int:
        """How many scores are anomalous, P."""
        return len(self.order)

    @cached_property
    def found(self) -> np.ndarray:
        """(K,) int64, anomalous scores at each threshold."""
        return np.diff(self.true_positives, prepend=0)

    @cached_property
    def f1(self) -> np.ndarray:
        """(K,), F1 of calling anomalous every score >= threshold."""
        tp, fp = self.true_positives, self.false_positives
        return 2 * tp / (tp + fp + self.num_anomalous)
