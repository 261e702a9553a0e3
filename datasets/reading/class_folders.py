"""Labelled images on disk: a folder per class, or CatsVsDogs with the class in the file's name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from datasets.reading.images import IMAGE_SUFFIXES, is_image_file
from datasets.reading.unused import is_hidden, unused_images
from datasets.samples import DataError
from datasets.tasks.labelled import LabelledSet, LabelledSplit

_SUFFIXES = " ".join(sorted(IMAGE_SUFFIXES))
_CATS_AND_DOGS = ("cat", "dog")
Split = Literal["train", "test"]
_SPLITS: tuple[Split, Split] = ("train", "test")


def read_class_folders(root: Path, *, name: str) -> LabelledSet:
    """Lists `train/<class>/` and `test/<class>/`; classes are sorted by name.

    Classes that only `test/` has come last: they have nothing to train on and can only be
    anomalies. Where root holds one sub-folder and the splits are in it (an unpacked archive), that
    sub-folder is read.

    Raises:
        DataError: Root or a split is missing, or a folder of `train/` holds no image.
    """
    root = _root_of_splits(root)
    train_names = _subfolders(root / "train")
    test_names = _subfolders(root / "test")
    for class_name in train_names:
        if not _images(root / "train" / class_name):
            raise DataError(
                f"{root / 'train' / class_name} holds no image ({_SUFFIXES}); "
                "remove the folder if its class shall only occur as an anomaly"
            )
    class_names = (*train_names, *(other for other in test_names if other not in train_names))
    train, test = (_list_split(root, split, class_names) for split in _SPLITS)
    return _labelled_set(root, name, class_names, train, test)


def read_cats_and_dogs(root: Path, *, name: str) -> LabelledSet:
    """Lists CatsVsDogs: each split as `{cat,dog}/` folders, or flat with `cat.*` and `dog.*` files.

    Raises:
        DataError: Root or a split is missing, a class is missing in a split, or a file of a flat
            split is neither a cat nor a dog by its name.
    """
    root = _root_of_splits(root)
    train, test = _cats_and_dogs_of(root, "train"), _cats_and_dogs_of(root, "test")
    return _labelled_set(root, name, _CATS_AND_DOGS, train, test)


def _labelled_set(
    root: Path, name: str, class_names: tuple[str, ...], train: LabelledSplit, test: LabelledSplit
) -> LabelledSet:
    unused = unused_images(root, [*(train.paths or ()), *(test.paths or ())])
    return LabelledSet(name, class_names, train, test, folder=root, unused=unused)


def _cats_and_dogs_of(root: Path, split: Split) -> LabelledSplit:
    folder = root / split
    if any(name in _CATS_AND_DOGS for name in _subfolders(folder)):
        found = _list_split(root, split, _CATS_AND_DOGS)
    else:
        found = _list_named_files(root, split)
    for number, name in enumerate(_CATS_AND_DOGS):
        if number not in found.labels:
            raise DataError(
                f"{folder} holds no {name}: expected images ({_SUFFIXES}) in {folder / name} "
                f"or files {folder / name}.*"
            )
    return found


def _root_of_splits(root: Path) -> Path:
    if not root.is_dir():
        raise DataError(f"the data folder {root} does not exist; name it with --data-root")
    candidates = [root]
    inner = _subfolders(root)
    if len(inner) == 1:
        candidates.append(root / inner[0])
    for candidate in candidates:
        if (candidate / "train").is_dir() and (candidate / "test").is_dir():
            return candidate
    raise DataError(
        f"{root} has no train/ and test/ folders side by side (it has: "
        f"{', '.join(inner) or 'no folders'}); name the folder that holds both with --data-root"
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)
    )


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_image_file(path))


def _list_split(root: Path, split: Split, class_names: Sequence[str]) -> LabelledSplit:
    folder = root / split
    paths: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(class_names):
        if (folder / name).is_dir():
            images = _images(folder / name)
            paths += images
            labels += [number] * len(images)
    if not paths:
        raise DataError(f"{folder} holds no folder of images: expected {folder}/<class>/<image>")
    return LabelledSplit(split, paths=tuple(paths), labels=np.array(labels, dtype=np.int64))


def _list_named_files(root: Path, split: Split) -> LabelledSplit:
    folder = root / split
    files: dict[str, list[Path]] = {name: [] for name in _CATS_AND_DOGS}
    for path in _images(folder):
        name = path.name.lower().split(".")[0]
        if name not in files:
            raise DataError(f"{path}: neither a cat nor a dog by its name (cat.* or dog.*)")
        files[name].append(path)
    counts = [len(files[name]) for name in _CATS_AND_DOGS]
    return LabelledSplit(
        split,
        paths=tuple(path for name in _CATS_AND_DOGS for path in files[name]),
        labels=np.repeat(np.arange(2), counts).astype(np.int64),
    )
