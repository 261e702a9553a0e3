"""The normal-versus-rest view of a labelled set: which classes are normal, which anomalous."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from datasets.tasks.labelled import LabelledSet
from datasets.samples import DataError

OneClassProtocol = Literal["one-vs-rest", "leave-one-out"]
_FEWEST_TRAINING_IMAGES = 2


@dataclass(frozen=True)
class OneClassTask:
    """One task of a labelled set, as indices into its splits: tasks share the images.

    Attributes:
        category: The class the task is named after.
        number: That class's number in the labelled set.
        train_indices: Ascending int64 indices of the training split's normal images.
        test_labels: (N,) int64 for all N images of the test split, 1 = anomalous.
    """

    category: str
    number: int
    train_indices: np.ndarray
    test_labels: np.ndarray


def one_class_tasks(
    labelled: LabelledSet, protocol: OneClassProtocol, wanted: Sequence[str] | None
) -> tuple[OneClassTask, ...]:
    """The one-class tasks of a labelled set.

    A class without training images is an anomaly in every task, and has no task of its own under
    "one-vs-rest".

    Args:
        labelled: The set.
        protocol: "one-vs-rest": the task's class is normal, all others are anomalies.
            "leave-one-out": the task's class is the anomaly, all others are normal.
        wanted: Names or numbers of the tasks' classes, in the order to return them. Where a class
            is named by a number, only names count. None or empty: every class the protocol allows.

    Raises:
        DataError: A wanted class is unknown, or its task has fewer than two normal training images.
        ValueError: The protocol is unknown.
    """
    if protocol not in get_args(OneClassProtocol):
        raise ValueError(
            f"protocol {protocol!r} is none of {', '.join(get_args(OneClassProtocol))}"
        )
    counts = np.bincount(labelled.train.labels, minlength=len(labelled.class_names))
    if not wanted:
        numbers = [
            number for number, count in enumerate(counts) if count or protocol == "leave-one-out"
        ]
    else:
        numbers = list(dict.fromkeys(_class_number(labelled, name) for name in wanted))
    return tuple(_task(labelled, protocol, number, counts) for number in numbers)


def _task(
    labelled: LabelledSet, protocol: OneClassProtocol, number: int, counts: np.ndarray
) -> OneClassTask:
    is_named = np.arange(len(counts)) == number
    if protocol == "one-vs-rest":
        is_normal = is_named
        normals = f"class {labelled.class_names[number]!r}"
    else:
        is_normal = ~is_named & (counts > 0)
        normals = f"all classes but {labelled.class_names[number]!r}"
    num_train = int(counts[is_normal].sum())
    if num_train < _FEWEST_TRAINING_IMAGES:
        raise DataError(
            f"{labelled.name}: {normals} has {num_train} training image(s), one-class training "
            f"needs {_FEWEST_TRAINING_IMAGES} or more; add images or leave it out of --categories"
        )
    return OneClassTask(
        category=labelled.class_names[number],
        number=number,
        train_indices=np.flatnonzero(is_normal[labelled.train.labels]),
        test_labels=1 - is_normal[labelled.test.labels].astype(np.int64),  # (N,)
    )


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
