"""Rescaling of features before every detector."""

from typing import get_args, get_type_hints

import pytest
import torch

from configs.options import FeatureOptions
from models.building import build_detector
from models.detector import FeatureShape, HasObjective, KnowsSteps, LearnsOnline
from models.errors import ModelError
from models.features.feature_norm import FeatureNorm, normalised
from models.methods.knn import Knn, KnnOptions
from models.methods.noco import Noco, NocoOptions
from models.methods.noco_cf.noco_exact import NocoExact, NocoExactOptions
from tests.models.banks import Bank, Stages, draw_bank, fitted, seeded

STAGES = (2, 4)
FEATURE_NORMS = get_args(get_type_hints(FeatureOptions)["feature_norm"])


def closed(**options):
    return NocoExactOptions(**{"prototypes": 1, "time": (10.0,)} | options)


def lopsided():
    """Features whose channels have very different spreads, and none of them mean 0.

    Channels last, as banks give them: sums over channels of another layout round differently.
    """
    bank = draw_bank()
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0, 100.0, 1e-3])[:, None, None]
    features = (bank.features + 2) * scale
    return Bank(features.contiguous(memory_format=torch.channels_last))


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


@pytest.mark.parametrize("kind", FEATURE_NORMS[1:])
def test_the_head_sees_rescaled_features_in_fit_and_forward(kind):
    bank = lopsided()
    detector = build_detector("noco_exact", Stages(*STAGES), closed(feature_norm=kind))
    detector.fit(bank, generator=seeded())
    norm = FeatureNorm(kind, STAGES)
    norm.fit(bank)
    head = NocoExact(FeatureShape(STAGES), closed())
    head.fit(Bank(norm(bank.features)), generator=seeded())
    assert torch.equal(detector(bank.features), head(norm(bank.features)))
    plain = NocoExact(FeatureShape(STAGES), closed())
    plain.fit(bank, generator=seeded())
    assert not torch.allclose(plain(bank.features), detector(bank.features), rtol=0.01)


@pytest.mark.filterwarnings("ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning")
@pytest.mark.parametrize("method", ["noco", "simplenet"])  # which read stages, and features
def test_shuffled_training_reaches_the_bank(method):
    bank = lopsided()
    fitted(method, bank, epochs=2, feature_norm="l2")
    assert len(bank.orders) == 2  # one per epoch, drawn by the generator


@pytest.mark.filterwarnings("ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning")
def test_remarks_and_diagnostics_of_the_last_fit_are_the_heads():
    detector = fitted("knn", lopsided(), max_positions=9, feature_norm="l2")
    assert "the memory holds 9 of 200" in detector.remarks[0]
    few = Bank(lopsided().features[:1, :, :3, :3])
    detector.fit(few, generator=seeded())
    assert detector.remarks == []
    trained = fitted("simplenet", lopsided(), epochs=1, sigma=5.0, feature_norm="l2")
    assert set(trained.diagnostics) == {"feature_std", "adapted_std"}


ABILITIES = (LearnsOnline, KnowsSteps, HasObjective)


@pytest.mark.parametrize(
    ("kind", "options", "abilities"),
    [
        (Noco, NocoOptions(), {HasObjective}),
        (NocoExact, closed(), {LearnsOnline, KnowsSteps}),
        (Knn, KnnOptions(), set()),
    ],
)
def test_behind_a_norm_a_head_can_what_it_can(kind, options, abilities):
    head = kind(FeatureShape(STAGES), options)
    assert normalised(head, "none", STAGES) is head
    for detector in (head, normalised(head, "l2", STAGES)):
        assert {ability for ability in ABILITIES if isinstance(detector, ability)} == abilities


def test_online_learning_behind_a_norm_equals_fitting():
    bank = lopsided()
    whole, online = (
        build_detector("noco_exact", Stages(*STAGES), closed(feature_norm="l2")) for _ in range(2)
    )
    whole.fit(bank, generator=seeded())
    online.start(seeded())
    for image in bank.batches(1):
        online.partial_fit([image])
    online.solve()
    torch.testing.assert_close(online(bank.features), whole(bank.features), rtol=1e-5, atol=1e-6)


def test_std_cannot_be_learnt_online():
    detector = build_detector("noco_exact", Stages(*STAGES), closed(feature_norm="std"))
    with pytest.raises(ModelError, match="deviations are measured over all images") as caught:
        detector.start(seeded())
    assert caught.value.change == {"feature_norm": "l2 or none"}
