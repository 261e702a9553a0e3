from pathlib import Path

import numpy as np
import pytest

from datasets.data_set import SemanticSet, find_data_sets
from datasets.sets import digits
from datasets.tasks.labelled import LabelledSplit

NOWHERE = Path("nowhere")


def test_digits_split_is_complete_disjoint_and_stratified():
    labelled = digits.read(NOWHERE)
    assert labelled.class_names == tuple("0123456789")
    assert (len(labelled.train), len(labelled.test)) == (1078, 719)
    everything = np.concatenate([labelled.train.images, labelled.test.images])
    # The set holds no two equal images of 8 x 8 pixels, so distinct bytes mean disjoint splits.
    assert len({image.tobytes() for image in everything}) == 1797
    shares = [np.bincount(split.labels) / len(split) for split in (labelled.train, labelled.test)]
    np.testing.assert_allclose(*shares, atol=1e-3)


def test_digits_are_the_same_each_time_and_use_the_whole_range():
    first, second = digits.read(NOWHERE), digits.read(NOWHERE)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)
    assert first.train.images.dtype == np.uint8
    assert first.train.labels.dtype == np.int64
    assert (first.train.images.min(), first.train.images.max()) == (0, 255)
    assert len(np.unique(first.train.images)) == 17


def test_every_set_but_digits_has_a_folder():
    found = find_data_sets(SemanticSet)
    assert [n for n, one in found.items() if "data_root" not in one.experiment] == ["digits"]


def test_split_checks_its_fields():
    labels = np.zeros(2, dtype=np.int64)
    images = np.zeros((2, 4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="either images or paths"):
        LabelledSplit("test", labels=labels)
    with pytest.raises(ValueError, match="either images or paths"):
        LabelledSplit("test", labels=labels, images=images, paths=(Path("a"), Path("b")))
    with pytest.raises(ValueError, match="2 images, but labels of shape"):
        LabelledSplit("test", labels=labels[:1], images=images)
