"""MEBin: anomaly maps to masks, cut where the number of regions stays the same longest.

Source: "AnomalyNCD: Towards Novel Anomaly Class Discovery in Industrial Scenarios" (Huang et al.,
CVPR 2025), the main element binarisation of its section 3, as its released code has it; all in
integers, which do not wrap.

| released | here | meaning |
| --- | --- | --- |
| s_max | high | largest value of all maps of a product |
| s_min | low | smallest peak of a map: that of a good image, if there are any |
| est | count | how many regions the map has |

A map's own peak says little; how it compares with the peaks of the other maps does. So maps of one
product share `low` and `high`: the least anomalous one never gets a region.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

TOP = 255
"""Thresholds run from here to just above 0, in units of the range."""
KERNEL = np.ones((6, 6), dtype=np.uint8)
EIGHT_NEIGHBOURS = 8


@dataclass(frozen=True)
class Binarised:
    """A map cut at a threshold.

    Attributes:
        mask: (H, W) bool.
        count: of regions, 0 where no number of them stays the same long enough.
        threshold: values above it are inside, before the erosion.
    """

    mask: np.ndarray
    count: int
    threshold: int


def range_of(maps: Iterable[np.ndarray]) -> tuple[int, int]:
    """Return the smallest peak of all maps of a product, and the largest.

    Args:
        maps: (H, W) integers each, at least one; read one after the other.
    """
    peaks = [int(scores.max()) for scores in maps]
    return min(peaks), max(peaks)


def binarise(
    scores: np.ndarray,
    low: int,
    high: int,
    *,
    step: int = 4,
    shortest: int = 4,
    erodes: bool = True,
) -> Binarised:
    """Cut a map where its number of regions is steadiest.

    Args:
        scores: (H, W) integers.
        low: values up to it count as 0; see `range_of`. Where all maps have one peak, or there is
            one map, that leaves nothing: a bound from normal images has to come from elsewhere.
        high: of all maps.
        step: between two thresholds, in 255ths of the range.
        shortest: thresholds in succession that have to agree.
        erodes: take 6 x 6 pixels off, so that specks are no regions.
    """
    if high <= low:
        return Binarised(np.zeros(scores.shape, dtype=bool), 0, high)
    values = scores.astype(np.int64)
    counts: list[int] = []
    known: dict[int, int] = {}
    for threshold in range(TOP, 0, -step):
        # The integer that `value - low > threshold (high - low) / 255` is beyond.
        limit = low + threshold * (high - low) // TOP
        if limit not in known:
            known[limit] = _count(_cut(values, limit, erodes=erodes))
        counts.append(known[limit])
    last, count = steadiest(counts, shortest)
    threshold = TOP if last is None else TOP - step * last
    raw = low + threshold * (high - low) // TOP
    mask = np.zeros(scores.shape, dtype=bool) if last is None else _cut(values, raw, erodes=erodes)
    return Binarised(mask, count, raw)


def steadiest(counts: Sequence[int], shortest: int) -> tuple[int | None, int]:
    """Find the number of regions that stays the same for most thresholds in succession.

    Ties of two numbers go to the one that is first steady at the higher threshold; ties of two runs
    of one number to the one at the lower.

    Args:
        counts: regions at each threshold, from the highest down.
        shortest: runs below this length do not count, nor do those of 0.

    Returns:
        The last index of its longest run, None where there is none, and the number.
    """
    runs: list[tuple[int, int, int]] = []  # number, length, last index
    start = 0
    for i in range(1, len(counts) + 1):
        if i == len(counts) or counts[i] != counts[start]:
            if counts[start] and i - start >= shortest:
                runs.append((counts[start], i - start, i - 1))
            start = i
    if not runs:
        return None, 0
    longest = max(length for _, length, _ in runs)
    first = {number: last for number, _, last in reversed(runs)}  # where each is first steady
    tied = [number for number, length, _ in runs if length == longest]
    count = min(tied, key=lambda number: first[number])
    last = max(end for number, length, end in runs if (number, length) == (count, longest))
    return last, count


def _cut(values: np.ndarray, limit: int, *, erodes: bool) -> np.ndarray:
    """Return where values exceed a limit, (H, W) bool, eroded; beyond the border all is inside."""
    inside = (values > limit).astype(np.uint8)
    return (cv2.erode(inside, KERNEL) if erodes else inside).astype(bool)


def _count(mask: np.ndarray) -> int:
    """Count the 8-connected regions of a mask."""
    return cv2.connectedComponents(mask.view(np.uint8), connectivity=EIGHT_NEIGHBOURS)[0] - 1
