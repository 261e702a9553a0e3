"""Labelled image sets: CIFAR, MNIST, CatsVsDogs, a user's class folders, scikit-learn's digits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from datasets.sets.cifar100_coarse import FINE_OF_COARSE, coarse_numbers
from datasets.reading.class_folders import LabelledFiles, read_cats_and_dogs, read_class_folders
from datasets.reading.loading import ArrayDataset, ImageDataset, Transform
from datasets.samples import DataError, Sample
from datasets.reading.torchvision_files import read_torchvision_set

LABELLED_SETS = (
    *("cifar10", "cifar100", "cifar100_coarse", "mnist", "fashion_mnist"),
    *("cats_vs_dogs", "folder", "digits"),
)
_DIGITS_TEST_SHARE = 0.4
_DIGITS_MAXIMUM = 16


@dataclass(frozen=True)
class LabelledSplit:
    """The images of one split, decoded or as files, with the class of each.

    Attributes:
        split: Which one.
        labels: (N,) int64, number of each image's class.
        images: (N, H, W) or (N, H, W, 3) uint8; None where paths are given.
        paths: The image files; None where images are given.

    Raises:
        ValueError: Not exactly one of images and paths is given, or its length is not that of
            labels.
    """

    split: Literal["train", "test"]
    labels: np.ndarray
    images: np.ndarray | None = None
    paths: tuple[Path, ...] | None = None

    def __post_init__(self) -> None:
        given = [images for images in (self.images, self.paths) if images is not None]
        if len(given) != 1:
            raise ValueError("a split has either images or paths")
        if self.labels.shape != (len(given[0]),):
            raise ValueError(f"{len(given[0])} images, but labels of shape {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """What to call each image in a file of scores: its path, or "test/123" in an array."""
        if self.paths is not None:
            return tuple(str(path) for path in self.paths)
        return tuple(f"{self.split}/{index}" for index in range(len(self)))

    def dataset(self, transform: Transform) -> ArrayDataset | ImageDataset:
        """The transformed images, in the order of labels."""
        if self.images is not None:
            return ArrayDataset(self.images, transform)
        assert self.paths is not None
        # Which class is normal differs from task to task, so no sample is anomalous here.
        return ImageDataset([Sample(path, label=0) for path in self.paths], transform)


@dataclass(frozen=True)
class LabelledSet:
    """A labelled data set; a label is a position in class_names."""

    name: str
    class_names: tuple[str, ...]
    train: LabelledSplit
    test: LabelledSplit


def read_labelled_set(dataset: str, root: Path | None) -> LabelledSet:
    """Reads one of `LABELLED_SETS`.

    "cifar100" has the 100 fine classes, "cifar100_coarse" the 20 superclasses. "digits" is
    scikit-learn's embedded set: root is not looked at. CIFAR and MNIST are downloaded into root
    where they are absent.

    Raises:
        DataError: The data set is unknown, absent (and cannot be downloaded), incomplete or
            damaged, or root is None where it is needed.
    """
    if dataset not in LABELLED_SETS:
        raise DataError(f"unknown data set {dataset!r}; known are {', '.join(LABELLED_SETS)}")
    if dataset == "digits":
        return _read_digits()
    if root is None:
        raise DataError(f"{dataset} needs the folder of its images: --data-root FOLDER")
    if dataset in {"cats_vs_dogs", "folder"}:
        return _read_files(dataset, root)
    return _read_torchvision(dataset, root)


def _read_digits() -> LabelledSet:
    """The 1,797 digits of 8 x 8 pixels, split 60 to 40 with each class's share kept."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / _DIGITS_MAXIMUM)).astype(np.uint8)  # (N, 8, 8)
    labels = digits.target.astype(np.int64)  # (N,)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_DIGITS_TEST_SHARE, random_state=0, stratify=labels
    )
    return LabelledSet(
        name="digits",
        class_names=tuple(str(name) for name in digits.target_names),
        train=LabelledSplit("train", labels[train], images=images[train]),
        test=LabelledSplit("test", labels[test], images=images[test]),
    )


def _read_files(dataset: str, root: Path) -> LabelledSet:
    read = read_cats_and_dogs if dataset == "cats_vs_dogs" else read_class_folders
    folders = read(root)

    def split(name: Literal["train", "test"], files: LabelledFiles) -> LabelledSplit:
        return LabelledSplit(name, files.labels, paths=files.paths)

    return LabelledSet(
        name=dataset,
        class_names=folders.class_names,
        train=split("train", folders.train),
        test=split("test", folders.test),
    )


def _read_torchvision(dataset: str, root: Path) -> LabelledSet:
    coarse = dataset == "cifar100_coarse"
    decoded = read_torchvision_set("cifar100" if coarse else dataset, root)
    class_names = decoded.class_names
    train_labels, test_labels = decoded.train_labels, decoded.test_labels
    if coarse:
        numbers = np.array(coarse_numbers(class_names), dtype=np.int64)  # (100,)
        train_labels, test_labels = numbers[train_labels], numbers[test_labels]  # (N,)
        class_names = tuple(FINE_OF_COARSE)
    return LabelledSet(
        name=dataset,
        class_names=class_names,
        train=LabelledSplit("train", train_labels, images=decoded.train_images),
        test=LabelledSplit("test", test_labels, images=decoded.test_images),
    )
