"""What tests of the scripts share: quick options, refusals, and whether two runs are equal."""

import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train_mnist
import train_mvtec
from utils.runs.rows import read_rows

IMAGES = (
    *("--backbone", "tf_efficientnet_lite0", "--image-size", "64", "--crop-size", "none"),
    *("--workers", "0", "--overlays", "0"),
)
DIGITS = ("digits", "--categories", "0", "7", "--overlays", "0", "--workers", "0")
QUICK_DIGITS = ("--image-size", "32", "--method.epochs", "2", "--workers", "0", "--overlays", "3")


def words_of(root, output, method, *options):
    """The words of train_mvtec.py for a folder of images in MVTec's layout."""
    paths = ("--data-root", str(root), "--output", str(output))
    return ["folder", method, *paths, *IMAGES, *options]


def train(root, output, method, *options):
    """Train on such a folder and return the run folder."""
    return train_mvtec.main(words_of(root, output, method, *options))


def train_digits(output, *options):
    """Run train_mnist.py on two of the embedded digits and return the run folder."""
    words = ["digits", "--output", str(output), *QUICK_DIGITS, "--categories", "0", "1"]
    return train_mnist.main([*words, *options])


def refusal(capsys, main, *words, code=2):
    """The message, on one line, with which a script ends."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", error).split())


def measured(folder):
    """The rows of results.csv without time and memory; None where a value is undefined."""
    return [
        {
            name: None if value != value else value
            for name, value in row.items()
            if not name.endswith("_seconds") and name != "peak_bytes"
        }
        for row in read_rows(folder / "results.csv")
    ]


def assert_same_file(one, two):
    """Pictures and text to the byte; arrays and heads to the bit, whose files have any order."""
    if one.suffix == ".npz":
        with np.load(one) as arrays, np.load(two) as expected:
            assert arrays.files == expected.files
            for name in expected:
                np.testing.assert_array_equal(arrays[name], expected[name])
    elif one.suffix == ".safetensors":
        tensors, expected = load_file(one), load_file(two)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        with safe_open(one, "pt") as head, safe_open(two, "pt") as other:
            assert head.metadata() == other.metadata()
    else:
        assert one.read_bytes() == two.read_bytes(), one


def assert_same_pair(folder, other, category, seed):
    """Row, scores and head of one category and seed are equal to the bit."""
    rows, others = (
        [row for row in measured(run) if (row["category"], row["seed"]) == (category, seed)]
        for run in (folder, other)
    )
    assert rows == others != []
    for name in (f"scores/{category}-seed{seed}.npz", f"heads/{category}-seed{seed}.safetensors"):
        assert_same_file(folder / name, other / name)


def assert_same_run(folder, other):
    """Two runs have the same files, and all but times and environment is equal in them."""
    files, others = (
        sorted(path.relative_to(run) for path in run.rglob("[!.]*") if path.is_file())
        for run in (folder, other)
    )
    assert files == others
    rows, other_rows = ([list(row.items()) for row in measured(run)] for run in (folder, other))
    assert rows == other_rows
    for name in files:
        if name.name not in {"results.csv", "environment.json"}:
            assert_same_file(folder / name, other / name)
