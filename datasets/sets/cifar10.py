"""CIFAR-10 (Krizhevsky, 2009): ten classes of 32 x 32 colour images; downloaded where absent."""

from pathlib import Path

from datasets.data_set import RESNET152_CROP_224, SemanticSet
from datasets.tasks.labelled import LabelledSet


def read(root: Path) -> LabelledSet:
    """Reads the decoded images of both splits."""
    # Only here: torchvision imports torch.
    from datasets.reading.torchvision_files import read_torchvision_set

    return read_torchvision_set("cifar10", root)


DATA_SET = SemanticSet(
    read=read,
    num_categories=10,
    experiment={"data_root": Path("data/cifar10"), **RESNET152_CROP_224},
)
