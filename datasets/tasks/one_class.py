"""The normal-versus-rest view of a labelled set: which classes are normal, which anomalous."""

import difflib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from datasets.samples import DataError, Task
from datasets.tasks.labelled import LabelledSet

OneClassProtocol = Literal["one-vs-rest", "leave-one-out"]
_FEWEST_TRAINING_IMAGES = 2


def one_class_tasks(
    labelled: LabelledSet, protocol: OneClassProtocol, wanted: Sequence[str] = ()
) -> list[Task]:
    """The one-class tasks of a labelled set.

    A class without training images is an anomaly in every task, and has no task of its own under
    "one-vs-rest".

    Args:
        labelled: The set.
        protocol: "one-vs-rest": the task's class is normal, all others are anomalies.
            "leave-one-out": the task's class is the anomaly, all others are normal.
        wanted: Names or numbers of the tasks' classes, in the order to return them. Where a class
            is named by a number, only names count. Empty: every class the protocol allows.

    Raises:
        DataError: A wanted class is unknown, or its task has fewer than two normal training images.
    """
    counts = np.bincount(labelled.train.labels, minlength=len(labelled.class_names))
    every = [n for n, count in enumerate(counts) if count or protocol == "leave-one-out"]
    numbers = list(dict.fromkeys(_class_number(labelled, name) for name in wanted)) or every
    indices = {n: _train_indices(labelled, protocol, n) for n in {*every, *numbers}}
    peers = tuple(i for _, i in sorted(indices.items()) if len(i) >= _FEWEST_TRAINING_IMAGES)
    return [_task(labelled, protocol, n, indices[n], peers) for n in numbers]


def _task(
    labelled: LabelledSet,
    protocol: OneClassProtocol,
    number: int,
    train_indices: np.ndarray,
    peers: tuple[np.ndarray, ...],
) -> Task:
    name = labelled.class_names[number]
    if len(train_indices) < _FEWEST_TRAINING_IMAGES:
        normals = f"class {name!r}"
        normals = f"all classes but {name!r}" if protocol == "leave-one-out" else normals
        raise DataError(
            f"{labelled.name}: {normals} has {len(train_indices)} training image(s), one-class "
            f"training needs {_FEWEST_TRAINING_IMAGES} or more; add images or leave it out of "
            "--categories"
        )
    is_normal = _is_normal(labelled, protocol, number)
    return Task(
        category=name,
        label=name if name.isdigit() else f"{number} {name}",
        train=labelled.train,
        train_indices=train_indices,
        test=labelled.test,
        test_labels=1 - is_normal[labelled.test.labels].astype(np.int64),  # (N,)
        kinds=tuple(labelled.class_names[label] for label in labelled.test.labels),
        peers=peers,
        folder=labelled.folder,
        unused=labelled.unused,
    )


def _train_indices(labelled: LabelledSet, protocol: OneClassProtocol, number: int) -> np.ndarray:
    return np.flatnonzero(_is_normal(labelled, protocol, number)[labelled.train.labels])


def _is_normal(labelled: LabelledSet, protocol: OneClassProtocol, number: int) -> np.ndarray:
    """Tells which classes are normal in the task named after a class, (classes,) bool."""
    counts = np.bincount(labelled.train.labels, minlength=len(labelled.class_names))
    is_named = np.arange(len(counts)) == number
    return is_named if protocol == "one-vs-rest" else ~is_named & (counts > 0)


def _class_number(labelled: LabelledSet, name: str) -> int:
    names = labelled.class_names
    if name in names:
        return names.index(name)
    named_by_numbers = any(known.isdecimal() for known in names)
    if name.isdecimal() and int(name) < len(names) and not named_by_numbers:
        return int(name)
    nearest = difflib.get_close_matches(name.lower(), names, n=3)
    by_number = "" if named_by_numbers else f", or by number 0 to {len(names) - 1}"
    raise DataError(
        f"{labelled.name} has no class {name!r}; "
        + (f"nearest: {', '.join(nearest)}; " if nearest else "")
        + f"its classes: {', '.join(names)}{by_number}"
    )
