"""Your own images: categories with defects in MVTec AD's layout, or a folder for each class."""

from dataclasses import dataclass
from pathlib import Path

from configs.options import DataOptions
from datasets.data_set import (
    RESNET152_CROP_224,
    WHOLE_224,
    WIDE_RESNET50,
    SemanticSet,
    StructuredSet,
)
from datasets.reading import mvtec_layout
from datasets.reading.class_folders import read_class_folders
from datasets.samples import Category
from datasets.tasks.labelled import LabelledSet


@dataclass(frozen=True, kw_only=True)
class FolderOptions(DataOptions):
    """How own images are read."""

    partial_masks: bool = False
    """Some anomalous images may lack a mask: their pixels are left out of the pixel metrics."""


def read_category(root: Path, name: str, options: FolderOptions) -> Category:
    """Reads a category in MVTec AD's layout; see `datasets.reading.mvtec_layout`."""
    partial = options.partial_masks
    return mvtec_layout.read_category(root, name, options, partial_masks=partial)


def read_classes(root: Path) -> LabelledSet:
    """Reads `train/<class>/` and `test/<class>/`; see `read_class_folders`."""
    return read_class_folders(root, name="folder")


DATA_SET = (
    StructuredSet(
        read=read_category,
        options=FolderOptions(),
        experiment={"data_root": Path("data/folder"), **WIDE_RESNET50, **WHOLE_224},
    ),
    SemanticSet(
        read=read_classes, experiment={"data_root": Path("data/folder"), **RESNET152_CROP_224}
    ),
)
