"""Methods that train on images, from the command line to tables and pictures, at toy width."""

from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

import evaluate
import train_mnist
import train_mvtec
from models.detector import Reconstructs
from models.method import find_methods
from tests.datasets.trees import draw_mvtec_category
from tests.models.methods.cases import SHORT
from tests.scripts.runs import DIGITS, measured
from utils.runs.rows import read_rows
from utils.runs.run import Run

NAMES = ("autoencoder", "vae", "riad", "mnad", "edgrec", "memseg", "draem", "cutpaste", "ddad")
STRUCTURED, SEMANTIC = find_methods("structured"), find_methods("semantic")
OF_CLASSES = ("autoencoder", "vae", "mnad", "cutpaste")  # the quicker ones
SIDE = 64
QUICK = ("--image-size", str(SIDE), "--crop-size", "none", "--workers", "0")


def toy(method, **changes):
    """The words that make a method as small as it is in other tests."""
    known = {entry.name for entry in fields(method.options)}
    words = []
    for name, value in (SHORT | changes).items():
        if name in known:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--method.{name.replace('_', '-')}", *map(str, values)]
    return words


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "cloth")
    return root


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_its_table_scores_and_pictures(images, name, tmp_path):
    method = STRUCTURED[name]
    words = ["folder", name, "--data-root", str(images), "--output", str(tmp_path), *QUICK]
    if "backbone" not in method.ignored:
        words += ["--backbone", "tf_efficientnet_lite0"]
    folder = train_mvtec.main([*words, "--save-maps", "--overlays", "1", *toy(method)])
    (row,) = measured(folder)
    assert 0 <= row["image_auroc"] <= 1
    assert 0 <= row["pixel_auroc"] <= 1
    assert row["trainable"] > 0
    scores = Run.read(folder).load_scores("cloth", 0)
    assert scores["map"].shape == (6, SIDE, SIDE)
    rebuilds = issubclass(method.detector_class(), Reconstructs)
    assert ("reconstruction" in scores) == rebuilds
    with Image.open(folder / "overlays/cloth-seed0/samples.png") as sheet:
        columns = round(sheet.width / 256)
    assert columns == (5 if rebuilds else 4)
    if rebuilds:
        made = scores["reconstruction"]
        assert (made.shape, made.dtype) == ((6, SIDE, SIDE, 3), np.uint8)
        assert made.std() > 0
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("name", OF_CLASSES)
def test_classes_have_a_score_each(name, tmp_path):
    dataset, *options = DIGITS
    words = [dataset, name, *options, "--output", str(tmp_path), *toy(SEMANTIC[name])]
    folder = train_mnist.main([*words, "--categories", "3"])
    (row,) = measured(folder)
    assert 0 <= row["image_auroc"] <= 1
    evaluate.main([str(folder)])
    (again,) = read_rows(folder / "evaluation.csv")
    assert again["image_auroc"] == row["image_auroc"]
