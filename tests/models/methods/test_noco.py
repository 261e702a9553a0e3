import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from models.building import build_detector
from models.detector import FeatureShape
from models.methods.noco import Noco, NocoOptions
from tests.models.banks import Bank, Stages, draw_bank, monitoring, seeded


def noco(channels, **options):
    return Noco(FeatureShape((channels,)), NocoOptions(**options))


def fitted(bank, seed=0, **options):
    detector = noco(bank.channels, **{"epochs": 3, "batch_size": 4, **options})
    detector.fit(bank, generator=seeded(seed))
    return detector


@pytest.mark.parametrize(("channels", "expected"), [(1792, 3_213_056), (2048, 4_196_352)])
def test_projector_has_the_papers_size(channels, expected):
    detector = noco(channels)
    projector = sum(p.numel() for name, p in detector.named_parameters() if name != "radius")
    assert projector == expected
    assert detector.num_trainable == expected + 1  # the radius


def test_out_dim_narrows_the_projector():
    detector = noco(8, out_dim=3)
    assert detector.num_trainable == 8 * 3 + 3 + 1
    assert detector.objective.shape == (3,)
    assert detector(torch.zeros(2, 8, 5, 4)).shape == (2, 5, 4)


@pytest.mark.parametrize("norm", [0.5, 1.0, 4.0, 32.0, 1e-3])
@pytest.mark.parametrize("kind", ["randn", "rand", "ones", "mean"])
def test_norm_of_the_objective_is_exact(kind, norm):
    for out_dim in (None, 5):
        detector = noco(96, objective=kind, norm=norm, out_dim=out_dim)
        detector.initialise(draw_bank(channels=96), seeded())
        assert detector.objective.double().norm().item() == pytest.approx(norm, rel=1e-6)


def test_objectives_are_the_kinds_they_are_called():
    found = {}
    for kind in ("randn", "rand", "ones"):
        detector = noco(2000, objective=kind)
        detector.initialise(draw_bank(2, 2000, 1), seeded())
        found[kind] = detector.objective * math.sqrt(2000)  # mean square 1
    assert (found["ones"] == found["ones"][0]).all()
    assert found["rand"].min() >= 0
    # The mean square of U(0, 1) is 1/3, its mean 1/2.
    assert found["rand"].mean().item() == pytest.approx(0.5 * math.sqrt(3), abs=0.03)
    assert found["randn"].mean().item() == pytest.approx(0, abs=0.1)
    assert (found["randn"].abs() < 1).float().mean().item() == pytest.approx(0.683, abs=0.04)


def test_mean_objective_points_along_the_mean_projection():
    bank = draw_bank(count=7, channels=9, side=2)
    bank.features += 3 * torch.arange(9.0)[:, None, None]
    detector = noco(9, objective="mean", norm=2.0, batch_size=4)  # 4 and 3 images
    detector.initialise(bank, seeded())
    positions = bank.features.permute(0, 2, 3, 1).reshape(-1, 9)  # (28, 9)
    mean = detector.projector(positions).mean(dim=0)
    expected = 2 * mean / mean.norm()
    torch.testing.assert_close(detector.objective, expected.detach(), rtol=1e-5, atol=1e-6)


def test_projector_starts_as_pytorch_starts_a_1x1_convolution():
    detector, other = noco(400), noco(400)
    detector.initialise(draw_bank(2, 400, 1), seeded())
    other.initialise(draw_bank(2, 400, 1), seeded(6))
    bound = 1 / math.sqrt(400)
    for tensor in (detector.projector.weight, detector.projector.bias):
        assert 0.98 * bound < tensor.abs().max().item() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert detector.radius.item() == pytest.approx(1e-5)
    for name in ("projector.weight", "projector.bias", "objective"):
        assert not torch.equal(detector.state_dict()[name], other.state_dict()[name]), name


def noco_of_identity(channels, **options):
    """Projector = identity, G along the first axis."""
    detector = noco(channels, **options)
    with torch.no_grad():
        detector.projector.weight.copy_(torch.eye(channels))
        detector.projector.bias.zero_()
        detector.objective.copy_(detector.options.norm * torch.eye(channels)[0])
    return detector


BY_HAND = {"nu": 0.5, "radius_weight": 0.25, "radius_init": 2.0}
# (1, 0) and (4, 4) lie 0 and 5 from G.
FEATURES = torch.tensor([[1.0, 4.0], [0.0, 4.0]]).reshape(1, 2, 1, 2)


def test_distance_loss_by_hand():
    detector = noco_of_identity(2, loss="distance", **BY_HAND)
    assert detector(FEATURES).tolist() == [[[0.0, 5.0]]]
    # Excess over r^2 = 4: none and 1, on average 0.5; divided by nu 1, and 0.25 r = 0.5 more.
    loss = detector.loss([FEATURES])
    assert loss.item() == pytest.approx(1.5)
    loss.backward()
    # One of two positions exceeds r^2: -2 r / 2 / nu + radius_weight.
    assert detector.radius.grad.item() == pytest.approx(-2 * 2 / 2 / 0.5 + 0.25)


def test_squared_loss_by_hand():
    detector = noco_of_identity(2, loss="squared", **BY_HAND)
    assert detector(FEATURES).tolist() == [[[0.0, 25.0]]]
    # Excess over r^2 = 4: none and 21, on average 10.5; divided by nu 21, and 0.5 more.
    loss = detector.loss([FEATURES])
    assert loss.item() == pytest.approx(21.5)
    loss.backward()
    # d |Z - G|^2 / d bias = 2 (Z - G) = (6, 8) at the one position that counts.
    assert detector.projector.bias.grad.tolist() == pytest.approx([6.0, 8.0])


@pytest.mark.parametrize("kind", ["randn", "mean"])
def test_fit_moves_projector_and_radius_and_never_the_objective(kind):
    bank = draw_bank()
    start = noco(6, objective=kind)
    start.initialise(bank, seeded())
    detector = noco(6, objective=kind, epochs=4, batch_size=4, learning_rate=1e-2)

    @monitoring
    def monitor(_, values):
        assert torch.equal(detector.objective, start.objective)
        assert set(values) == {"loss", "radius"}

    detector.fit(bank, generator=seeded(), monitor=monitor)
    assert not torch.equal(detector.projector.weight, start.projector.weight)
    assert not torch.equal(detector.projector.bias, start.projector.bias)
    assert detector.radius.item() != start.radius.item()
    with torch.no_grad():
        assert detector.loss([bank.features]) < start.loss([bank.features])


def angled(count, direction, length, seed):
    """Features (count, 8, 2, 2) of a length, about a direction."""
    noise = 0.05 * torch.randn(count, 8, 2, 2, generator=seeded(seed))
    return length * direction.reshape(8, 1, 1) + noise


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "distance", "learning_rate": 1e-2},
        {"loss": "squared", "nu": 1.0, "learning_rate": 1e-2},
        {"loss": "distance", "learning_rate": 1e-2, "objective": "ones", "norm": 2.0},
    ],
)
def test_training_separates_what_the_untrained_head_does_not(options):
    """Anomalies have shorter features: an untrained projector ranks them the wrong way."""
    normal, anomalous = torch.eye(8)[0], torch.eye(8)[1]
    bank = Bank(angled(32, normal, 4.0, seed=1))
    test = torch.cat([angled(20, normal, 4.0, seed=2), angled(20, anomalous, 1.0, seed=3)])
    labels = [0] * 20 + [1] * 20

    def auroc(detector):
        with torch.no_grad():
            return roc_auc_score(labels, detector(test).amax(dim=(1, 2)))

    untrained = noco(8, **options)
    untrained.initialise(bank, seeded())
    assert auroc(untrained) < 0.5
    assert auroc(fitted(bank, epochs=30, batch_size=8, **options)) > 0.9


def test_weight_decay_and_amsgrad_reach_the_optimizer(monkeypatch):
    seen = {}
    adamw = torch.optim.AdamW

    def recorded(parameters, **options):
        seen.update(options)
        return adamw(parameters, **options)

    monkeypatch.setattr(torch.optim, "AdamW", recorded)
    fitted(draw_bank(), learning_rate=3e-4, weight_decay=0.25, amsgrad=False)
    assert seen == {"lr": 3e-4, "weight_decay": 0.25, "amsgrad": False}


def test_each_epoch_sees_every_image_once_in_another_order(monkeypatch):
    bank = Bank(torch.arange(10.0)[:, None, None, None].expand(10, 6, 2, 2).contiguous())
    seen, sizes = [], []
    loss = Noco.loss

    def recorded(self, stages):
        seen.extend(stages[0][:, 0, 0, 0].tolist())
        sizes.append(len(stages[0]))
        return loss(self, stages)

    monkeypatch.setattr(Noco, "loss", recorded)
    fitted(bank, epochs=2, batch_size=4, seed=1)
    assert sizes == [4, 4, 2] * 2
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)


class Poisoned(Bank):
    """The third batch of the second pass holds an infinity; nothing is shuffled."""

    def batches(self, batch_size, *, generator=None):
        del generator
        for number, features in enumerate(super().batches(batch_size), start=1):
            yield features * math.inf if (self.passes, number) == (2, 3) else features


def test_loss_that_is_not_finite_names_epoch_and_step():
    bank = Poisoned(draw_bank(count=16).features)
    steps = []
    detector = noco(6, epochs=4, batch_size=4)
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at epoch 2, step 3"):
        detector.fit(
            bank, generator=seeded(), monitor=monitoring(lambda step, _: steps.append(step))
        )
    assert steps == [1]


def test_geometry_is_norm_and_angle_where_the_map_is_highest():
    """By hand: the projector is the identity, so Z is the feature itself."""
    detector = noco_of_identity(3, norm=2.0)
    goal, opposite, across = [2.0, 0, 0], [-1.0, 0, 0], [0, 5.0, 0]
    slanted = [3.0, 4.0, 0]  # cosine 3 / 5
    features = torch.tensor([goal, opposite, across, slanted])[:, :, None, None]  # (4, 3, 1, 1)
    norms, angles = detector.geometry([features], detector(features))
    assert norms.tolist() == pytest.approx([2, 1, 5, 5])
    assert angles.tolist() == pytest.approx([0, math.pi, math.pi / 2, math.acos(0.6)])
    # On a grid the highest position counts: here `across`, which lies farther from G than others.
    grid = torch.tensor([goal, slanted, across, goal]).T.reshape(1, 3, 2, 2)
    norms, angles = detector.geometry([grid], detector(grid))
    assert (norms.item(), angles.item()) == pytest.approx((5, math.pi / 2))
    norms, angles = detector.geometry([grid], torch.tensor([[[0.0, 1], [0, 0]]]))
    assert angles.item() == pytest.approx(math.acos(0.6))


def test_small_angles_keep_their_digits():
    """The arc cosine of a float32 knows nothing below 3e-4."""
    detector = noco_of_identity(2)
    features = torch.tensor([[7.0, 7e-6]])[:, :, None, None]
    _, angles = detector.geometry([features], detector(features))
    assert angles.item() == pytest.approx(1e-6, rel=1e-4)


def test_distance_follows_from_norm_and_angle_of_a_fit():
    """The law of cosines, on trained weights, for both losses and behind a feature norm."""
    bank = draw_bank()
    options = {"norm": 3.0, "epochs": 2}
    for loss, feature_norm in (("distance", "none"), ("squared", "l2"), ("distance", "std")):
        detector = build_detector(
            "noco", Stages(2, 4), NocoOptions(loss=loss, feature_norm=feature_norm, **options)
        )
        detector.fit(bank, generator=seeded())
        with torch.inference_mode():
            maps = detector(bank.features)
            norms, angles = detector.geometry([bank.features], maps)
        assert norms.shape == angles.shape == (len(bank),)
        squared = norms**2 + 9 - 6 * norms * angles.cos()
        highest = maps.amax(dim=(1, 2))
        torch.testing.assert_close(squared.sqrt() if loss == "distance" else squared, highest)
