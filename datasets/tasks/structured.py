"""Categories of the structured data sets: which there are, and the images of each."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from configs.options import DataOptions
from datasets.data_set import StructuredSet
from datasets.reading.mvtec_layout import NORMAL, composed, mask_files, subfolders
from datasets.reading.unused import unused_images
from datasets.samples import Category, DataError, ImageSet, Task

LOGICAL_OR_STRUCTURAL: dict[str, tuple[str, ...]] = {
    "logical": ("logical_anomalies",),
    "structural": ("structural_anomalies",),
}
"""Groups of anomalies -> their kinds, in the folders of MVTec LOCO."""


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
    read = (read_category(data_set, root, name, options) for name in categories)
    return [task_of(category, root / category.name) for category in read]


def task_of(category: Category, folder: Path | None = None) -> Task:
    """Returns the task of a category; what lies in its folder and is not used is looked for."""
    used = [sample.path for sample in (*category.train, *category.validation, *category.test)]
    masks = [sample.mask_path for sample in category.test if sample.mask_path is not None]
    used += [file for mask in masks for file in mask_files(mask)]
    train = tuple(sample.path for sample in category.train)
    test = tuple(sample.path for sample in category.test)
    validation = tuple(sample.path for sample in category.validation)
    return Task(
        category=category.name,
        label=category.name,
        train=ImageSet("train", paths=train),
        train_indices=np.arange(len(train)),
        test=ImageSet("test", paths=test),
        test_labels=np.array([sample.label for sample in category.test], dtype=np.int64),
        kinds=tuple(sample.defect for sample in category.test),
        masks=tuple(s.mask_path for s in category.test) if category.has_masks else None,
        folder=folder,
        unused=() if folder is None else unused_images(folder, used),
        validation=ImageSet("validation", paths=validation) if validation else None,
        saturations=category.saturations,
        groups=groups_of({sample.defect for sample in category.test if sample.label}),
    )


def in_whole_batches(task: Task, size: int) -> Task:
    """Returns a task without the last of its test images by path that fill no batch.

    Raises:
        DataError: It has fewer test images than a batch.
    """
    paths = task.test.paths
    assert paths is not None
    num_kept = len(paths) // size * size
    if not num_kept:
        raise DataError(
            f"category {task.category!r} has {len(paths)} test images, which fill no batch of "
            f"{size}: lower --test-batches, or leave it out"
        )
    by_path = sorted(range(len(paths)), key=lambda i: paths[i].as_posix())
    kept = sorted(by_path[:num_kept])
    masks = None if task.masks is None else tuple(task.masks[i] for i in kept)
    return replace(
        task,
        test=ImageSet("test", paths=tuple(paths[i] for i in kept)),
        test_labels=task.test_labels[kept],
        kinds=tuple(task.kinds[i] for i in kept),
        masks=masks,
    )


def groups_of(kinds: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Returns the groups of anomalies that kinds are told apart by, as MVTec LOCO names them."""
    told = any(kind in kinds for group in LOGICAL_OR_STRUCTURAL.values() for kind in group)
    return LOGICAL_OR_STRUCTURAL if told else {}


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
    known = data_set.categories or _find_categories(root, is_asked_for_all=not wanted)
    written = {composed(name): name for name in known}
    chosen = tuple(dict.fromkeys(written.get(composed(name), name) for name in wanted)) or known
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


def _find_categories(root: Path, *, is_asked_for_all: bool) -> tuple[str, ...]:
    if (root / "train" / NORMAL).is_dir():
        raise DataError(
            f"data root {root} is itself a category (it holds train/{NORMAL}): pass the folder "
            f"above, --data-root {root.resolve().parent}, and --categories {root.resolve().name} "
            "if it holds others"
        )
    folders = subfolders(root)
    found = tuple(folder.name for folder in folders if (folder / "train" / NORMAL).is_dir())
    for folder in folders if is_asked_for_all else ():
        if folder.name not in found and (folder / "train").is_dir():
            inside = ", ".join(path.name for path in subfolders(folder / "train")) or "no folder"
            others = f", or pass --categories {' '.join(found)}" if found else ""
            raise DataError(
                f"{folder} has train/ but no train/{NORMAL} (train/ has: {inside}): rename the "
                f"folder of normal images to {NORMAL}{others}"
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
