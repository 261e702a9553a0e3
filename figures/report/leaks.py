"""Near-duplicate images that a run logged: between training, calibration and test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from figures.report.pictures import TWINS, Budget, Shown, drawing
from figures.shared.run_log import LoggedRun
from utils.runs.files import corrupt

MAX_PAIRS = 10
"""Pairs of each leak that are listed, the surest first."""
DRAWING_WIDTH = 760
_NOT_LOOKED = "Leaks were not looked for"
"""Begins the remark of a run that kept no thumbnails (--cache none)."""


@dataclass(frozen=True)
class Leak:
    """Images that have a twin among others.

    Attributes:
        category: whose images they are.
        words: how many, of what, where.
        num_pairs: in all.
        pairs: the surest of them: image, its twin, and their correlation.
    """

    category: str
    words: str
    num_pairs: int
    pairs: list[tuple[str, str, float]]


@dataclass(frozen=True)
class LeakReport:
    """What the page says of near-duplicates.

    Attributes:
        leaks: those found.
        pictures: of each category with a leak, or why there is none.
        none_found: categories in which none were found.
        not_looked: those in which nobody looked, and why.
        unfinished: those without a result, where nothing was found so far.
    """

    leaks: list[Leak]
    pictures: list[tuple[str, Shown]]
    none_found: list[str]
    not_looked: list[tuple[str, str]]
    unfinished: list[str]


def leak_report(
    run: LoggedRun, categories: Sequence[str], budgets: Mapping[str, Budget]
) -> LeakReport:
    """Gather the near-duplicates of a run.

    Args:
        run: with its log.
        categories: that the page is about.
        budgets: of the pictures of each of them.

    Raises:
        RunError: a record of the log names no pairs, or a picture cannot be read.
    """
    leaks = _logged(run)
    rows = {row["category"]: row for row in run.run.rows()}
    seeds = dict(reversed(list(run.of_event("twins"))))  # of several, the first
    pictures, none_found, not_looked, unfinished = [], [], [], []
    for name in categories:
        if name in seeds:
            path = run.run.overlays_folder(name, seeds[name]) / TWINS
            pictures.append((name, drawing(path, DRAWING_WIDTH, budgets[name])))
        elif name not in rows:
            unfinished.append(name)
        elif "twins" not in rows[name]:
            not_looked.append((name, "an earlier version made this run"))
        elif _NOT_LOOKED in str(rows[name].get("remarks", "")):
            not_looked.append((name, "--cache none keeps nothing to compare"))
        else:
            none_found.append(name)
    return LeakReport(leaks, pictures, none_found, not_looked, unfinished)


def _logged(run: LoggedRun) -> list[Leak]:
    """Return each leak once: every seed of a category logs the same images."""
    leaks: dict[tuple[str, str], Leak] = {}
    for (category, _), records in run.of_event("twins").items():
        for record in records:
            words = record.get("what")
            pairs: Any = record.get("pairs")
            if not isinstance(words, str) or not _are_pairs(pairs):
                path = run.run.folder / "metrics.jsonl"
                raise corrupt(path, f"the near-duplicates of {category} are no pairs")
            surest = sorted(pairs, key=lambda pair: -pair[2])[:MAX_PAIRS]
            shown = [(one, other, float(value)) for one, other, value in surest]
            leaks.setdefault((category, words), Leak(category, words, len(pairs), shown))
    return list(leaks.values())


def _are_pairs(pairs: Any) -> bool:
    return isinstance(pairs, list) and all(
        isinstance(pair, list)
        and len(pair) == 3
        and isinstance(pair[0], str)
        and isinstance(pair[1], str)
        and isinstance(pair[2], (int, float))
        for pair in pairs
    )
