"""The closed form against training itself, against its formula, and against awkward data."""

import numpy as np
import pytest
import torch

from models.detector import FeatureShape
from models.errors import ModelError
from models.features import matmul as products
from models.features.feature_norm import normalised
from models.methods.noco_cf import noco_exact as module
from models.methods.noco_cf.noco_exact import NocoExact, NocoExactOptions
from tests.models.banks import Bank, as_positions, draw_bank, seeded

D = 6


def correlated(count, seed=0):
    """Positions (count, D), float64, of unequal variances and a mean that is not zero."""
    mixing = torch.randn(D, D, generator=seeded(99), dtype=torch.float64)
    mixing *= torch.logspace(0, -1, D, dtype=torch.float64)
    return torch.randn(count, D, generator=seeded(seed), dtype=torch.float64) @ mixing.T + 0.4


def as_maps(positions):
    return positions[:, :, None, None]  # (N, D, 1, 1)


def extended(positions):
    return torch.nn.functional.pad(positions, (0, 1), value=1.0)


def closed_form(channels, **options):
    """An unfitted detector, of one centre and one time if nothing is said."""
    options = NocoExactOptions(**{"prototypes": 1, "time": (1e4,)} | options)
    return NocoExact(FeatureShape((channels,)), options)


def made(**options):
    """One whose time leaves something of every direction to compare."""
    return closed_form(D, **{"time": (10.0,)} | options)


def fitted(positions, *, seed=0, **options):
    """A detector in float64, so that only the mathematics is compared."""
    detector = closed_form(positions.shape[1], **options).double()
    detector.fit(Bank(as_maps(positions)), generator=seeded(seed))
    return detector


def initial_pair(positions, norm):
    """(W0, G) that a seed draws, told apart by the only thing that norm may change."""
    one, two = (fitted(positions, sample_w0=True, norm=n)._initial for n in (1.0, 2.0))
    torch.testing.assert_close(one[:, :-1], two[:, :-1])
    direction = (one - two)[:, -1]
    assert direction.norm() == pytest.approx(1.0)
    weight = fitted(positions, sample_w0=True, norm=norm)._initial.clone()
    weight[:, -1] += norm * direction
    assert weight.abs().max() <= D**-0.5
    return weight, norm * direction


def train(weight, objective, positions, step, num_steps):
    """Full-batch gradient descent on the mean of ||W f~ - G||^2; a projector with bias."""
    weight, bias = weight[:, :-1].clone(), weight[:, -1].clone()
    rows = positions.clone()
    for _ in range(num_steps):
        residual = rows @ weight.T + bias - objective  # (N, D)
        weight -= step * 2 / len(rows) * residual.T @ rows
        bias -= step * 2 * residual.mean(dim=0)
    return torch.cat([weight, bias[:, None]], dim=1)


def second_moment(positions):
    rows = extended(positions)
    return (rows.T @ rows / len(rows)).numpy()


def exponential(moment, s):
    values, vectors = np.linalg.eigh(moment)
    return vectors @ np.diag(np.exp(-s * values)) @ vectors.T


@pytest.mark.parametrize("norm", [0.5, 1.0, 4.0])
def test_equals_gradient_descent_at_the_matching_time(norm):
    positions, probes = correlated(20), torch.cat([correlated(5), 3 * correlated(5, seed=7)])
    weight, objective = initial_pair(positions, norm)
    trace = second_moment(positions).trace()
    step, seen = 5e-4 / trace, 0
    for num_steps in (300, 3000, 12000):
        weight = train(weight, objective, positions, step, num_steps - seen)
        seen = num_steps
        time = 2 * step * num_steps * trace
        trained = extended(probes) @ weight.T - objective  # (N, D)
        closed = fitted(positions, sample_w0=True, norm=norm, time=(time,), loss="squared")
        solved = extended(probes) @ closed.filters[0].T
        error = (trained - solved).norm() / trained.norm()
        assert error < 1e-3, (norm, time)
        # The time is not one at which any solution would do.
        earlier = fitted(positions, sample_w0=True, norm=norm, time=(0.8 * time,))
        assert (trained - extended(probes) @ earlier.filters[0].T).norm() > 1e-2 * trained.norm()
        # And the score is that residual's squared length.
        score = closed(as_maps(probes)).flatten()
        torch.testing.assert_close(score, trained.square().sum(dim=1), rtol=5e-3, atol=1e-9)


def test_expectation_is_the_mean_over_sampled_detectors():
    positions, probes = correlated(20), 2 * correlated(4, seed=3)
    options = {"time": (30.0,), "loss": "squared", "norm": 2.0}
    scores = torch.stack(
        [
            fitted(positions, sample_w0=True, seed=seed, **options)(as_maps(probes)).flatten()
            for seed in range(300)
        ]
    )
    expected = fitted(positions, **options)(as_maps(probes)).flatten()
    deviation = (scores.mean(dim=0) - expected).abs()
    assert (deviation < 4.5 * scores.std(dim=0) / 300**0.5).all()


@pytest.mark.parametrize("count", [40, 4])  # 4 positions leave C singular
@pytest.mark.parametrize("norm", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("time", [1e-2, 10.0, 1e4])
def test_expectation_equals_the_formula(count, norm, time):
    positions, probes = correlated(count), correlated(10, seed=5)
    moment = second_moment(positions)
    s = time / moment.trace()
    values, vectors = np.linalg.eigh(moment)
    identity = np.eye(D + 1)
    inverse = np.linalg.pinv(moment, rcond=1e-10, hermitian=True)
    beta = inverse @ (identity - exponential(moment, s)) @ moment[:, -1]
    rows = extended(probes).numpy()
    first = (1 / 3 * np.exp(-2 * values * s) * np.square(rows @ vectors)).sum(axis=1)
    formula = first + norm**2 * np.square(rows @ beta - 1)
    detector = fitted(positions, norm=norm, time=(time,), loss="squared")
    scores = detector(as_maps(probes)).flatten().numpy()
    np.testing.assert_allclose(scores, formula, rtol=1e-6)
    distance = fitted(positions, norm=norm, time=(time,))(as_maps(probes)).flatten().numpy()
    np.testing.assert_allclose(distance, np.sqrt(formula), rtol=1e-6)
    single = closed_form(D, norm=norm, time=(time,), loss="squared")
    single.fit(Bank(as_maps(positions).float()), generator=seeded())
    maps = single(as_maps(probes).float()).flatten()
    np.testing.assert_allclose(maps.numpy(), formula, rtol=1e-3)


def test_one_image_at_a_time_equals_one_pass():
    bank = draw_bank(count=9)
    whole, online = made(time=(10.0, 100.0)), made(time=(10.0, 100.0))
    whole.fit(bank, generator=seeded())
    online.start(seeded())
    for row in torch.randperm(9, generator=seeded(4)):
        online.partial_fit([bank.features[row : row + 1]])
        online.solve()
        assert torch.isfinite(online(bank.features)).all()
    torch.testing.assert_close(online._sums, whole._sums, rtol=1e-10, atol=1e-10)
    assert torch.equal(online._counts, whole._counts)
    torch.testing.assert_close(online(bank.features), whole(bank.features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [255, 256, 600])  # around and beyond one block of the sums
def test_the_second_moment_is_whole_for_many_channels(channels):
    bank = draw_bank(count=3, channels=channels, side=3)
    detector = closed_form(channels)
    detector.fit(bank, generator=seeded())
    rows = extended(as_positions(bank.features).double())
    moment = rows.T @ rows / len(rows)
    values, vectors = detector.decompose()
    rebuilt = vectors[0] @ torch.diag(values[0]) @ vectors[0].T * moment.trace()
    torch.testing.assert_close(rebuilt, moment, rtol=1e-9, atol=1e-9)


AWKWARD = {
    "fewer positions than channels": draw_bank(count=2, channels=20, side=2),
    "single position": draw_bank(count=1, side=1),
    "single image": draw_bank(count=1),
    "constant channel": Bank(
        draw_bank().features * torch.tensor([1.0, 1, 0, 1, 1, 0])[:, None, None] + 2
    ),
    "zero features": Bank(torch.zeros(3, D, 2, 2)),
    "large features": Bank(draw_bank().features * 1e4),
}


@pytest.mark.filterwarnings("ignore:.*distinct clusters")
@pytest.mark.parametrize("bank", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("sample_w0", [False, True])
@pytest.mark.parametrize("prototypes", [1, 3])
def test_awkward_data_give_finite_maps(bank, sample_w0, prototypes):
    N, _, H, W = bank.features.shape
    detector = closed_form(bank.channels, time=(1e8,), prototypes=prototypes, sample_w0=sample_w0)
    if prototypes > N * H * W:
        message = f"3 prototypes need as many normal features; there are {N * H * W}"
        with pytest.raises(ModelError, match=message) as caught:
            detector.fit(bank, generator=seeded())
        assert caught.value.change == {"prototypes": "lower"}
        return
    detector.fit(bank, generator=seeded())
    assert torch.isfinite(detector(bank.features)).all()
    anomaly = detector(bank.features + torch.linspace(1, 3, bank.channels)[:, None, None])
    assert torch.isfinite(anomaly).all()


@pytest.mark.parametrize("nearest", [1, 3, 5])
def test_prototypes_score_by_the_smallest_over_the_nearest(nearest):
    bank = draw_bank()
    detector = made(prototypes=5, nearest=nearest, time=(10.0,), loss="squared")
    detector.fit(bank, generator=seeded())
    probes = draw_bank(count=3, seed=6).features * 2
    maps = detector(probes)
    assert maps.shape == (3, 5, 5)
    for (b, y, x), score in np.ndenumerate(maps.numpy()):
        offsets = probes[b, :, y, x] - detector.centres  # (K, D)
        energies = (detector.filters @ extended(offsets)[:, :, None]).square().sum(dim=(1, 2))
        near = offsets.norm(dim=1).argsort()[:nearest]
        assert score == pytest.approx(energies[near].min().item(), rel=1e-3)
    # Every centre is the mean of the features nearest to it, and all features are counted once.
    assert detector._counts.sum() == 8 * 25
    owner = torch.cdist(as_positions(bank.features), detector.centres).argmin(dim=1)
    assert torch.bincount(owner, minlength=5).tolist() == detector._counts.tolist()


@pytest.mark.parametrize("prototypes", [1, 5])
def test_neither_parts_nor_the_way_products_are_made_change_scores(prototypes, monkeypatch):
    probes = [draw_bank(count=3, seed=6).features]

    def scores():
        detector = made(prototypes=prototypes)
        detector.fit(draw_bank(), generator=seeded())
        return detector.score_stages(probes)[0]

    expected = scores()
    monkeypatch.setattr(module, "FEW_CHANNELS", 1)
    monkeypatch.setattr(module, "MANY_CHANNELS", 1)
    monkeypatch.setattr(products, "FEW_ROWS", 1)
    torch.testing.assert_close(scores(), expected, rtol=1e-5, atol=1e-6)


def test_second_moments_about_centres_lose_less_than_stored_halves_do():
    """On as many positions as a batch has, of directions from 1 down to 1e-10 of the variance."""
    generator = seeded(8)
    mixing = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    mixing *= torch.logspace(0, -5, 32)
    features = torch.randn(30, 32, 28, 28, generator=generator).movedim(1, 3) @ mixing.T
    detector = closed_form(32, time=(1e4,), prototypes=3)
    detector.fit(Bank(features.movedim(3, 1)), generator=seeded())

    positions, centres = features.flatten(0, 2), detector.centres
    owner = torch.cdist(positions, centres).argmin(dim=1)
    for k, centre in enumerate(centres.double()):
        rows = extended(positions[owner == k].double() - centre)
        halves = extended(positions[owner == k].half().double() - centre)
        moment = (rows.T @ rows).triu()
        lost, by_halves = (
            (found.triu() - moment).abs().max() / moment.trace()
            for found in (detector._sums[k], halves.T @ halves)
        )
        assert lost < 1e-7
        assert lost < by_halves / 10
        assert detector._counts[k] == len(rows)


def test_prototypes_find_what_lies_between_the_groups():
    groups = torch.where(torch.arange(8)[:, None, None, None] % 2 == 0, 5.0, -5.0)
    bank = Bank(draw_bank(count=8).features * 0.3 + groups)
    between = torch.zeros(1, D, 1, 1)

    def contrast(prototypes):
        detector = made(prototypes=prototypes, time=(100.0,))
        detector.fit(bank, generator=seeded())
        return (detector(between) / detector(bank.features).max()).item()

    assert contrast(2) > 2 > contrast(1)


@pytest.mark.parametrize(("prototypes", "passes"), [(1, 1), (4, 2)])
def test_a_stream_is_enough(prototypes, passes):
    bank = draw_bank()
    made(prototypes=prototypes).fit(bank, generator=seeded())
    assert bank.passes == passes
    assert bank.orders == []


@pytest.mark.parametrize("time", [(), (10.0, 1.0), (10.0, 10.0), (0.0,), (-1.0, 2.0)])
def test_times_must_ascend(time):
    with pytest.raises(ValueError, match=r"--method\.time .* must be ascending and above 0"):
        NocoExactOptions(time=time)


def test_solving_before_any_image_is_refused():
    detector = made()
    for start in (lambda: None, lambda: detector.start(seeded())):
        start()
        with pytest.raises(ModelError, match="fit first"):
            detector.solve()


def test_prototypes_do_not_learn_online():
    with pytest.raises(ModelError, match="centres of all features at once") as caught:
        made(prototypes=2).start(seeded())
    assert caught.value.change == {"prototypes": "1"}


@pytest.mark.parametrize(
    ("options", "learns"),
    [
        ({"prototypes": 1}, True),
        ({"prototypes": 1, "feature_norm": "l2"}, True),
        ({"prototypes": 1, "feature_norm": "std"}, False),
        ({"prototypes": 2}, False),
    ],
)
def test_options_tell_whether_a_detector_learns_online(options, learns):
    assert NocoExactOptions(**options).learns_online is learns


@pytest.mark.parametrize("prototypes", [1, 3])
@pytest.mark.parametrize("loss", ["distance", "squared"])
@pytest.mark.parametrize("feature_norm", ["none", "std"])
def test_all_times_at_once_score_as_one_after_the_other(prototypes, loss, feature_norm):
    times = (1.0, 30.0, 1e3, 1e5)
    head = made(time=times, prototypes=prototypes, loss=loss, norm=2.0)
    detector = normalised(head, feature_norm, (D,))
    features = as_maps(correlated(40, seed=5)).float()
    one_by_one, steps = [], []

    def monitor(step, values):
        steps.append(values)
        one_by_one.append(detector(features))

    detector.fit(Bank(as_maps(correlated(300).float())), generator=seeded(0), monitor=monitor)
    at_once = detector.score_steps([features])
    assert detector.steps() == steps == [{"time": time} for time in times]
    assert at_once.shape == (4, 40, 1, 1)
    torch.testing.assert_close(at_once, torch.stack(one_by_one), rtol=2e-4, atol=1e-6)
    assert not torch.allclose(at_once[0], at_once[1], rtol=1e-2)
    assert made(sample_w0=True, time=times).steps() == []  # those have no common projection
