"""Choosing on synthetic anomalies: what is held out, what wins, and what is never looked at."""

import math
from functools import partial

import pytest
import torch

from configs.experiment import parse_grid
from models.detector import Detector
from models.method import find_method
from tests.utils.banks import constant_bank
from utils.errors import UsageError
from utils.evaluation.scoring import Scoring
from utils.evaluation.selection import (
    choose,
    hold_out,
    joined_validation,
    num_copies,
    validation_set,
)
from utils.evaluation.test_set import TestSet

SIDE = 4
NOCO_CF = find_method("noco_exact").options


bank_of = partial(constant_bank, side=SIDE)


class Stepper(Detector):
    """Scores by one of several functions of the features: one per step of its fit."""

    def __init__(self, functions, fits=None):
        super().__init__()
        self.functions = functions
        self.current = functions[0]
        self.fits = [] if fits is None else fits

    def fit(self, bank, *, generator, monitor=None):
        self.fits.append((len(bank), torch.rand(1, generator=generator).item()))
        for step, function in enumerate(self.functions, start=1):
            self.current = function
            if monitor is not None:
                monitor(step, {"loss": float(step)})

    def stopped_at(self, step):
        return {"epochs": step}

    def forward(self, features):
        return self.current(features[:, 0])  # (B, H, W)


LEFT = torch.arange(SIDE) < SIDE // 2
FUNCTIONS = {
    # Finds the image at the wrong place; its image AUROC is 1, its pixel AUROC low.
    "wrong": lambda values: values * ~LEFT,
    "right": lambda values: values * LEFT,
    "opposite": lambda values: -values,
}


def make_validation(masks=True):
    """Ten normals of value 0 to 0.9 (8 kept), and four anomalies of 5 whose left half is drawn."""
    normals = bank_of([i / 10 for i in range(10)])
    kept, held = hold_out(10)
    drawn = LEFT.expand(4, SIDE, SIDE) if masks else None
    return validation_set(normals, kept, held, bank_of([5.0] * 4), Scoring(), drawn)


def choose_step(functions, lines, *, masks=True, watched=(), kind=Stepper):
    """Choose among the steps of one fit; what is logged goes to `lines`."""

    def build(options):
        assert options == {}
        return kind(functions)

    def log(**values):
        lines.append(values)

    return choose(build, [{}], make_validation(masks), seed=0, logs=[log], watched=watched)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 57, 300])
def test_hold_out_is_fixed_disjoint_and_a_fifth(count):
    kept, held = hold_out(count)
    torch.manual_seed(123)
    again = hold_out(count)
    assert torch.equal(kept, again[0])
    assert torch.equal(held, again[1])
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(count))
    assert len(held) == max(1, round(count / 5))
    assert kept.tolist() == sorted(kept.tolist())
    assert held.tolist() == sorted(held.tolist())


def test_hold_out_is_no_run_of_neighbours():
    _, held = hold_out(100)
    assert 25 < held.float().mean() < 75
    assert (held.diff() > 1).any()


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_image_cannot_be_split(count):
    with pytest.raises(UsageError, match="at least two normal training images"):
        hold_out(count)


@pytest.mark.parametrize(("held", "copies"), [(1, 8), (12, 8), (20, 5), (50, 2), (70, 1), (900, 1)])
def test_about_a_hundred_anomalies(held, copies):
    assert num_copies(held) == copies


def test_validation_joins_held_out_normals_and_anomalies():
    validation = make_validation()
    kept, held = hold_out(10)
    assert validation.kept.indices == kept.tolist()
    (test,) = validation.tests
    assert test.labels.tolist() == [0] * 2 + [1] * 4
    values = torch.cat(list(test.bank.batches(3)))[:, 0, 0, 0]
    torch.testing.assert_close(values, torch.tensor([*(held / 10).tolist(), 5, 5, 5, 5]))
    assert not test.masks[:2].any()
    assert torch.equal(test.masks[2:], LEFT.expand(4, SIDE, SIDE))
    assert test.names[:2] == [f"normal/{i}" for i in held.tolist()]


@pytest.mark.parametrize(
    ("order", "step"),
    [(("wrong", "right", "opposite"), 2), (("right", "wrong"), 1), (("opposite", "right"), 2)],
)
def test_with_masks_the_pixel_auroc_chooses(order, step):
    lines = []
    choice = choose_step([FUNCTIONS[name] for name in order], lines)
    assert choice.options == {"epochs": step}
    assert choice.auroc == 1.0
    assert [line["step"] for line in lines] == list(range(1, len(order) + 1))
    assert {line["event"] for line in lines} == {"selection"}
    assert lines[step - 1]["synthetic_auroc"] == 1.0
    wrong = order.index("wrong") if "wrong" in order else None
    if wrong is not None:
        assert lines[wrong]["synthetic_image_auroc"] == 1.0 > lines[wrong]["synthetic_auroc"]
    assert [line["loss"] for line in lines] == [float(line["step"]) for line in lines]


def test_without_masks_the_image_auroc_chooses():
    functions = [FUNCTIONS["opposite"], FUNCTIONS["wrong"], FUNCTIONS["right"]]
    choice = choose_step(functions, [], masks=False)
    assert choice.options == {"epochs": 2}  # of equals the first
    assert choice.auroc == 1.0


def test_equal_pixel_aurocs_are_decided_by_the_image_auroc():
    # Half of the drawn pixels above all others and half below: pixel AUROC 0.5, image AUROC 1.
    def balanced(values):
        columns = torch.tensor([1.0, -1.0, 0.0, 0.0])
        return (values > 1) * columns

    choice = choose_step([torch.zeros_like, balanced, torch.zeros_like], [])
    assert (choice.auroc, choice.tie_break) == (0.5, 1.0)
    assert choice.options == {"epochs": 2}


def test_every_candidate_is_fitted_on_the_kept_normals_from_the_same_seed():
    fits, lines = [], []
    by_sigma = {1: ["opposite", "wrong"], 2: ["opposite", "right"], 3: ["wrong"]}
    choice = choose(
        lambda options: Stepper([FUNCTIONS[n] for n in by_sigma[options["sigma"]]], fits),
        [{"sigma": sigma} for sigma in by_sigma],
        make_validation(),
        seed=4,
        logs=[lambda **values: lines.append(values)],
    )
    assert choice.options == {"sigma": 2, "epochs": 2}
    assert [line["options"]["sigma"] for line in lines] == [1, 1, 2, 2, 3]
    assert len(fits) == 3
    assert len(set(fits)) == 1
    assert fits[0][0] == 8


def test_of_several_validation_sets_the_mean_chooses():
    """Alone the first would choose step 2 and the second step 1; both together step 3."""
    one = make_validation(masks=False)
    other = validation_set(
        bank_of([5 + i / 10 for i in range(10)]),
        *hold_out(10),
        bank_of([0.0, 0.0, 5.0, 9.0]),
        Scoring(),
    )
    both = joined_validation([one, other])
    assert len(both.kept) == 16
    assert joined_validation([one, None]) is None
    functions = [lambda v: -v, lambda v: v, lambda v: (v - 4).abs() * (v != 5.0) + 9 * (v == 5.0)]
    aurocs, lines, fits = {}, ([], []), []
    for name, validation in (("one", one), ("other", other), ("both", both)):
        logs = [lambda *, of=of, **values: of.append(values["synthetic_auroc"]) for of in lines]
        choice = choose(
            lambda _: Stepper(functions, fits),
            [{}],
            validation,
            seed=0,
            logs=logs[: len(validation.tests)],
        )
        aurocs[name] = choice.options["epochs"], choice.auroc
    means = [(a + b) / 2 for a, b in zip(lines[0][-3:], lines[1], strict=True)]
    assert aurocs["both"] == (means.index(max(means)) + 1, max(means))
    assert [count for count, _ in fits] == [8, 8, 16]
    assert len({step for step, _ in aurocs.values()}) > 1


class Untouched(TestSet):
    """A test set that counts how often it was scored."""

    def __init__(self):
        about = {"names": ["a", "b"], "kinds": ["good", "hole"], "scoring": Scoring()}
        super().__init__(bank_of([0.0, 1.0]), torch.tensor([0, 1]), **about)
        self.times = 0

    def score(self, detector, *, geometry=False):
        self.times += 1
        return super().score(detector, geometry=geometry)


def test_a_watched_test_set_is_logged_and_chooses_nothing():
    # By the test set's labels "opposite" is best; the pasted defects say otherwise.
    test = Untouched()
    test.labels = torch.tensor([1, 0])
    lines, choices = [], []
    for watched in ((), [test]):
        functions = [FUNCTIONS["opposite"], FUNCTIONS["right"]]
        choices.append(choose_step(functions, lines, watched=watched))
    assert choices[0] == choices[1]
    assert choices[0].options == {"epochs": 2}
    assert test.times == 2
    assert [line.get("test_image_auroc") for line in lines] == [None, None, 1.0, 0.0]
    assert math.isnan(lines[-1]["test_pixel_auroc"])
    assert not any(key.startswith("test_") for key in lines[0])


class AllAtOnce(Stepper):
    """The same, scored for all steps at once; that it is never watched is part of the test."""

    def fit(self, bank, *, generator, monitor=None):
        assert monitor is None
        super().fit(bank, generator=generator)

    def steps(self):
        return [{"loss": float(step)} for step in range(1, len(self.functions) + 1)]

    def score_steps(self, stages):
        (features,) = stages
        return torch.stack([function(features[:, 0]) for function in self.functions])


@pytest.mark.parametrize("watch", [False, True])
def test_steps_scored_at_once_choose_and_log_the_same(watch):
    watched = [Untouched()] if watch else []
    functions = [FUNCTIONS[name] for name in ("wrong", "opposite", "right", "wrong")]
    found = []
    for kind in (Stepper, AllAtOnce):
        lines = []
        choice = choose_step(functions, lines, kind=kind, watched=watched)
        found.append((choice, list(map(repr, lines))))
    assert found[0] == found[1]
    assert found[0][0].options == {"epochs": 3}


def test_maps_of_a_size_are_judged_at_every_second_row_and_column():
    normals = bank_of([i / 10 for i in range(10)])
    kept, held = hold_out(10)
    drawn = torch.zeros(4, 32, 32, dtype=torch.bool)
    drawn[:, 5:20, 4:11] = True
    validation = validation_set(normals, kept, held, bank_of([5.0] * 4), Scoring(32), drawn)
    (test,) = validation.tests
    scores = test.score(Stepper([FUNCTIONS["right"]]))
    assert scores.maps.shape == test.masks.shape == (6, 16, 16)
    assert torch.equal(test.masks[2:], drawn[:, ::2, ::2])


def test_the_grid_is_every_combination_in_order():
    points = parse_grid(["prototypes=1,8", "feature-norm=none,std", "norm=0.5"], NOCO_CF)
    assert points == [
        {"prototypes": p, "feature_norm": f, "norm": 0.5} for p in (1, 8) for f in ("none", "std")
    ]
    assert parse_grid([], NOCO_CF) == [{}]
    assert [type(value) for value in points[0].values()] == [int, str, float]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("prototypes", "OPTION=VALUE"),
        ("prototype=1", "'prototype=1' must be OPTION=VALUE,VALUE with an option of --method"),
        ("=1", "OPTION=VALUE"),
        ("to_json=1", "OPTION=VALUE|only numbers and words"),
        ("time=1,2", "only numbers and words"),
        ("sample_w0=true", "only numbers and words"),
        ("prototypes=one", "--grid 'prototypes=one'"),
        ("prototypes=1,", "--grid 'prototypes=1,'"),
        ("prototypes=1.5", "--grid 'prototypes=1.5'"),
        ("prototypes=0", "prototypes"),
        ("norm=-1", "norm"),
        ("feature_norm=l3", "l3 is none of none, l2, l2_per_layer, std"),
        ("loss=distance,cubed", "cubed is none of distance, squared"),
    ],
)
def test_a_bad_grid_is_refused(item, message):
    with pytest.raises(ValueError, match=message):
        parse_grid([item], NOCO_CF)


@pytest.mark.parametrize("items", [("norm=1,2", "norm=3"), ("norm=1,1",)])
def test_an_option_or_value_stands_once(items):
    with pytest.raises(ValueError, match="twice"):
        parse_grid(items, NOCO_CF)
