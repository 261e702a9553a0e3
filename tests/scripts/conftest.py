"""Images and runs that several scripts start from; who changes a run copies it before."""

import pytest

import train_mvtec
from tests.datasets.trees import draw_mvtec_category
from tests.scripts.runs import train_digits
from tests.threads import torch_threads


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The run of two digits and two seeds."""
    return train_digits(tmp_path_factory.mktemp("digits"), "--seeds", "0", "1")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data root whose images are no squares."""
    root = tmp_path_factory.mktemp("images")
    shape = {"num_train": 25, "num_good": 6, "num_defective": 3, "size": (90, 60)}
    draw_mvtec_category(root, "cloth", **shape)
    return root


@pytest.fixture(scope="session")
def calibrated(root, tmp_path_factory):
    """A run on `root`, of which ten training images are held out for a calibration."""
    # Another number of threads rounds otherwise, by a step of half precision here and there.
    with torch_threads(1):
        return train_mvtec.main(
            [
                *("folder", "noco_cf", "--data-root", str(root)),
                *("--output", str(tmp_path_factory.mktemp("calibrated"))),
                *("--backbone", "tf_efficientnet_lite0", "--workers", "0", "--overlays", "0"),
                *("--image-size", "48", "--crop-size", "32", "--resize", "lanczos_shorter"),
                *("--method.prototypes", "2", "--select", "synthetic", "--grid", "prototypes=1,2"),
                *("--calibration-share", "0.4", "--false-alarm-rate", "0.1"),
            ]
        )
