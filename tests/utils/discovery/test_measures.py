"""What is measured of kinds, and the table beside published values."""

import math

import numpy as np
import pytest

from utils.discovery.measures import METRICS, confusion, kinds_table, measured

NAMES = ["good", "good", "crack", "crack", "hole", "hole"]


def test_perfect_kinds_measure_one_at_each_level():
    values = measured(np.array([-1, -1, 1, 1, 0, 0]), NAMES, np.array([1, 1, 0]), [2, 3, 4])
    assert set(values) == set(METRICS)
    assert all(value == pytest.approx(1) for value in values.values())


def test_good_counts_as_a_class_and_false_alarms_as_errors():
    values = measured(np.array([0, -1, 1, 1, 0, 0]), NAMES, np.array([0, 1, 1, 1, 0]), range(5))
    assert values["f1"] == pytest.approx(5 / 6)
    assert values["f1_without_good"] == 1
    # Regions 0 and 1 are of good images.
    assert values["f1_regions"] == pytest.approx(3 / 5)
    assert values["nmi_regions_without_good"] == pytest.approx(1)


def test_without_regions_there_is_nothing_to_measure():
    values = measured(np.full(6, -1), NAMES, np.zeros(0, dtype=int), [])
    assert values["nmi"] == 0
    assert values["f1"] == pytest.approx(2 / 6)
    assert math.isnan(values["nmi_regions"])


def test_confusion_puts_what_belongs_together_on_the_diagonal():
    labels = ["good", "kind 2", "kind 10", "kind 10", "kind 2", "kind 2"]
    rows, columns, table = confusion(labels, NAMES)
    assert rows == ["good", "kind 2", "kind 10"]
    assert columns == ["good", "hole", "crack"]
    assert table.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 2]]


def row(category, **changes):
    values = {"nmi": 0.5, "ari": 0.25, "f1": 0.75, "was_estimated": 0, "masks": "normal"}
    return {"category": category, **values, **changes}


def test_the_table_has_a_mean_and_published_values_of_the_same_lines():
    table = kinds_table("mvtec", "kinds", [row("bottle"), row("tile", nmi=0.7)])
    lines = {line.key: [cell.mean for cell in line.cells] for line in table.rows}
    assert lines["mean"][:3] == pytest.approx([60, 25, 75])
    names = [column.key for column in table.columns]
    assert lines["bottle"][names.index("MuSc + AnomalyNCD_f1")] == 81.9
    assert lines["mean"][names.index("PatchCore + AnomalyNCD_nmi")] == 67.0
    assert lines["tile"][names.index("PatchCore + AnomalyNCD_nmi")] is None


def test_the_table_says_what_makes_its_numbers_differ():
    table = kinds_table("folder", "kinds", [row("a", masks="true", was_estimated=1)])
    assert len(table.columns) == 3
    assert [line.key for line in table.rows] == ["a"]
    said = " ".join(table.notes)
    assert "UPPER BOUND" in said
    assert "estimated" in said
    assert "Published" not in said
