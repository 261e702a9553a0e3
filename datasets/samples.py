"""The contracts: what a reader of a data set returns, what a task is made of, batches of images."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class DataError(Exception):
    """The user's data cannot be used; the message names the file or category and the way out."""


@dataclass(frozen=True)
class Sample:
    """One image on disk.

    Attributes:
        path: The image file.
        label: 0 for a normal image, 1 for an anomalous one.
        defect: Name of the kind of defect, "good" for a normal image.
        mask_path: The image of the defect's pixels, or a folder of several; None where there is
            none.
    """

    path: Path
    label: int
    defect: str = "good"
    mask_path: Path | None = None


@dataclass(frozen=True)
class Saturation:
    """How much of a defect has to be found for all of it to count as found.

    Attributes:
        area: Pixels of the file; where it is relative, the share of the defect's own area.
        is_relative: Which of the two.
    """

    area: float
    is_relative: bool


@dataclass(frozen=True)
class Region:
    """One defect of an image at the size of the maps.

    Attributes:
        image: Position of the image in the test set.
        pixels: (A,) int64, its pixels, as positions in the image's rows joined; at least one.
        saturation: How many of them have to be found for all to count, above 0, at most A.
    """

    image: int
    pixels: np.ndarray
    saturation: float


@dataclass(frozen=True)
class Category:
    """One category of a structured data set: normal images to train on, both labels to test on.

    Attributes:
        name: The category as the data set calls it.
        train: Normal images only.
        test: Normal images first, then each kind of defect in alphabetical order.
        has_masks: Whether anomalous test images have masks; without them pixel metrics are
            undefined, and of a single one that has none they leave the pixels out.
        validation: Normal images that the data set keeps for scales and thresholds.
        saturations: Grey value of a mask -> when its defect counts as found, of data sets whose
            masks are one file a defect; none of all others.
    """

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    has_masks: bool
    validation: tuple[Sample, ...] = ()
    saturations: Mapping[int, Saturation] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split, decoded or as files; one is equal to itself only.

    Attributes:
        split: Which one.
        images: (N, H, W) or (N, H, W, 3) uint8; None where paths are given.
        paths: The image files; None where images are given.

    Raises:
        ValueError: Not exactly one of images and paths is given.
    """

    split: Literal["train", "validation", "test"]
    images: np.ndarray | None = None
    paths: tuple[Path, ...] | None = None

    def __post_init__(self) -> None:
        if (self.images is None) == (self.paths is None):
            raise ValueError("a split has either images or paths")

    def __len__(self) -> int:
        if self.paths is not None:
            return len(self.paths)
        assert self.images is not None
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        """What to call each image in a file of scores: its path, or "test/123" in an array."""
        if self.paths is not None:
            return tuple(str(path) for path in self.paths)
        return tuple(f"{self.split}/{index}" for index in range(len(self)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """One one-class task: normal images to train on, images of both labels to test on.

    Attributes:
        category: The category or normal class it is named after.
        label: How a table prints that.
        train: Images among which its normal ones are.
        train_indices: (M,) int64, ascending: which of them.
        test: Images it is tested on.
        test_labels: (N,) int64, 1 = anomalous.
        kinds: (N,) kind of defect or class of each test image.
        masks: (N,) mask files, or folders of masks to join, None for a normal image or an anomalous
            one that has none; None where there are no masks.
        peers: `train_indices` of every task of the data set, asked for or not, where all share the
            two sets of images; empty where the images are this task's own.
        folder: Of the category; None where there is none.
        unused: Images in it that the task leaves aside.
        validation: Normal images that the data set keeps for scales and thresholds, or None.
        saturations: See `Category`.
        groups: Name of a group of anomalies, as "logical" -> its kinds, where the data set tells
            them apart.
    """

    category: str
    label: str
    train: ImageSet
    train_indices: np.ndarray
    test: ImageSet
    test_labels: np.ndarray
    kinds: tuple[str, ...]
    masks: tuple[Path | None, ...] | None = None
    peers: tuple[np.ndarray, ...] = ()
    folder: Path | None = None
    unused: tuple[Path, ...] = ()
    validation: ImageSet | None = None
    saturations: Mapping[int, Saturation] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Some images of a loader.

    Attributes:
        indices: Position of each image in the data set, in the order of reading.
        images: (B, 3, S, S) uint8, RGB; (B, 3, T * S, S) of images cut into T windows.
    """

    indices: list[int]
    images: "Tensor"


class ImageLoader(ABC):
    """Batches of images in a fixed order.

    Attributes:
        num_images: Number of images to read, unreadable ones included.
        batch_size: Images of a batch; the last may be smaller.
        at_once: Images, or windows of them where they are cut, that a network is to see at once.
        skipped: Image and error of each unreadable image the last iteration left out.
        skips_unreadable: Whether those are left out; else one ends the iteration with an error.
    """

    num_images: int
    batch_size: int
    at_once: int
    skipped: list[tuple[Path | int, str]]
    skips_unreadable: bool

    @property
    @abstractmethod
    def indices(self) -> list[int]:
        """Position in the data set of all images, unreadable ones too, in the order of reading."""

    @abstractmethod
    def at(self, rows: Sequence[int]) -> "ImageLoader":
        """A loader of the images at `rows` of this one's `indices`, in that order."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells these images from any others, as JSON values."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches."""
