"""p-values by hand, the guarantee by simulation, and files that are not what they seem."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import RunError, UsageError
from utils.evaluation.calibration import (
    Calibration,
    calibration_file,
    chance_of_alarms,
    decision_rule,
    false_alarm_columns,
    false_alarm_notes,
    held_out_for_calibration,
    images_needed,
    load_calibration,
    save_calibration,
)


def calibration(*scores):
    return Calibration(np.sort(np.array(scores, dtype=np.float64)), "given")


def test_p_values_by_hand():
    four = calibration(1.0, 2.0, 2.0, 5.0)
    # Of 4 scores, 4, 4, 3, 1, 1, 0 are at or above these.
    scores = np.array([-1.0, 1.0, 2.0, 2.5, 5.0, 6.0])
    np.testing.assert_array_equal(four.p_values(scores), np.array([5, 5, 4, 2, 2, 1]) / 5)
    assert four.smallest_rate == 0.2
    assert four.threshold(0.2) == 5.0  # p = 1/5 above the largest only
    assert four.threshold(0.39) == 5.0
    assert four.threshold(0.4) == 2.0
    with pytest.raises(UsageError, match=r"0\.19 needs 5 calibration images .* there are 4"):
        four.threshold(0.19)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.integers(0, 10),
    st.floats(0.001, 0.999),
)
def test_threshold_decides_as_the_p_value_does(scores, score, rate):
    found = calibration(*scores)
    anomalous = found.p_values(np.array([score]))[0] <= rate
    if rate < found.smallest_rate:
        assert not anomalous
        assert len(scores) < images_needed(rate)
    else:
        rule = decision_rule(found, rate=rate, default=0.05, threshold=None, ways="")
        assert rule.decision(score) == ("anomalous" if anomalous else "normal")
        assert len(scores) >= images_needed(rate)


def test_default_rate_is_asked_for_only_where_it_can_be_promised(capsys):
    found = calibration(*range(9))
    rule = decision_rule(found, rate=None, default=0.1, threshold=None, ways="")
    assert (rule.threshold, rule.decision(8.5)) == (8.0, "anomalous")
    rule = decision_rule(found, rate=None, default=0.09, threshold=None, ways="")
    assert (rule.p_value(8.5), rule.decision(8.5)) == (0.1, None)
    assert "--false-alarm-rate 0.1 or above" in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.5, 1), (0.3, 3)])
def test_images_needed(rate, needed):
    assert images_needed(rate) == needed


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (50, 0.1), (99, 0.01), (30, 0.2)])
def test_false_alarms_keep_the_rate_asked_for(n, rate):
    """Marginally over calibration set and new image, whatever the scores' distribution."""
    rng = np.random.default_rng(0)
    draws = 10_000
    scores = rng.standard_cauchy((draws, n + 1)).round(1)  # heavy tails, and ties
    alarms = sum(calibration(*row[:-1]).p_values(row[-1:])[0] <= rate for row in scores)
    sigma = math.sqrt(rate * (1 - rate) / draws)
    assert alarms / draws <= rate + 3 * sigma
    assert alarms / draws >= 0.5 * rate  # the rule is not just silent


def test_rule_of_a_threshold_and_of_nothing(capsys):
    rule = decision_rule(None, rate=None, default=0.05, threshold=2.0, ways="w")
    assert rule.p_value(3.0) is None
    assert [rule.decision(score) for score in (3.0, 2.0)] == ["anomalous", "normal"]
    assert capsys.readouterr().err == ""
    rule = decision_rule(None, rate=None, default=0.05, threshold=None, ways="the ways out")
    assert (rule.p_value(3.0), rule.decision(3.0)) == (None, None)
    assert "the ways out" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"0\.1 needs a calibration: the ways out"):
        decision_rule(None, rate=0.1, default=0.05, threshold=None, ways="the ways out")


def test_split_is_the_same_every_time_and_disjoint():
    torch.manual_seed(5)
    first = held_out_for_calibration(100, 0.2, 0.05, what="screw")
    torch.manual_seed(6)
    second = held_out_for_calibration(100, 0.2, 0.05, what="screw")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    kept, held = first
    assert (len(kept), len(held)) == (80, 20)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(100))
    assert held.tolist() != list(range(80, 100))


@pytest.mark.parametrize(
    ("num", "share", "rate"), [(90, 0.2, 0.05), (20, 0.96, 0.05), (3, 0.5, 0.5)]
)
def test_too_few_images_are_refused(num, share, rate):
    with pytest.raises(UsageError, match="screw: --calibration-share"):
        held_out_for_calibration(num, share, rate, what="screw")


@pytest.fixture
def stored(tmp_path):
    head = tmp_path / "head.safetensors"
    head.write_bytes(b"a head")
    path = calibration_file(tmp_path, "a b", 3, "-last")
    save_calibration(path, head=head, source="given", names=["x", "y"], scores=[0.1 + 0.2, -1.5])
    return path, head


def test_file_gives_the_scores_back(stored):
    path, head = stored
    found = load_calibration(path, head=head)
    assert found.scores.tolist() == [-1.5, 0.1 + 0.2]
    assert found.source == "given"
    assert load_calibration(path.with_name("other.json"), head=head) is None


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [1.0]},
        {"scores": ["1", 2]},
        {"scores": [float("nan"), 1.0]},
        {"scores": [True, 1.0]},
        {"scores": [], "images": []},
        {"images": "ab"},
        {"source": "me"},
        {"head": "0"},
    ],
    ids=str,
)
def test_changed_files_are_refused(stored, change):
    path, head = stored
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RunError, match=r"a_b~\w+-seed3-last\.json"):
        load_calibration(path, head=head)


def test_another_head_is_refused(stored):
    path, head = stored
    head.write_bytes(b"b head")
    with pytest.raises(RunError, match="made with another head"):
        load_calibration(path, head=head)


def test_columns_and_note():
    found = calibration(*range(99))
    normals = np.array([0.0] * 90 + [97.5] * 4 + [200.0] * 6)
    columns = false_alarm_columns(found, normals, 0.02)
    assert columns == {
        "calibration_images": 99,
        "test_normals": 100,
        "false_alarm_rate_asked": 0.02,
        "false_alarm_rate_seen": 0.1,  # p of 97.5 is 2/100, of 200 1/100
    }
    usual = {**columns, "false_alarm_rate_seen": 0.02}
    assert false_alarm_notes([{"select": "last"}]) == []
    (note,) = false_alarm_notes([{"select": "last", **usual}])
    assert "asked 2 %, seen 2.0 % (2 of 100" in note
    assert "chance" not in note
    often = {"select": "best_test", **usual, "false_alarm_rate_seen": 0.3}
    first, second = false_alarm_notes([{"select": "last", **usual}, often])
    assert "chance" not in first
    assert "chance gives so many less often than once in 1,000" in second


def test_chance_of_alarms_by_simulation():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(4000, 49 + 30))
    counts = np.array([(calibration(*row[:49]).p_values(row[49:]) <= 0.1).sum() for row in scores])
    row = {"calibration_images": 49, "test_normals": 30, "false_alarm_rate_asked": 0.1}
    for alarms in (1, 3, 6):
        expected = chance_of_alarms({**row, "false_alarm_rate_seen": alarms / 30})
        assert (counts >= alarms).mean() == pytest.approx(expected, abs=0.03)
