"""CatsVsDogs (Elson et al., 2007): two classes, in folders or by the files' names."""

from pathlib import Path

from datasets.data_set import RESNET152_CROP_224, SemanticSet
from datasets.reading.class_folders import read_cats_and_dogs
from datasets.tasks.labelled import LabelledSet


def read(root: Path) -> LabelledSet:
    """Reads `{train,test}/{cat,dog}/`, or flat folders of `cat.*` and `dog.*`."""
    return read_cats_and_dogs(root, name="cats_vs_dogs")


DATA_SET = SemanticSet(
    read=read,
    num_categories=2,
    experiment={"data_root": Path("data/cats_vs_dogs"), **RESNET152_CROP_224},
)
