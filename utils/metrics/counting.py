"""How many scores lie above each anomalous one: the exact counts behind every metric.

Every curve of a ranking changes its true positives only at a threshold that some anomalous score
takes. So the many normal scores are sorted, by value; the few distinct anomalous scores are looked
up among them, which gives the false positives above and at each one. There is no threshold grid,
and equal scores are one threshold (-0.0 and 0.0 are equal).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from utils.metrics.curve import Curve

if TYPE_CHECKING:
    from torch import Tensor

PART_SIZE = 2**19
"""Scores that are worth a thread on the CPU: sorting them takes two milliseconds."""

BLOCK = 64
"""Sorted scores in which a search takes its last steps; a power of two."""

MANY_QUERIES = 2**11
"""Thresholds whose search is worth more than a few microseconds of preparation."""

QUERIES_AT_ONCE = 2**14
"""Thresholds looked up together: what is computed on the way stays in the processor's cache."""


class _Sorted(NamedTuple):
    """Whole blocks of sorted scores, the last of them infinite, and the last score of each."""

    values: np.ndarray
    block_ends: np.ndarray


def threads_for(num_scores: int) -> int:
    """Returns how many of PyTorch's threads so many scores are worth."""
    if num_scores < PART_SIZE:
        return 1
    import torch  # figures count few scores, and need it for nothing else

    return min(torch.get_num_threads(), 1 + num_scores // PART_SIZE)


@contextmanager
def threaded_map(num_threads: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Gives a `map` that runs in threads, for functions that mostly leave Python's lock alone.

    With one thread it is the built-in one: to start even one thread costs more than small inputs.
    """
    if num_threads == 1:
        yield map
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            yield pool.map


def count_at_thresholds(scores: "Tensor", labels: "Tensor") -> Curve:
    """Counts at each distinct anomalous score; both classes must be present.

    Args:
        scores: (...), finite, float32 or float64.
        labels: (...) bool, True = anomalous, on the same device.
    """
    if scores.device.type == "cpu":
        return curve_of(scores.numpy(), labels.numpy())
    order, thresholds, found, not_above, below = _on_device(scores, labels)
    return _curve(order, thresholds, found, not_above, below, labels.numel())


def curve_of(scores: np.ndarray, labels: np.ndarray) -> Curve:
    """Does what `count_at_thresholds` does, for arrays.

    Many scores are sorted in as many parts as PyTorch has threads, and the counts of the parts are
    added: the same integers, whatever the number of parts.
    """
    flat, anomalous_at = scores.reshape(-1), labels.reshape(-1)
    num_parts = threads_for(flat.size)
    parts = np.array_split(flat, num_parts), np.array_split(anomalous_at, num_parts)
    with threaded_map(num_parts) as run:
        anomalous, normal = zip(*run(_sort_normal, *parts), strict=True)
        order, thresholds, true_positives = _group(np.concatenate(anomalous))
        # In ascending order, searches in succession look at the same places.
        ascending = np.ascontiguousarray(thresholds[::-1])
        queries = np.array_split(ascending, -(-len(ascending) // QUERIES_AT_ONCE))
        counts = list(run(partial(_count_below, normal), queries))
    not_above, below = (np.concatenate(found)[::-1] for found in zip(*counts, strict=True))  # (K,)
    return _curve(order, thresholds, true_positives, not_above, below, flat.size)


def _curve(
    order: np.ndarray,
    thresholds: np.ndarray,
    true_positives: np.ndarray,
    not_above: np.ndarray,
    below: np.ndarray,
    num_scores: int,
) -> Curve:
    num_normal = num_scores - len(order)
    return Curve(
        order, thresholds, true_positives, num_normal - not_above, num_normal - below, num_normal
    )


def _on_device(scores: "Tensor", labels: "Tensor") -> tuple[np.ndarray, ...]:
    import torch

    sorted_normal = scores[~labels].sort().values  # (M,)
    order, thresholds, true_positives = _group(scores[labels].cpu().numpy())
    queries = torch.from_numpy(thresholds).to(scores.device)
    not_above = torch.searchsorted(sorted_normal, queries, right=True).cpu().numpy()
    below = torch.searchsorted(sorted_normal, queries).cpu().numpy()
    return order, thresholds, true_positives, not_above, below


def _sort_normal(scores: np.ndarray, anomalous_at: np.ndarray) -> tuple[np.ndarray, _Sorted]:
    """Returns the anomalous ones among (M,) scores as they come, and the normal ones sorted.

    Infinity, which is above every score, takes the anomalous places and fills the last block.
    """
    values = np.full((len(scores) // BLOCK + 1) * BLOCK, np.inf, dtype=scores.dtype)
    values[: len(scores)] = scores
    values[: len(scores)][anomalous_at] = np.inf
    # NumPy sorts with SIMD and without an index array; PyTorch does neither on the CPU.
    values.sort()
    return scores[anomalous_at], _Sorted(values, values[BLOCK - 1 :: BLOCK].copy())


def _count_below(
    sorted_parts: Sequence[_Sorted], queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the scores <= and < each of (K,) ascending queries, in all parts together."""
    not_above, below = np.zeros((2, len(queries)), dtype=np.int64)
    for part in sorted_parts:
        found = _search(part, queries, "right")  # (K,)
        not_above += found
        below += found
        # Only a query that equals a score has another place from the left. Where none is smaller,
        # the index -1 finds infinity, which equals no query.
        tied = np.flatnonzero(part.values[found - 1] == queries)
        below[tied] += _search(part, queries[tied], "left") - found[tied]
    return not_above, below


def _search(part: _Sorted, queries: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
    """Does what `np.searchsorted` does, in half of its time.

    The last steps of a search wait for memory, one query after the other. So it only finds the
    block; the steps within are taken for all queries at once, where there are many.
    """
    if len(queries) < MANY_QUERIES:
        return np.searchsorted(part.values, queries, side=side)
    is_before = np.less_equal if side == "right" else np.less
    place = np.searchsorted(part.block_ends, queries, side=side) * BLOCK  # (K,)
    step = BLOCK // 2
    while step:
        place += step * is_before(part.values.take(place + (step - 1)), queries)
        step //= 2
    return place


def _group(anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks (P,) scores from the highest down and merges ties into K thresholds.

    Returns:
        The order (P,), the distinct scores (K,) and how many scores are >= each of them (K,).
    """
    order = np.argsort(anomalous)[::-1]
    ranked = anomalous[order]
    last_of_tie = np.append(ranked[1:] != ranked[:-1], True)
    true_positives = np.flatnonzero(last_of_tie) + 1  # (K,)
    return order, np.ascontiguousarray(ranked[last_of_tie]), true_positives
