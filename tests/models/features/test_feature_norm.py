"""Rescaling of features before every detector, and how a detector is built from options."""

import pytest
import torch

from models import DETECTORS, build_detector
from models.errors import ModelError
from models.features.feature_norm import FEATURE_NORMS, FeatureNorm, NormalisedDetector
from models.methods.noco import Noco
from models.methods.noco_cf import ClosedFormNoco
from models.methods.simplenet.simplenet import SimpleNet
from tests.models.banks import Bank, Stages, draw_bank, seeded

STAGES = (2, 4)
CLOSED = {"solver": "closed_form", "time": (10.0,)}


def lopsided():
    """Features whose channels have very different spreads, and none of them mean 0."""
    bank = draw_bank()
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0, 100.0, 1e-3])[:, None, None]
    return Bank((bank.features + 2) * scale)


def test_l2_gives_unit_length_at_each_position():
    features = lopsided().features
    result = FeatureNorm("l2", STAGES)(features)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(8, 5, 5))
    torch.testing.assert_close(result * features.norm(dim=1, keepdim=True), features)


def test_l2_per_layer_gives_unit_length_to_each_stage():
    features = lopsided().features
    result = FeatureNorm("l2_per_layer", STAGES)(features)
    for part, before in zip(
        result.split(STAGES, dim=1), features.split(STAGES, dim=1), strict=True
    ):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(8, 5, 5))
        torch.testing.assert_close(part * before.norm(dim=1, keepdim=True), before)


@pytest.mark.parametrize("kind", FEATURE_NORMS)
def test_zero_features_stay_finite(kind):
    bank = Bank(torch.zeros(2, 6, 3, 3))
    norm = FeatureNorm(kind, STAGES)
    norm.fit(bank)
    assert torch.equal(norm(bank.features), bank.features)


def test_std_divides_each_channel_by_its_standard_deviation():
    bank = lopsided()
    norm = FeatureNorm("std", STAGES)
    norm.fit(bank)
    std = bank.features.double().std(dim=(0, 2, 3), correction=0)
    expected = bank.features / std[:, None, None].float()
    torch.testing.assert_close(norm(bank.features), expected)


@pytest.mark.parametrize("constant", [0.0, 7.3, 1e4, 1e-6])
def test_std_leaves_a_constant_channel_as_it_is(constant):
    bank = lopsided()
    bank.features[:, 3] = constant
    norm = FeatureNorm("std", STAGES)
    norm.fit(bank)
    assert torch.equal(norm(bank.features)[:, 3], bank.features[:, 3])
    assert torch.isfinite(norm(bank.features)).all()


def test_none_and_unfitted_std_change_nothing():
    features = lopsided().features
    assert FeatureNorm("none", STAGES)(features) is features
    assert torch.equal(FeatureNorm("std", STAGES)(features), features)


def test_unknown_kind_is_refused():
    with pytest.raises(ModelError, match="'l3' is not one of none, l2, l2_per_layer, std"):
        FeatureNorm("l3", STAGES)


@pytest.mark.parametrize("kind", FEATURE_NORMS[1:])
def test_the_head_sees_rescaled_features_in_fit_and_forward(kind):
    bank = lopsided()
    detector = build_detector("noco", Stages(*STAGES), {**CLOSED, "feature_norm": kind})
    detector.fit(bank, generator=seeded())
    norm = FeatureNorm(kind, STAGES)
    norm.fit(bank)
    head = ClosedFormNoco(6, time=(10.0,))
    head.fit(Bank(norm(bank.features)), generator=seeded())
    assert torch.equal(detector(bank.features), head(norm(bank.features)))
    plain = ClosedFormNoco(6, time=(10.0,))
    plain.fit(bank, generator=seeded())
    assert not torch.allclose(plain(bank.features), detector(bank.features), rtol=0.01)


def test_shuffled_training_reaches_the_bank():
    bank = lopsided()
    options = {"epochs": 2, "feature_norm": "l2"}
    build_detector("noco", Stages(*STAGES), options).fit(bank, generator=seeded())
    assert len(bank.orders) == 2  # one per epoch, drawn by the generator


def test_build_detector_chooses_by_method_solver_and_norm():
    for method in ("noco", "noco_cf"):
        assert type(build_detector(method, Stages(*STAGES), {})) is Noco
        assert type(build_detector(method, Stages(*STAGES), CLOSED)) is ClosedFormNoco
    plain = build_detector("simplenet", Stages(*STAGES), {"feature_norm": "none"})
    assert type(plain) is SimpleNet
    wrapped = build_detector("noco", Stages(*STAGES), {**CLOSED, "feature_norm": "std"})
    assert isinstance(wrapped, NormalisedDetector)
    assert isinstance(wrapped.head, ClosedFormNoco)
    assert wrapped.feature_norm.kind == "std"


def test_each_solver_takes_its_own_options():
    options = {"norm": 4.0, "epochs": 3, "time": (5.0,), "prototypes": 2}
    trained = build_detector("noco", Stages(*STAGES), options)
    assert (trained.norm, trained.epochs) == (4.0, 3)
    solved = build_detector("noco", Stages(*STAGES), {**options, "solver": "closed_form"})
    assert (solved.norm, solved.times, len(solved.centres)) == (4.0, (5.0,), 2)


@pytest.mark.parametrize("method", DETECTORS)
def test_options_that_nobody_has_are_refused(method):
    with pytest.raises(TypeError, match=f"{method} has no option channels_, epochz"):
        build_detector(method, Stages(*STAGES), {"epochz": 3, "channels_": 4})


@pytest.mark.parametrize("kind", FEATURE_NORMS)
def test_state_round_trip(kind):
    bank = lopsided()
    options = {**CLOSED, "feature_norm": kind}
    detector = build_detector("noco_cf", Stages(*STAGES), options)
    detector.fit(bank, generator=seeded())
    fresh = build_detector("noco_cf", Stages(*STAGES), options)
    fresh.load_state_dict(detector.state_dict())
    assert torch.equal(fresh(bank.features), detector(bank.features))


def test_a_wrapped_detector_passes_on_what_is_asked_of_it():
    bank, steps = lopsided(), []
    detector = build_detector(
        "noco", Stages(*STAGES), {**CLOSED, "time": (1.0, 5.0), "feature_norm": "l2"}
    )
    detector.fit(bank, generator=seeded(), monitor=lambda *seen: steps.append(seen))
    assert steps == [(1, {"time": 1.0}), (2, {"time": 5.0})]
    assert detector.stopped_at(1) == {"time": (1.0,)}
    assert detector.diagnostics() == detector.head.diagnostics()
    detector.head.remarks = ["said"]
    assert detector.remarks == ["said"]


def test_online_learning_behind_a_norm_equals_fitting():
    bank = lopsided()
    whole, online = (
        build_detector("noco", Stages(*STAGES), {**CLOSED, "feature_norm": "l2"}) for _ in range(2)
    )
    whole.fit(bank, generator=seeded())
    online.start(seeded())
    for image in bank.batches(1):
        online.partial_fit([image])
    online.solve()
    torch.testing.assert_close(online(bank.features), whole(bank.features), rtol=1e-5, atol=1e-6)


def test_std_cannot_be_learnt_online():
    detector = build_detector("noco", Stages(*STAGES), {**CLOSED, "feature_norm": "std"})
    with pytest.raises(ModelError, match="std is measured over all images"):
        detector.start(seeded())


@pytest.mark.parametrize("method", ["noco", "simplenet"])
def test_trained_detectors_refuse_online_learning(method):
    detector = build_detector(method, Stages(*STAGES), {})
    with pytest.raises(ModelError, match=r"--method\.solver closed_form"):
        detector.start(seeded())
    with pytest.raises(ModelError, match="cannot learn online"):
        detector.partial_fit([lopsided().features])
