"""What a pair was made of is compared with what is there; every kind of change has its words."""

import pytest

from utils.errors import RunError
from utils.runs.made_of import (
    MadeOf,
    check_made_of,
    load_made_of,
    made_of_file,
    save_made_of,
)

FILES = {
    "train/good": {"train/good/0.png": "a", "train/good/1.png": "b"},
    "test/good": {"test/good/0.png": "c"},
    "test/hole": {"test/hole/0.png": "d", "test/hole/1.png": "e"},
    "masks/hole": {"masks/0.png": "f"},
}


def changed(**groups):
    return MadeOf(FILES | {name.replace("_", "/"): files for name, files in groups.items()})


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (changed(), []),
        (
            changed(test_hole={"test/hole/1.png": "e"}, test_good=FILES["test/good"] | {"x": "d"}),
            ["1 file moved from test/hole to test/good"],
        ),
        (changed(train_good={"train/good/0.png": "a"}), ["1 file gone from train/good"]),
        (changed(train_good={"9": "a", "8": "b"}), ["2 files of train/good renamed"]),
        (changed(masks_hole={"masks/0.png": "g"}), ["1 file of masks/hole changed"]),
        (changed(test_crack={"test/crack/0.png": "z"}), ["1 file added to test/crack"]),
        (
            changed(train_good={}, test_good=FILES["test/good"] | FILES["train/good"]),
            ["2 files moved from train/good to test/good"],  # a split file, not the files, changed
        ),
    ],
)
def test_changes_of_files_are_counted_by_kind(now, said):
    assert MadeOf(FILES).differences(now) == said


def test_images_that_tasks_share_are_compared_as_a_whole():
    before = MadeOf({"train/good": {"": "12 images aa"}, "test/cat": {"": "5 images bb"}})
    now = MadeOf({"train/good": {"": "11 images cc"}, "test/cat": {"": "5 images dd"}})
    assert before.differences(now) == [
        "train/good: 12 images, now 11 images",
        "test/cat: 5 images, now 5 images, but others",
    ]


def test_weights_are_compared_where_both_are_known():
    before = MadeOf(FILES, "w1", "b1")
    assert before.differences(MadeOf(FILES)) == []
    assert before.differences(MadeOf(FILES, "w2", "b2")) == [
        "a file that the options name (--weights or the method's) has changed"
    ]
    assert before.differences(MadeOf(FILES, "", "b2")) == [
        "the backbone's weights were b1 and are b2"
    ]


def test_files_of_pairs_come_back_and_are_checked(tmp_path):
    path = made_of_file(tmp_path, "tile", 0)
    save_made_of(path, MadeOf(FILES, "w", "b"))
    assert load_made_of(path) == MadeOf(FILES, "w", "b")
    there = {"tile": changed(train_good={})}
    pairs = [("tile", 0), ("tile", 1), ("wood", 0)]
    with pytest.raises(RunError, match=r"tile, seed 0 .*2 files gone from train/good\. Do this\."):
        check_made_of(tmp_path, pairs, there, way_out="Do this.")
    assert check_made_of(tmp_path, pairs, there, way_out="", test_only=True) == [("tile", 1)]
    for text in ("{", "[]", "{}", '{"images": {"a": 1}, "weights": "", "backbone": ""}'):
        path.write_text(text)
        with pytest.raises(RunError, match="corrupt"):
            load_made_of(path)
