"""Exact nearest neighbours of features, in blocks, on the device they live on.

The squared distances of a block come from one product, ||q||^2 + ||m||^2 - 2 q.m. That is fast but
loses the digits of a distance that is small beside the features' norms. So the product only
proposes: the distances of the k best are computed again by subtraction. Where its rounding error
could hide a nearer feature, so are those of `SPARE` more, and where it still could, that query is
compared with all features by subtraction.
"""

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from models.errors import ModelError
from models.features.matmul import at_once, full_precision, linear

SPARE = 8
"""Features proposed beside the k that are wanted."""
QUERIES = 1024
"""Queries searched together. These three are for a CPU; `at_once` has more for a GPU."""
PRODUCT = 2**22
"""Entries of one product: bounds its memory, and keeps it in a processor's cache."""
GATHER = 2**23
"""Entries of the features gathered, or compared by subtraction, at once."""


def check_search(search: str) -> None:
    """Check that a method's option `search` can be followed, before anything is computed.

    Raises:
        ModelError: its package is missing.
    """
    if search == "faiss" and importlib.util.find_spec("faiss") is None:
        raise ModelError(
            "searching by faiss needs the package faiss-cpu (pip install faiss-cpu)",
            {"search": "exact, which finds the same, needs none:"},
        )


def direct_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return Euclidean distances (..., P, R) of features (..., P, C) and (..., R, C).

    By subtraction: full relative accuracy, and a pair's result does not depend on its batch.
    """
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def rounding_share(channels: int, dtype: torch.dtype) -> float:
    """Bound the rounding error of ||q||^2 + ||m||^2 - 2 q.m as a share of ||q||^2 + ||m||^2.

    A sum of C products is off by at most C u of the sum of their sizes, u being half of `eps`; that
    makes C u for the norms and C u for 2 q.m. The rest is room for the surrounding operations and
    for the rounding of the distances that are compared with it.
    """
    return 2 * (channels + 8) * torch.finfo(dtype).eps


def nearest(
    queries: Tensor, memory: Tensor, count: int, *, search: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Find each query's nearest features by Euclidean distance.

    Args:
        queries: features (P, C).
        memory: features (M, C), on the same device and of the same type.
        count: how many to find.
        search: "exact", or "faiss" (its flat index, on the CPU; exact up to its own rounding).

    Returns:
        Distances (P, count), ascending, accurate to rounding in their own magnitude; and the rows
        of `memory` they belong to, (P, count), int64. Equal distances come in any order.

    Raises:
        ModelError: `memory` has fewer than `count` features.
    """
    if count > len(memory):
        raise ModelError(
            f"{count} nearest neighbours were asked for, but the memory holds {len(memory)} "
            "features; fit on more normal images or ask for fewer neighbours"
        )
    proposed = min(count + SPARE, len(memory))
    queries_at_once, gathered = (at_once(n, queries.device) for n in (QUERIES, GATHER))
    size = max(1, min(queries_at_once, gathered // (proposed * queries.shape[1])))
    shift = queries.mean(dim=0)
    with full_precision(queries.device):
        blocks = queries.split(size)
        if search == "faiss":
            rows = _propose_by_faiss(queries, memory, count).split(size)
            found = [_rank(q, memory, r) for q, r in zip(blocks, rows, strict=True)]
        else:
            found = [_search(q, memory, count, proposed, shift) for q in blocks]
    return torch.cat([d for d, _ in found]), torch.cat([r for _, r in found])


def _search(
    queries: Tensor, memory: Tensor, count: int, proposed: int, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return distances and rows, (Q, count) each, of the nearest features of one block."""
    first = min(count + 1, len(memory))  # one more tells how far away the rest is
    rough, candidates = _propose(queries, memory, first, shift)
    distances, rows = _rank(queries, memory, candidates[:, :count])
    if count == len(memory):
        return distances, rows
    norms = (queries - shift).square().sum(dim=1)  # (Q,)
    share = rounding_share(queries.shape[1], queries.dtype)

    def unsure(last: Tensor, least: Tensor, norms: Tensor) -> Tensor:
        # What was not compared has a rough square of `least` or above. Were it nearer than our
        # last, its norm would be at most ||q|| + that distance, which bounds the error of its
        # square.
        error = share * (norms + (norms.sqrt() + last).square())
        return ((last.square() > least - error) & (last > 0)).nonzero()[:, 0]

    close = unsure(distances[:, -1], rough[:, -1], norms)
    if len(close):
        rough, candidates = _propose(queries[close], memory, proposed, shift)
        found = _rank(queries[close], memory, candidates)
        distances[close], rows[close] = (part[:, :count] for part in found)
        if proposed < len(memory):
            still = unsure(distances[close, -1], rough[:, -1], norms[close])
            hidden = close[still]
            if len(hidden):
                found = _search_directly(queries[hidden], memory, count)
                distances[hidden], rows[hidden] = found
    return distances, rows


def _propose(
    queries: Tensor, memory: Tensor, proposed: int, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return rough squared distances and rows, (Q, proposed) each, of the best by product."""
    # Distances do not see the shift; smaller norms mean smaller errors.
    queries = queries - shift
    norms = queries.square().sum(dim=1, keepdim=True)  # (Q, 1)
    doubled = -2 * queries
    best: tuple[Tensor, Tensor] | None = None
    for start, block in _blocks(memory, at_once(PRODUCT, memory.device) // len(queries)):
        block = block - shift
        squares = linear(doubled, block, block.square().sum(dim=1))  # (Q, R)
        best = _keep_best(best, squares, start, proposed)
    assert best is not None
    return best[0] + norms, best[1]


def _search_directly(queries: Tensor, memory: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what `_search` does, from distances that are all computed by subtraction."""
    best: tuple[Tensor, Tensor] | None = None
    for start, block in _blocks(memory, at_once(PRODUCT, memory.device) // len(queries)):
        best = _keep_best(best, direct_distances(queries, block), start, count)
    assert best is not None
    distances, order = best[0].sort(dim=1)
    return distances, best[1].gather(1, order)


def _blocks(memory: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    size = max(1, size)
    for start in range(0, len(memory), size):
        yield start, memory[start : start + size]


def _keep_best(
    best: tuple[Tensor, Tensor] | None, values: Tensor, start: int, count: int
) -> tuple[Tensor, Tensor]:
    """Merge the smallest of `values` (Q, R), whose rows begin at `start`, into the best so far."""
    found = values.topk(min(count, values.shape[1]), dim=1, largest=False)
    if best is None:
        return found.values, found.indices + start
    both = torch.cat([best[0], found.values], dim=1)
    rows = torch.cat([best[1], found.indices + start], dim=1)
    kept = both.topk(min(count, both.shape[1]), dim=1, largest=False)
    return kept.values, rows.gather(1, kept.indices)


def _rank(queries: Tensor, memory: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances by subtraction, ascending, and rows in that order; (Q, k) each."""
    gathered = memory[rows]  # (Q, k, C)
    distances = direct_distances(queries.unsqueeze(1), gathered).squeeze(1)  # (Q, k)
    distances, order = distances.sort(dim=1)
    return distances, rows.gather(1, order)


def _propose_by_faiss(queries: Tensor, memory: Tensor, count: int) -> Tensor:
    """Return the rows (P, count) that the flat index finds."""
    import faiss  # an option's package: imported when it is asked for

    index = faiss.IndexFlatL2(memory.shape[1])
    index.add(memory.float().cpu().numpy())
    _, rows = index.search(queries.float().cpu().numpy(), count)
    return torch.from_numpy(rows).to(queries.device)
