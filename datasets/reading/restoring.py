"""Brings what was computed on a transformed image back to the size of the original."""

import numpy as np

from datasets.reading.transforms import PairTransform


def restore_map(
    transform: PairTransform, anomaly_map: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Interpolates a map of a transformed image bilinearly to its original image.

    Args:
        transform: That made the image the map is of.
        anomaly_map: (S, S) floats.
        size: (H, W) of the original, upright image.

    Returns:
        (H, W) float32; NaN where the transform cut the image away.
    """
    width, height = transform._resized(np.empty((*size, 0)))  # its geometry is this module's task
    values = anomaly_map.astype(np.float32)  # (S, S)
    rows = _Axis(size[0], height, transform._offset(height), len(values))
    columns = _Axis(size[1], width, transform._offset(width), len(values))
    half = rows.interpolate(values)  # (H', S), H' of H rows lie in the crop
    restored = np.full(size, np.nan, dtype=np.float32)  # (H, W)
    restored[rows.inside, columns.inside] = columns.interpolate(half.T).T
    return restored


class _Axis:
    """Where the pixels of one axis of the original lie on the map.

    Args:
        original: Length of the axis of the original, in pixels.
        resized: Its length after the resize.
        offset: Where the crop starts after the resize.
        cropped: Length of the crop.
    """

    def __init__(self, original: int, resized: int, offset: int, cropped: int) -> None:
        centres = (np.arange(original) + 0.5) * (resized / original) - 0.5 - offset
        (inside,) = ((centres >= -0.5) & (centres <= cropped - 0.5)).nonzero()
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        self.inside = slice(start, stop)
        place = centres[self.inside].clip(0, cropped - 1)
        self._low = np.minimum(place.astype(np.int64), max(cropped - 2, 0))
        self._high = np.minimum(self._low + 1, cropped - 1)
        self._weight = (place - self._low).astype(np.float32)[:, None]

    def interpolate(self, values: np.ndarray) -> np.ndarray:
        """Interpolate along the first axis: (S, K) to (number of pixels inside, K)."""
        low, high = values[self._low], values[self._high]
        return low + self._weight * (high - low)
