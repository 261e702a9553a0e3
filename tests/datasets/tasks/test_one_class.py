import numpy as np
import pytest

from datasets.samples import DataError
from datasets.tasks.labelled import LabelledSet, LabelledSplit, read_labelled_set
from datasets.tasks.one_class import one_class_tasks

ANIMALS = ("bird", "cat", "dog")


def labelled_set(train, test, class_names=ANIMALS):
    def split(name, labels):
        labels = np.array(labels, dtype=np.int64)
        return LabelledSplit(name, labels, images=np.zeros((len(labels), 4, 4), dtype=np.uint8))

    return LabelledSet("animals", tuple(class_names), split("train", train), split("test", test))


def test_one_vs_rest_trains_on_the_named_class_alone():
    tasks = one_class_tasks(labelled_set([2, 0, 1, 0, 1, 2], [0, 1, 2, 1]), "one-vs-rest", None)
    assert [(task.category, task.number) for task in tasks] == [("bird", 0), ("cat", 1), ("dog", 2)]
    cat = tasks[1]
    assert cat.train_indices.tolist() == [2, 4]
    assert cat.test_labels.tolist() == [1, 0, 1, 0]
    assert cat.test_labels.dtype == np.int64


def test_leave_one_out_trains_on_all_other_classes():
    tasks = one_class_tasks(labelled_set([2, 0, 1, 0, 1, 2], [0, 1, 2, 1]), "leave-one-out", None)
    assert [task.category for task in tasks] == list(ANIMALS)
    cat = tasks[1]
    assert cat.train_indices.tolist() == [0, 1, 3, 5]
    assert cat.test_labels.tolist() == [0, 1, 0, 1]


def test_the_protocols_mirror_each_other_on_a_whole_set():
    digits = read_labelled_set("digits", None)
    rest = one_class_tasks(digits, "one-vs-rest", ())
    left = one_class_tasks(digits, "leave-one-out", ())
    assert len(rest) == len(left) == 10
    for one, other in zip(rest, left, strict=True):
        np.testing.assert_array_equal(one.test_labels, 1 - other.test_labels)
        both = np.concatenate([one.train_indices, other.train_indices])
        assert sorted(both.tolist()) == list(range(len(digits.train)))
        assert set(digits.train.labels[one.train_indices].tolist()) == {one.number}


def test_wanted_by_name_and_number_in_the_order_given():
    animals = labelled_set([0, 0, 1, 1, 2, 2], [0])
    tasks = one_class_tasks(animals, "one-vs-rest", ["dog", "0", "2"])
    assert [task.category for task in tasks] == ["dog", "bird"]


def test_names_that_are_numbers_are_never_taken_as_positions():
    numbered = labelled_set([0, 0, 1, 1], [0, 1], class_names=("1", "10"))
    assert one_class_tasks(numbered, "one-vs-rest", ["1"])[0].number == 0
    with pytest.raises(DataError, match=r"no class '0'; .*its classes: 1, 10$"):
        one_class_tasks(numbered, "one-vs-rest", ["0"])


def test_unknown_class_gets_the_nearest_names():
    animals = labelled_set([0, 0, 1, 1, 2, 2], [0])
    with pytest.raises(
        DataError, match=r"animals has no class 'Bird'; nearest: bird; its classes: bird, cat, dog"
    ):
        one_class_tasks(animals, "one-vs-rest", ["cat", "Bird"])
    with pytest.raises(DataError, match=r"no class '3'; its classes: .* number 0 to 2"):
        one_class_tasks(animals, "one-vs-rest", ["3"])


def test_class_with_fewer_than_two_training_images_is_refused_only_where_wanted():
    animals = labelled_set([0, 0, 1, 2, 2], [0, 1, 2])
    with pytest.raises(DataError, match=r"class 'cat' has 1 training image"):
        one_class_tasks(animals, "one-vs-rest", None)
    assert len(one_class_tasks(animals, "one-vs-rest", ["bird", "dog"])) == 2
    assert len(one_class_tasks(animals, "leave-one-out", None)) == 3


def test_leave_one_out_needs_two_images_of_the_others():
    with pytest.raises(DataError, match=r"all classes but 'bird' has 1 training image"):
        one_class_tasks(labelled_set([0, 0, 1], [0, 1]), "leave-one-out", ["bird"])


def test_class_of_the_test_split_alone_is_always_anomalous():
    animals = labelled_set([0, 0, 1, 1], [0, 1, 2])
    rest = one_class_tasks(animals, "one-vs-rest", None)
    assert [task.category for task in rest] == ["bird", "cat"]
    assert rest[0].test_labels.tolist() == [0, 1, 1]
    left = one_class_tasks(animals, "leave-one-out", None)
    assert [task.test_labels.tolist() for task in left] == [[1, 0, 1], [0, 1, 1], [0, 0, 1]]
    with pytest.raises(DataError, match=r"class 'dog' has 0 training image"):
        one_class_tasks(animals, "one-vs-rest", ["dog"])


def test_test_split_without_normals_is_allowed():
    task = one_class_tasks(labelled_set([0, 0, 1, 1], [1, 1]), "one-vs-rest", ["bird"])[0]
    assert task.test_labels.tolist() == [1, 1]


def test_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="one-vs-rest, leave-one-out"):
        one_class_tasks(labelled_set([0, 0], [0]), "one-vs-all", None)
