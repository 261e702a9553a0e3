"""How well kinds that were found agree with names that are known: NMI, ARI, F1 after matching."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score


@dataclass(frozen=True)
class Agreement:
    """Of found kinds and known names.

    Attributes:
        nmi: normalised mutual information, over the arithmetic mean of both entropies.
        ari: adjusted Rand index.
        f1: micro-F1 after the best matching, which is the share of matches.
        name_of: the name that each kind is matched with; kinds beyond the names have none.
    """

    nmi: float
    ari: float
    f1: float
    name_of: dict[int, str]


def agreement(kinds: Sequence[int], names: Sequence[str]) -> Agreement:
    """Compare kinds with names, of N images or regions, at least one.

    The first two do not depend on the matching, which is Hungarian: as many as can be agree.
    """
    found = sorted(set(kinds))
    known = sorted(set(names))
    table = np.zeros((len(found), len(known)), dtype=np.int64)
    for kind, name in zip(kinds, names, strict=True):
        table[found.index(kind), known.index(name)] += 1
    rows, columns = linear_sum_assignment(table, maximize=True)
    return Agreement(
        nmi=float(normalized_mutual_info_score(names, kinds)),
        ari=float(adjusted_rand_score(names, kinds)),
        f1=float(table[rows, columns].sum() / len(names)),
        name_of={found[r]: known[c] for r, c in zip(rows, columns, strict=True)},
    )
