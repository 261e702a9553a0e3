"""Labelled image sets: the images of both splits, with the class of each."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.samples import ImageSet


@dataclass(frozen=True, eq=False)
class LabelledSplit(ImageSet):
    """The images of one split with their classes.

    Attributes:
        labels: (N,) int64, number of each image's class.

    Raises:
        ValueError: See `ImageSet`; or the number of labels is not that of the images.
    """

    labels: np.ndarray = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels.shape != (len(self),):
            raise ValueError(f"{len(self)} images, but labels of shape {self.labels.shape}")


@dataclass(frozen=True)
class LabelledSet:
    """A labelled data set; a label is a position in class_names.

    Attributes:
        folder: Where its images lie; None where they are no files.
        unused: What lies there, looks like an image, and is not used.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabelledSplit
    test: LabelledSplit
    folder: Path | None = None
    unused: tuple[Path, ...] = ()
