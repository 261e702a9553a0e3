"""What the scores of a run say: exact ROC curves, and which images are how wrong."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.errors import RunError
from utils.metrics.counting import curve_of
from utils.metrics.metrics import auroc
from utils.runs.run import Run

LAST = "-last"
"""Suffix of the last state's scores, where the reported ones are of another state."""


@dataclass(frozen=True)
class Scored:
    """The scores of one category and seed.

    Attributes:
        category: category or normal class.
        seed: of the fit.
        paths: (N,) test images.
        labels: (N,), 1 = anomalous.
        scores: (N,) finite, higher = more anomalous.
        kinds: (N,) kinds of defect, or classes.
    """

    category: str
    seed: int
    paths: list[str]
    labels: np.ndarray
    scores: np.ndarray
    kinds: list[str]

    @property
    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the normals, highest score first, and of the anomalies, lowest first.

        Ties keep the order in which `utils.pictures.overlays` draws them.
        """
        descending = np.argsort(-self.scores, kind="stable")
        ascending = descending[::-1]
        return descending[self.labels[descending] == 0], ascending[self.labels[ascending] == 1]


@dataclass(frozen=True)
class Ranked:
    """A test image and how wrong it is.

    Attributes:
        category: category or normal class of the task.
        seed: of the fit.
        path: as in the scores file.
        kind: of defect, or class.
        anomalous: its label.
        score: higher = more anomalous.
        wrong: share of the other class it is on the wrong side of, ties half: for an anomaly the
            normals that score higher, for a normal the anomalies that score lower. The mean over
            either class is 1 - AUROC. nan where the other class has no image.
        rank: place in its own class, 1 = most wrong.
        of: images of its class.
        seeds: (wrong) for every seed, in their order.
    """

    category: str
    seed: int
    path: str
    kind: str
    anomalous: bool
    score: float
    wrong: float
    rank: int
    of: int
    seeds: tuple[float, ...]

    @property
    def urgency(self) -> tuple[float, int]:
        """Sort key: most wrong first, then by the place in the own class."""
        return (0.0 if math.isnan(self.wrong) else -self.wrong, self.rank)


def read_scores(run: Run, category: str, seed: int, suffix: str = "") -> Scored | None:
    """Return the scores of a pair; None where the run has not written any.

    Raises:
        RunError: the file is corrupt or holds other things than scores.
    """
    path = run.scores_path(category, seed, suffix)
    if not path.is_file():
        return None
    arrays = run.load_scores(category, seed, suffix)
    if missing := {"path", "label", "score", "defect"} - set(arrays):
        raise RunError(f"{path}: no {', '.join(sorted(missing))} in it; run the pair again")
    labels, scores = arrays["label"], arrays["score"]
    shapes = {arrays[name].shape for name in ("path", "label", "score", "defect")}
    if len(shapes) != 1 or labels.ndim != 1 or not len(labels):
        raise RunError(f"{path}: its arrays have shapes {sorted(shapes)}; run the pair again")
    if labels.dtype.kind not in "iu" or not np.isin(labels, (0, 1)).all():
        raise RunError(f"{path}: a label is neither 0 nor 1; run the pair again")
    if scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise RunError(f"{path}: a score is not a finite number; run the pair again")
    return Scored(
        category,
        seed,
        [str(name) for name in arrays["path"]],
        labels.astype(np.int64),
        scores.astype(np.float64),
        [str(kind) for kind in arrays["defect"]],
    )


def roc(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return false- and true-positive counts at each corner of the exact ROC curve.

    Equal scores are one threshold, so a tie between the classes is a slope. Points on a straight
    line between two others are left out.

    Args:
        labels: (N,), 1 = anomalous.
        scores: (N,)

    Returns:
        (K,) counts from 0 to all normals, and (K,) from 0 to all anomalies.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.append(0, np.cumsum(labels[order])[last_of_ties])
    false = np.append(0, last_of_ties + 1) - true
    rises, runs = np.diff(true), np.diff(false)
    is_corner = rises[:-1] * runs[1:] != rises[1:] * runs[:-1]
    keep = np.concatenate([[True], is_corner, [True]])
    return false[keep], true[keep]


def image_auroc(scored: Scored) -> float:
    """Return the AUROC of the images, in [0, 1]; nan where a class is missing."""
    anomalous = scored.labels == 1
    if anomalous.all() or not anomalous.any():
        return math.nan
    return auroc(curve_of(scored.scores, anomalous))


def wrongness(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return for each image the share of the other class it is on the wrong side of.

    Args:
        labels: (N,), 1 = anomalous.
        scores: (N,)

    Returns:
        (N,) in [0, 1], ties counting half; nan where the other class has no image.
    """
    result = np.full(len(scores), np.nan)
    for label, sign in ((0, -1.0), (1, 1.0)):
        others = np.sort(sign * scores[labels != label])
        if len(others):
            own = sign * scores[labels == label]
            above = len(others) - np.searchsorted(others, own, "right")
            level = len(others) - np.searchsorted(others, own, "left") - above
            result[labels == label] = (above + level / 2) / len(others)
    return result


def ranked(seeds: Sequence[Scored]) -> list[Ranked]:
    """Return the images of a category, the most wrong under the first seed first.

    Args:
        seeds: the scores of each seed, at least one.
    """
    first = seeds[0]
    by_seed = [
        dict(zip(one.paths, wrongness(one.labels, one.scores).tolist(), strict=True))
        for one in seeds
    ]
    images = [
        Ranked(
            category=first.category,
            seed=first.seed,
            path=first.paths[place],
            kind=first.kinds[place],
            anomalous=bool(first.labels[place]),
            score=float(first.scores[place]),
            wrong=by_seed[0][first.paths[place]],
            rank=rank,
            of=len(places),
            seeds=tuple(wrong.get(first.paths[place], math.nan) for wrong in by_seed),
        )
        for places in first.order
        for rank, place in enumerate(places.tolist(), start=1)
    ]
    return sorted(images, key=lambda image: image.urgency)
