import math

import pytest
from scipy.stats import friedmanchisquare

from figures.shared.ranks import (
    Ranks,
    draw_bars,
    draw_ranks,
    in_words,
    rank_methods,
    table_of_ranks,
)

# Demšar 2006, Table 6 (AUC of C4.5 and three ways of tuning it on 14 data sets).
PUBLISHED = {
    "C4.5": [
        *(0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661),
        *(0.583, 0.775, 1.000, 0.940, 0.619, 0.972, 0.957),
    ],
    "C4.5+m": [
        *(0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668),
        *(0.583, 0.838, 1.000, 0.962, 0.666, 0.981, 0.978),
    ],
    "C4.5+cf": [
        *(0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609),
        *(0.563, 0.866, 1.000, 0.965, 0.614, 0.9751, 0.946),
    ],
    "C4.5+m+cf": [
        *(0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685),
        *(0.625, 0.875, 1.000, 0.962, 0.669, 0.975, 0.970),
    ],
}


@pytest.fixture
def published():
    values = {m: {f"set {i}": v for i, v in enumerate(vs)} for m, vs in PUBLISHED.items()}
    return rank_methods(values)


def test_ranks_are_those_that_demsar_prints(published):
    found = dict(zip(published.methods, published.mean, strict=True))
    expected = {"C4.5": 3.143, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}
    assert found == pytest.approx(expected, abs=5e-4)
    assert published.critical_difference == pytest.approx(2.569 * math.sqrt(20 / 84), abs=2e-3)
    assert published.p_value == friedmanchisquare(*PUBLISHED.values()).pvalue
    assert "p = 0.0" in " ".join(in_words(published))


def test_only_methods_that_every_set_has_are_ranked():
    values = {
        "a": {"x": 90.0, "y": 80.0},
        "b": {"x": 80.0, "y": 90.0},
        "c": {"x": 99.0},
        "d": {"x": 70.0, "y": math.nan},
    }
    ranks = rank_methods(values)
    assert set(ranks.methods) == {"a", "b"}
    assert ranks.mean == (1.5, 1.5)
    assert ranks.left_out == ("c", "d")
    assert math.isnan(ranks.critical_difference)
    assert "Not ranked, for want of a data set: c, d." in in_words(ranks)
    assert rank_methods({"a": {"x": 1.0}}) is None


def test_a_set_that_most_methods_lack_takes_no_ranks_away():
    values = {name: {"x": float(place)} for place, name in enumerate("abcde")}
    ranks = rank_methods(values | {"f": {"part of x": 3.0}, "g": {"part of x": 2.0}})
    assert (ranks.methods, ranks.data_sets, ranks.left_out) == (tuple("edcba"), ("x",), ("f", "g"))
    assert "Left out, for few methods are on it: part of x." in in_words(ranks)


def test_the_table_of_ranks_has_methods_by_data_sets_the_best_on_top():
    values = {
        "x": {"a": [70.0, 72.0], "b": [90.0], "c": [99.0], "d": [math.nan]},
        "y": {"b": [80.0], "a": [60.0], "d": []},
    }
    means = {"a": {"x": 71.0, "y": 60.0}, "b": {"x": 90.0, "y": 80.0}, "c": {"x": 99.0}, "d": {}}
    ranks = rank_methods(means)
    table = table_of_ranks(values, ranks)
    assert [column.name for column in table.columns] == ["x", "y", "mean rank"]
    assert [row.label for row in table.rows] == ["b", "a", "c"]
    assert table.texts() == [
        ["90.0", "80.0", "1.00"],
        ["71.0 ± 1.4", "60.0", "2.00"],
        ["99.0", "", ""],
    ]
    # The best of what stands there, ranked or not; of ranks the smallest is no loser.
    assert table.marks() == [["second", "best", ""], ["", "second", ""], ["best", "", ""]]


def test_lines_join_what_is_not_told_apart():
    ranks = Ranks(tuple("abcd"), (1.0, 1.8, 2.5, 4.0), ("x",), (), 0.01, 1.0)
    assert ranks.groups == [(0, 1), (1, 2)]
    assert Ranks(tuple("ab"), (1.0, 2.0), ("x",), (), math.nan, math.nan).groups == []


def test_pictures_name_every_method(published):
    texts = {text.get_text() for text in draw_ranks(published).axes[0].texts}
    for name, rank in zip(published.methods, published.mean, strict=True):
        assert f" {name} ({rank:.2f}) " in texts
    bars = draw_bars({"x": {"a": [90.0, 92.0], "b": [80.0]}, "y": {"a": [70.0]}}, "AUROC", ("red",))
    first, second = bars.axes
    assert [t.get_text() for t in first.get_yticklabels()] == ["b", "a"]
    assert len(second.patches) == 1
