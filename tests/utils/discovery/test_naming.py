"""Names of kinds, and that they stay with them."""

import pytest

from utils.discovery.files import NAMES
from utils.discovery.naming import carried_over, kind_label, read_names, write_names
from utils.errors import UsageError


def test_names_are_written_to_be_filled_in_and_read_again(tmp_path):
    write_names(tmp_path, {2: "scratch, deep"}, 3)
    assert (tmp_path / NAMES).read_text() == 'kind,name\n1,\n2,"scratch, deep"\n3,\n'
    names = read_names(tmp_path / NAMES)
    assert names == {2: "scratch, deep"}
    assert [kind_label(i, names) for i in (-1, 0, 1)] == ["good", "kind 1", "scratch, deep"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("number,name\n1,a\n", "first line"),
        ("kind,name\nfirst,a\n", "line 2"),
        ("kind,name\n0,a\n", "line 2"),
        ("kind,name\n1,a\n1,b\n", "line 3"),
        ("kind,name\n1,a\n2,a\n", "line 3"),
        ("kind,name\n1,Good\n", "without a defect"),
        ("kind,name\n1\n2,\n\udcff", "cannot be read"),
    ],
)
def test_names_that_cannot_be_used_name_the_line(tmp_path, text, said):
    path = tmp_path / "mine.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=said):
        read_names(path)


def test_several_kinds_without_a_name_are_no_repetition(tmp_path):
    write_names(tmp_path, {}, 3)
    assert read_names(tmp_path / NAMES) == {}


def test_kinds_keep_their_numbers_by_the_images_in_common():
    before = {"a": 0, "b": 0, "c": 1, "d": 2, "e": -1}
    now = {"a": 2, "b": 2, "c": 0, "d": 1, "e": 1, "f": 1}
    assert carried_over(now, before, 3).tolist() == [1, 2, 0]


def test_new_kinds_get_the_numbers_that_are_left():
    before = {"a": 1, "b": 3}
    now = {"a": 0, "b": 1, "c": 2}
    assert carried_over(now, before, 3).tolist() == [1, 0, 2]  # 4 is beyond three kinds
    assert carried_over({"x": 0}, {}, 2).tolist() == [0, 1]
