"""From an image's map to its mask, in each of the ways that `--masks` names."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from configs.discovery import Masks
from datasets.reading.masks import read_checked_mask
from pipeline.discovery.looking import Looked
from utils.discovery.binarise import TOP, binarise, range_of
from utils.discovery.levels import Levels, above_levels


@dataclass(frozen=True)
class Cut:
    """What is inside of an image.

    Attributes:
        mask: (H, W) bool, at the size of the image.
        weights: (S, S) float32, how much each pixel of a map of the transformed image counts; None
            where all of the mask counts alike.
        most: regions that are kept.
    """

    mask: np.ndarray
    weights: np.ndarray | None
    most: int


Cutter = Callable[[int, np.ndarray, float, tuple[int, int]], Cut]
"""Of the image's number, its map (h, w), its score and its size (H, W)."""


@dataclass(frozen=True)
class Scale:
    """Turns the maps of a product into 8 bits, and these into scores of 0 to 1.

    Attributes:
        low: value that becomes 0, of all maps.
        high: value that becomes 255.
        floor: of the 8-bit values, the one that scores 0; see `range_of`.
        top: the one that scores 1.
    """

    low: float
    high: float
    floor: int
    top: int

    def eight_bits(self, anomaly_map: np.ndarray) -> np.ndarray:
        """Return a map (h, w) as integers of 0 to 255."""
        if anomaly_map.dtype == np.uint8:
            return anomaly_map
        share = (anomaly_map.astype(np.float64) - self.low) / max(self.high - self.low, 1e-12)
        return (share.clip(0, 1) * TOP).astype(np.uint8)

    def scores(self, anomaly_map: np.ndarray) -> np.ndarray:
        """Return the scores of a map's pixels (h, w) float32, 0 to 1."""
        values = self.eight_bits(anomaly_map).astype(np.float32)
        return ((values - self.floor) / max(self.top - self.floor, 1)).clip(0, 1)


def scale_of(looked: Looked, *, guarded: bool) -> Scale:
    """Read all maps once for the range that they share.

    Args:
        looked: the images.
        guarded: of maps that have one peak, the lowest value counts as 0 instead of that peak,
            which would leave nothing; and where held-out normal images are known, no more than the
            lowest of their peaks does. Otherwise as released.
    """
    lows: list[float] = []
    peaks: list[np.ndarray] = []  # (1, 1) each, of the map's own type
    for batch in looked.batches():
        lows += [float(one.min()) for one in batch.maps]
        peaks += [one.max(keepdims=True) for one in batch.maps]
    low, high = min(lows), max(float(peak[0, 0]) for peak in peaks)
    raw = Scale(low, high, 0, TOP)
    # Eight bits keep the order of values: a map's peak stays its peak.
    floor, top = range_of(map(raw.eight_bits, peaks))
    if guarded and looked.levels is not None:
        # Without a good image among them, the least anomalous one would have no region.
        floor = min(floor, int(raw.eight_bits(np.array([looked.levels.lowest_peak]))[0]))
    if guarded and top <= floor:
        floor = 0
    return Scale(low, high, floor, top)


def cutter_of(masks: Masks, most_regions: int, looked: Looked, scale: Scale | None) -> Cutter:
    """Return what `--masks` names.

    Args:
        masks: the way.
        most_regions: kept of an image, where MEBin does not say.
        looked: the images; by what normal ones reach, their levels.
        scale: of their maps, for MEBin.
    """
    if masks == "normal":
        assert looked.levels is not None
        return _by_levels(looked, looked.levels, most_regions)
    if masks == "true":
        return _given(looked, most_regions)
    assert scale is not None
    return _by_mebin(looked, scale, is_released=masks == "mebin_released")


def _by_levels(looked: Looked, levels: Levels, most: int) -> Cutter:
    def cut(number: int, anomaly_map: np.ndarray, score: float, size: tuple[int, int]) -> Cut:
        del number
        weights = above_levels(anomaly_map, score, levels)
        return Cut(looked.maps.at_image(weights, size) > 0, weights, most)

    return cut


def _by_mebin(looked: Looked, scale: Scale, *, is_released: bool) -> Cutter:
    def cut(number: int, anomaly_map: np.ndarray, score: float, size: tuple[int, int]) -> Cut:
        del number, score
        found = binarise(scale.eight_bits(anomaly_map), scale.floor, scale.top)
        mask = looked.maps.at_image(found.mask, size) > 0.5
        # The released code keeps one more than it counts.
        return Cut(mask, None, found.count + 1 if is_released else max(found.count, 1))

    return cut


def _given(looked: Looked, most: int) -> Cutter:
    assert looked.masks is not None
    masks = looked.masks

    def cut(number: int, anomaly_map: np.ndarray, score: float, size: tuple[int, int]) -> Cut:
        del anomaly_map, score
        path = masks[number]
        if path is None:
            return Cut(np.zeros(size, dtype=bool), None, most)
        mask = read_checked_mask(looked.paths[number], path, looked.transform.reading)
        return Cut(mask, None, most)

    return cut
