"""MNIST (LeCun et al., 1998): handwritten digits of 28 x 28 pixels; downloaded where absent."""

from pathlib import Path

from datasets.data_set import RESNET152_CROP_224, SemanticSet
from datasets.tasks.labelled import LabelledSet


def read(root: Path) -> LabelledSet:
    """Reads the decoded images of both splits."""
    # Only here: torchvision imports torch.
    from datasets.reading.torchvision_files import read_torchvision_set

    return read_torchvision_set("mnist", root)


DATA_SET = SemanticSet(
    read=read,
    num_categories=10,
    is_grey=True,
    has_synthetic=False,  # a turned digit is no anomaly (0, 8; 6 and 9)
    experiment={"data_root": Path("data/mnist"), **RESNET152_CROP_224},
)
