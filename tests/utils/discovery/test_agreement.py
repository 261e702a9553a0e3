import pytest

from utils.discovery.agreement import agreement


def test_renumbered_kinds_agree_wholly():
    found = agreement([3, 3, 0, 0, 7], ["a", "a", "b", "b", "good"])
    assert (found.nmi, found.ari, found.f1) == (pytest.approx(1), pytest.approx(1), 1.0)
    assert found.name_of == {3: "a", 0: "b", 7: "good"}


def test_one_kind_for_all_has_the_largest_share_alone():
    found = agreement([0] * 5, ["a", "a", "a", "b", "good"])
    assert (found.nmi, found.ari, found.f1) == (0, 0, 0.6)


def test_more_kinds_than_names_leave_some_without():
    found = agreement([0, 1, 2, 2], ["a", "a", "b", "b"])
    assert found.f1 == 0.75
    assert len(found.name_of) == 2
