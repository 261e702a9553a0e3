"""Near-duplicate images where none should be: between training, calibration and test."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from datasets.samples import ImageSet, Task
from utils.evaluation.twins import Twin, find_twins
from utils.features.features import Features, Rows


@dataclass(frozen=True)
class Side:
    """Some images of a task.

    Attributes:
        images: the set that they are of.
        features: theirs, with their places in the set and their thumbnails.
    """

    images: ImageSet
    features: Features

    def name(self, row: int) -> str:
        """Return what an image is called."""
        return self.images.names[self.features.indices[row]]


@dataclass(frozen=True)
class Leak:
    """Images that have a twin among others.

    Attributes:
        words: how many, of what, where: "12 of 193 test images have a twin in training".
        images: those that were looked at.
        among: those that were looked among.
        twins: what was found.
    """

    words: str
    images: Side
    among: Side
    twins: list[Twin]

    def pairs(self) -> list[list[Any]]:
        """Return the names of each pair and the correlation, as JSON values."""
        return [
            [self.images.name(t.place), self.among.name(t.other), round(t.correlation, 4)]
            for t in self.twins
        ]


class Leaks:
    """Looks for near-duplicates in the thumbnails of a task's features; no image is read again."""

    def __init__(self) -> None:
        self._shared: tuple[tuple[ImageSet, ImageSet], list[Twin]] | None = None

    def of(
        self,
        task: Task,
        train: Features,
        fitted: Features,
        calibration: Features | None,
        test: Features,
    ) -> list[Leak]:
        """Return what is found of a task; nothing where features keep no thumbnails.

        Args:
            task: whose features these are.
            train: of all images of its training set.
            fitted: of the normals that a head is fitted on.
            calibration: of the normals that set thresholds.
            test: of its test set.
        """
        if fitted.thumbnails is None or test.thumbnails is None or train.thumbnails is None:
            return []
        tested, known = Side(task.test, test), Side(task.train, fitted)
        found = [self._in_training(task, train, known, tested)]
        if calibration is not None:
            held = Side(task.train, calibration)
            twins = _twins(held, known)
            found.append(_leak(twins, "calibration images", "among those fitted on", held, known))
        if not task.peers:  # of a labelled set, all classes but one are defects
            labels = task.test_labels[test.indices]
            normal, anomalous = (_rows(tested, (labels == x).nonzero()[0]) for x in (0, 1))
            twins = _twins(normal, anomalous)
            found.append(_leak(twins, "normal test images", "among defects", normal, anomalous))
        return [leak for leak in found if leak.twins]

    def _in_training(self, task: Task, train: Features, known: Side, tested: Side) -> Leak:
        if not task.peers:
            twins = _twins(tested, known)
        else:  # once for all classes, then those whose twin is of this class
            sets = (task.train, task.test)
            if self._shared is None or self._shared[0] != sets:
                self._shared = sets, _twins(tested, Side(task.train, train))
            row_of = {index: row for row, index in enumerate(known.features.indices)}
            places = [(t, row_of.get(train.indices[t.other])) for t in self._shared[1]]
            twins = [Twin(t.place, row, t.correlation) for t, row in places if row is not None]
        return _leak(twins, "test images", "in training", tested, known)


def in_words(leaks: Sequence[Leak]) -> str:
    """Say what was found; nothing where nothing was."""
    return ", ".join(leak.words for leak in leaks)


def pairs_to_show(leaks: Sequence[Leak], count: int) -> Iterator[tuple[Leak, Twin]]:
    """Yield up to `count` pairs of each leak, evenly from the surest to the least sure."""
    for leak in leaks:
        ordered = sorted(leak.twins, key=lambda twin: -twin.correlation)
        places = torch.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().long()
        for place in places.unique().tolist():
            yield leak, ordered[place]


def _leak(twins: list[Twin], what: str, where: str, images: Side, among: Side) -> Leak:
    has = "has" if len(twins) == 1 else "have"
    words = f"{len(twins)} of {len(images.features)} {what} {has} a twin {where}"
    return Leak(words, images, among, twins)


def _twins(images: Side, among: Side) -> list[Twin]:
    return find_twins(images.features, among.features)


def _rows(side: Side, rows: Rows) -> Side:
    return Side(side.images, side.features.subset(rows))
