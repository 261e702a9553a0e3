"""Your own images: categories with defects in MVTec AD's layout, or a folder for each class."""

from pathlib import Path

from datasets.data_set import (
    RESNET152_CROP_224,
    WHOLE_224,
    WIDE_RESNET50,
    SemanticSet,
    StructuredSet,
)
from datasets.reading import mvtec_layout
from datasets.reading.class_folders import read_class_folders
from datasets.tasks.labelled import LabelledSet


def read_classes(root: Path) -> LabelledSet:
    """Reads `train/<class>/` and `test/<class>/`; see `read_class_folders`."""
    return read_class_folders(root, name="folder")


DATA_SET = (
    StructuredSet(
        read=mvtec_layout.read_category,
        experiment={"data_root": Path("data/folder"), **WIDE_RESNET50, **WHOLE_224},
    ),
    SemanticSet(
        read=read_classes, experiment={"data_root": Path("data/folder"), **RESNET152_CROP_224}
    ),
)
