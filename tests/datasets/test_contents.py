"""Digests follow the content, and a file that has not changed is read once."""

import os

import numpy as np
import pytest

from datasets import contents
from datasets.contents import Digests, contents_of
from datasets.samples import ImageSet, Task
from datasets.sets.folder import DATA_SET, FolderOptions
from datasets.tasks.structured import structured_tasks
from tests.datasets.trees import draw_mvtec_category


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    paths = [tmp_path / "\udcff.png", tmp_path / "b.png", tmp_path / "gone.png"]
    for path in paths[:2]:
        path.write_bytes(b"one")
    memory = tmp_path / "cache/digests.sqlite"
    first, second, gone = Digests(memory).of(paths)
    assert first == second
    assert gone == "missing"
    with monkeypatch.context() as patch:
        patch.setattr(contents, "file_digest", lambda path: pytest.fail(f"{path} was read"))
        assert Digests(memory).of(paths[:2]) == [first, first]
    paths[1].write_bytes(b"two")
    assert Digests(memory).of(paths)[:2] != [first, first]
    assert Digests(memory).of(paths) == Digests().of(paths)


def test_a_memory_that_cannot_be_kept_is_done_without(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "broken.sqlite").write_bytes(b"no data base" * 100)
    os.mkdir(tmp_path / "folder.sqlite")  # noqa: PTH102
    for name in ("broken.sqlite", "folder.sqlite", "a.png/x.sqlite"):
        assert Digests(tmp_path / name).of([tmp_path / "a.png"]) == Digests().of(
            [tmp_path / "a.png"]
        )


def test_contents_have_images_and_masks_by_kind_named_from_the_root(tmp_path):
    draw_mvtec_category(tmp_path, "part", num_train=3, num_good=2, num_defective=1)
    (task,) = structured_tasks(DATA_SET[0], tmp_path, (), FolderOptions())
    found = contents_of(task, tmp_path, Digests())
    assert {group: len(files) for group, files in found.items()} == {
        **{"train/good": 3, "test/good": 2, "test/hole": 1, "test/scratch": 1},
        **{"masks/hole": 1, "masks/scratch": 1},
    }
    assert list(found["test/hole"]) == ["part/test/hole/000.png"]


def test_arrays_are_one_entry_of_each_class():
    images = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)

    def task(test):
        return Task(
            category="3", label="3", train=ImageSet("train", images=images),
            train_indices=np.array([0, 2]), test=ImageSet("test", images=test),
            test_labels=np.array([0, 1, 1, 0, 1, 1]), kinds=("3", "4", "4", "3", "4", "4"),
            peers=(np.array([0, 2]),),
        )  # fmt: skip

    before = contents_of(task(images), None, Digests())
    assert before["train/good"][""].startswith("2 images ")
    assert before["test/4"][""].startswith("4 images ")
    other = images.copy()
    other[1, 0, 0] += 1
    now = contents_of(task(other), None, Digests())
    assert [group for group in before if before[group] != now[group]] == ["test/4"]
