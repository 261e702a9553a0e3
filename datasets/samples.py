"""What a reader of a data set returns: the images of one category, and the error for bad data."""

from dataclasses import dataclass
from pathlib import Path


class DataError(Exception):
    """The user's data cannot be used; the message names the file or category and the way out."""


@dataclass(frozen=True)
class Sample:
    """One image on disk.

    Attributes:
        path: The image file.
        label: 0 for a normal image, 1 for an anomalous one.
        defect: Name of the kind of defect, "good" for a normal image.
        mask_path: The image of the defect's pixels, None where there is none.
    """

    path: Path
    label: int
    defect: str = "good"
    mask_path: Path | None = None


@dataclass(frozen=True)
class Category:
    """One one-class task: normal images to train on, images of both labels to test on.

    Attributes:
        name: The category as the data set calls it.
        train: Normal images only.
        test: Normal images first, then each kind of defect in alphabetical order.
        has_masks: Whether every anomalous test image has a mask; without masks pixel metrics
            are undefined.
    """

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    has_masks: bool
