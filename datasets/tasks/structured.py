"""Categories of the structured data sets: which there are, and the images of each."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.options import DataOptions
from datasets.data_set import StructuredSet
from datasets.reading.mvtec_layout import NORMAL, subfolders
from datasets.samples import Category, DataError, ImageSet, Task


def structured_tasks(
    data_set: StructuredSet, root: Path, wanted: Sequence[str], options: DataOptions
) -> list[Task]:
    """Reads the categories of a data set, each a task with images of its own.

    Args:
        data_set: The data set.
        root: The folder above the category folders, or where the data set is built.
        wanted: Some of its categories, in the order to run them; all where there are none.
        options: Of the data set.

    Raises:
        DataError: The root, a category's folder or its images are missing or inconsistent, or a
            wanted category is unknown.
    """
    root = data_set.prepare(root)
    categories = list_categories(data_set, root, wanted)
    return [task_of(read_category(data_set, root, name, options)) for name in categories]


def task_of(category: Category) -> Task:
    """Returns the task of a category."""
    train = tuple(sample.path for sample in category.train)
    test = tuple(sample.path for sample in category.test)
    return Task(
        category=category.name,
        label=category.name,
        train=ImageSet("train", paths=train),
        train_indices=np.arange(len(train)),
        test=ImageSet("test", paths=test),
        test_labels=np.array([sample.label for sample in category.test], dtype=np.int64),
        kinds=tuple(sample.defect for sample in category.test),
        masks=tuple(s.mask_path for s in category.test) if category.has_masks else None,
    )


def list_categories(
    data_set: StructuredSet, root: Path, wanted: Sequence[str] = ()
) -> tuple[str, ...]:
    """Lists the categories to run, after checking that each has its folder.

    Args:
        data_set: One with an official list, or one whose categories are the sub-folders that hold
            train/good, sorted.
        root: The folder above the category folders.
        wanted: Some of these categories, in the order to run them; all where there are none.

    Raises:
        DataError: The root or a category's folder is missing, or a wanted category is unknown.
    """
    _check_root(data_set, root)
    known = data_set.categories or _find_categories(root)
    chosen = tuple(dict.fromkeys(wanted)) or known
    for category in chosen:
        if category not in known:
            raise DataError(_unknown_category(category, known, data_set))
    missing = [category for category in chosen if not (root / category).is_dir()]
    if missing:
        raise DataError(_missing_categories(data_set, root, missing, known))
    return chosen


def read_category(
    data_set: StructuredSet, root: Path, category: str, options: DataOptions
) -> Category:
    """Reads the images of one category.

    Args:
        data_set: The data set.
        root: The folder above the category folders.
        category: One of `list_categories`.
        options: Of the data set.

    Raises:
        DataError: The root, the category's folder or its images are missing or inconsistent.
    """
    _check_root(data_set, root)
    if not (root / category).is_dir():
        known = data_set.categories or (category,)
        raise DataError(_missing_categories(data_set, root, [category], known))
    return data_set.read(root, category, options)


def _check_root(data_set: StructuredSet, root: Path) -> None:
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data root {root} {problem}: {_way_out(data_set)}")


def _find_categories(root: Path) -> tuple[str, ...]:
    if (root / "train" / NORMAL).is_dir():
        raise DataError(
            f"data root {root} is itself a category (it holds train/{NORMAL}): pass the folder "
            f"above, --data-root {root.resolve().parent}, and --categories {root.resolve().name} "
            "if it holds others"
        )
    found = tuple(
        folder.name for folder in subfolders(root) if (folder / "train" / NORMAL).is_dir()
    )
    if not found:
        raise DataError(
            f"data root {root} has no categories: each is a sub-folder that holds train/{NORMAL} "
            "with normal images and test/<defect>"
        )
    return found


def _unknown_category(category: str, known: Sequence[str], data_set: StructuredSet) -> str:
    by_lower_case = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(category.lower(), by_lower_case, n=3, cutoff=0.5)
    hint = "."
    if nearest:
        hint = f"; did you mean {' or '.join(by_lower_case[name] for name in nearest)}?"
    return (
        f"unknown category {category!r}{hint} The data set {data_set.name} has: {', '.join(known)}"
    )


def _missing_categories(
    data_set: StructuredSet, root: Path, missing: Sequence[str], known: Sequence[str]
) -> str:
    present = [name for name in known if (root / name).is_dir()]
    if present:
        way_out = f"pass --categories {' '.join(present)} to run those that are there"
    else:
        way_out = _way_out(data_set)
    return f"data root {root} has no folder {', '.join(missing)}: {way_out}"


def _way_out(data_set: StructuredSet) -> str:
    where = f" ({data_set.page})" if data_set.page else ""
    return f"pass --data-root, the folder that holds the category folders{where}"
