"""CIFAR-100 (Krizhevsky, 2009), its 100 fine classes as in NoCo's released code."""

from pathlib import Path

from datasets.data_set import RESNET152_CROP_224, SemanticSet
from datasets.tasks.labelled import LabelledSet


def read(root: Path) -> LabelledSet:
    """Reads the decoded images of both splits."""
    # Only here: torchvision imports torch.
    from datasets.reading.torchvision_files import read_torchvision_set

    return read_torchvision_set("cifar100", root)


DATA_SET = SemanticSet(
    read=read,
    num_categories=100,
    experiment={"data_root": Path("data/cifar100"), **RESNET152_CROP_224},
)
