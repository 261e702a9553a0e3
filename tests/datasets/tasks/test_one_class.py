import numpy as np
import pytest

from datasets.samples import DataError
from datasets.tasks.labelled import LabelledSet, LabelledSplit
from datasets.tasks.one_class import one_class_tasks

ANIMALS = ("bird", "cat", "dog")


def labelled_set(train, test, class_names=ANIMALS):
    def split(name, labels):
        labels = np.array(labels, dtype=np.int64)
        images = np.zeros((len(labels), 4, 4), dtype=np.uint8)
        return LabelledSplit(name, images=images, labels=labels)

    return LabelledSet("animals", tuple(class_names), split("train", train), split("test", test))


def test_one_vs_rest_trains_on_the_named_class_alone():
    tasks = one_class_tasks(labelled_set([2, 0, 1, 0, 1, 2], [0, 1, 2, 1]), "one-vs-rest")
    labels = {task.category: task.label for task in tasks}
    assert labels == {"bird": "0 bird", "cat": "1 cat", "dog": "2 dog"}
    cat = tasks[1]
    assert cat.train_indices.tolist() == [2, 4]
    assert cat.test_labels.tolist() == [1, 0, 1, 0]
    assert cat.test_labels.dtype == np.int64
    assert cat.kinds == ("bird", "cat", "dog", "cat")


def test_wanted_by_name_and_number_in_the_order_given_even_without_normals_to_test_on():
    animals = labelled_set([0, 0, 1, 1, 2, 2], [0])
    tasks = one_class_tasks(animals, "one-vs-rest", ["dog", "0", "2"])
    assert [task.category for task in tasks] == ["dog", "bird"]
    assert [task.test_labels.tolist() for task in tasks] == [[1], [0]]


def test_names_that_are_numbers_are_never_taken_as_positions():
    numbered = labelled_set([0, 0, 1, 1], [0, 1], class_names=("1", "10"))
    (task,) = one_class_tasks(numbered, "one-vs-rest", ["1"])
    assert (task.category, task.label, task.train_indices.tolist()) == ("1", "1", [0, 1])
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
    for wanted in ((), ["bird", "cat"]):
        with pytest.raises(DataError, match=r"class 'cat' has 1 training image"):
            one_class_tasks(animals, "one-vs-rest", wanted)
    dog, bird = one_class_tasks(animals, "one-vs-rest", ["dog", "bird"])
    assert (dog.train_indices.tolist(), bird.train_indices.tolist()) == ([3, 4], [0, 1])
    # What cannot be a task is nobody's peer.
    assert [indices.tolist() for indices in dog.peers] == [[0, 1], [3, 4]]
    assert len(one_class_tasks(animals, "leave-one-out")) == 3


@pytest.mark.parametrize(
    ("protocol", "peers"),
    [
        ("one-vs-rest", [[1, 3], [2, 4], [0, 5]]),
        ("leave-one-out", [[0, 2, 4, 5], [0, 1, 3, 5], [1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]),
    ],
)
def test_peers_are_all_tasks_of_the_set_whatever_is_wanted(protocol, peers):
    # Fish are in the test split alone.
    classes = (*ANIMALS, "fish")
    animals = labelled_set([2, 0, 1, 0, 1, 2], [0, 1, 2, 3], class_names=classes)
    for wanted in ((), ["cat"], ["dog", "bird"]):
        for task in one_class_tasks(animals, protocol, wanted):
            assert [indices.tolist() for indices in task.peers] == peers
            own = animals.class_names.index(task.category)
            assert task.train_indices.tolist() == peers[own]
            assert task.train is animals.train
            assert task.test is animals.test


def test_leave_one_out_needs_two_images_of_the_others():
    with pytest.raises(DataError, match=r"all classes but 'bird' has 1 training image"):
        one_class_tasks(labelled_set([0, 0, 1], [0, 1]), "leave-one-out", ["bird"])


def test_class_of_the_test_split_alone_is_always_anomalous():
    animals = labelled_set([0, 0, 1, 1], [0, 1, 2])
    rest = one_class_tasks(animals, "one-vs-rest")
    assert [task.category for task in rest] == ["bird", "cat"]
    assert rest[0].test_labels.tolist() == [0, 1, 1]
    left = one_class_tasks(animals, "leave-one-out")
    assert [task.test_labels.tolist() for task in left] == [[1, 0, 1], [0, 1, 1], [0, 0, 1]]
    with pytest.raises(DataError, match=r"class 'dog' has 0 training image"):
        one_class_tasks(animals, "one-vs-rest", ["dog"])
