"""scikit-learn's embedded digits: 1,797 handwritten ones of 8 x 8 pixels; needs no download."""

from pathlib import Path

import numpy as np

from datasets.data_set import SemanticSet
from datasets.tasks.labelled import LabelledSet, LabelledSplit

TEST_SHARE = 0.4
LARGEST = 16
"""Value of a white pixel."""


def read(root: Path) -> LabelledSet:
    """Reads the digits, split 60 to 40 with each class's share kept; `root` is not looked at."""
    del root
    # Only here: scikit-learn takes a second to import.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / LARGEST)).astype(np.uint8)  # (N, 8, 8)
    labels = digits.target.astype(np.int64)  # (N,)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, random_state=0, stratify=labels
    )
    return LabelledSet(
        name="digits",
        class_names=tuple(str(name) for name in digits.target_names),
        train=LabelledSplit("train", images=images[train], labels=labels[train]),
        test=LabelledSplit("test", images=images[test], labels=labels[test]),
    )


DATA_SET = SemanticSet(
    read=read,
    num_categories=10,
    is_grey=True,
    has_synthetic=False,  # a turned digit is no anomaly (0, 8; 6 and 9)
    # It must run where nothing can be downloaded, and 8 x 8 pixels need no 256.
    experiment={
        "backbone": "tf_efficientnet_lite0",
        "layers": (4,),
        "image_size": 96,
        "crop_size": None,
        "resize": "bilinear_shorter",
    },
)
