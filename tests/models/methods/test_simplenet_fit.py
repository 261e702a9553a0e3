import contextlib
import copy
import math
import warnings

import pytest
import torch

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.simplenet.noise import GaussianNoise
from models.methods.simplenet.simplenet import (
    SimpleNet,
    SimpleNetOptions,
    TrivialSolutionWarning,
)
from tests.models.banks import Bank, as_positions, draw_bank, seeded, told

# Most heads here are trained for three epochs on noise, about which they remark.
pytestmark = pytest.mark.filterwarnings(
    "ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning"
)


def made(channels, **options):
    return SimpleNet(FeatureShape((channels,)), SimpleNetOptions(**options))


def fitted(bank, seed=0, **options):
    options = {"epochs": 3, "sigma": 1.0, "learning_rate": 1e-2, **options}
    detector = made(bank.channels, **options)
    detector.fit(bank, generator=seeded(seed))
    return detector


@pytest.mark.parametrize("options", [{}, {"adaptor_optimizer": "adamw"}, {"adaptor": "mlp"}])
def test_training_moves_every_parameter(options):
    bank = draw_bank()
    before = made(6, **options)
    before.initialise(seeded())
    after = fitted(bank, **options)
    for name, value in before.named_parameters():
        if name != "discriminator.first.bias":  # the normalisation takes it away again
            assert not torch.equal(value, dict(after.named_parameters())[name]), name


def test_learning_rates_go_to_their_parts():
    bank = draw_bank()
    start = made(6)
    start.initialise(seeded())
    still = fitted(bank, adaptor_learning_rate=1e-30, adaptor_weight_decay=0.0)
    torch.testing.assert_close(still.adaptor.state_dict(), start.adaptor.state_dict())
    assert not torch.equal(still.discriminator.last.weight, start.discriminator.last.weight)
    still = fitted(bank, learning_rate=1e-30, weight_decay=0.0)
    torch.testing.assert_close(still.discriminator.last.weight, start.discriminator.last.weight)
    assert not torch.equal(still.adaptor.layers[0].weight, start.adaptor.layers[0].weight)


def test_monitor_reports_the_steps_means():
    bank = draw_bank(count=8)
    detector = made(6, epochs=2, batch_size=4, sigma=1.0)
    steps, answer = [], detector.logits

    def watched(*given):
        both = answer(*given)
        steps.append(torch.stack([detector.loss(*both), *(part.mean() for part in both)]).detach())
        return both

    detector.logits = watched
    for epoch, report in enumerate(told(detector, bank)):
        assert list(report) == ["loss", "normal_logit", "noisy_logit"]
        mean = torch.stack(steps[2 * epoch : 2 * epoch + 2]).mean(dim=0)
        torch.testing.assert_close(torch.tensor(list(report.values())), mean)
        hand = max(0.5 - report["normal_logit"], 0) + max(0.5 + report["noisy_logit"], 0)
        assert report["loss"] >= hand - 1e-6  # Jensen: equal where nothing is truncated
    assert detector.discriminator.normalisation.num_batches_tracked == 2 * 2  # it did train


def test_report_every_few_epochs_averages_over_them():
    bank = draw_bank()
    each, every = (told(made(6, epochs=7, report_every=n, sigma=1.0), bank) for n in (1, 3))
    losses = [values["loss"] for values in each]
    expected = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [values["loss"] for values in every] == pytest.approx(expected)


def test_the_first_loss_by_hand():
    bank = draw_bank(count=2)
    detector = made(6, epochs=1, batch_size=2, sigma=0.7, threshold=0.3)
    twin = copy.deepcopy(detector)
    (report,) = told(detector, bank)
    generator = seeded()
    twin.initialise(generator)
    noise = GaussianNoise(0.7, generator)
    (features,) = bank.batches(2, generator=generator)
    adapted = twin.adaptor(as_positions(features))
    logits = twin.train().discriminator(torch.cat([adapted, noise(adapted)]))
    normal, noisy = logits[:50], logits[50:]
    loss = (0.3 - normal).clamp(min=0).mean() + (0.3 + noisy).clamp(min=0).mean()
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert report["normal_logit"] == pytest.approx(normal.mean().item(), rel=1e-5)
    assert report["noisy_logit"] == pytest.approx(noisy.mean().item(), rel=1e-5)


def test_a_last_batch_of_one_position_is_skipped():
    bank = draw_bank(count=9, side=1)
    detector = fitted(bank, batch_size=4, epochs=2)
    assert detector.discriminator.normalisation.num_batches_tracked == 2 * 2
    assert detector(bank.features).shape == (9, 1, 1)
    assert torch.isfinite(detector(bank.features)).all()


def test_a_single_position_in_all_is_refused():
    with pytest.raises(ModelError, match="at least two positions"):
        fitted(draw_bank(count=1, side=1))


def test_a_single_image_of_many_positions_is_enough():
    bank = draw_bank(count=1, side=8)
    assert torch.isfinite(fitted(bank)(bank.features)).all()


@pytest.mark.parametrize("loss", ["truncated_l1", "cross_entropy"])
def test_the_trivial_solution_is_said_in_words(loss):
    bank = Bank(1000 * draw_bank(channels=16).features)
    detector = made(16, epochs=2, loss=loss)
    with pytest.warns(TrivialSolutionWarning) as caught:
        reports = told(detector, bank)
    (remark,) = detector.remarks
    assert str(caught[0].message) == remark
    trivial = 1.0 if loss == "truncated_l1" else 2 * math.log(2)
    assert f"the loss is {reports[-1]['loss']:.4f}, and a discriminator" in remark
    assert f"always answers 0 has {trivial:.4f}" in remark
    assert "(sigma 0.015) has norm 0.06" in remark  # 0.015 * sqrt(16)
    norm = detector.adapt(as_positions(bank.features)).norm(dim=1).square().mean().sqrt().item()
    assert f"the adapted features have {norm:.3g}: try --method.norm 1" in remark


def test_the_remark_offers_no_norm_where_there_is_one():
    detector = made(6, epochs=1, norm=1.0, sigma=1e-4)
    with pytest.warns(TrivialSolutionWarning):
        detector.fit(draw_bank(), generator=seeded())
    assert "the adapted features have 1: try a larger --method.sigma" in detector.remarks[0]


def test_noise_that_drowns_gives_the_remark_and_the_norm_its_way_out():
    bank = Bank(1000 * draw_bank(count=16, channels=16).features)
    options = {"epochs": 10, "learning_rate": 1e-3}
    drowned = made(16, **options)
    with pytest.warns(TrivialSolutionWarning):
        drowned.fit(bank, generator=seeded())
    assert len(drowned.remarks) == 1
    constrained = made(16, **options, norm=1.0, sigma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constrained.fit(bank, generator=seeded())
    assert constrained.remarks == []
    with pytest.warns(TrivialSolutionWarning):
        drowned.fit(bank, generator=seeded())
    assert len(drowned.remarks) == 1  # of the last fit, not of all


def test_diagnostics_are_the_channels_deviations():
    bank = draw_bank(count=7, side=3)
    bank.features = bank.features * torch.arange(1.0, 7.0)[:, None, None] + 1e4
    detector = fitted(bank, norm=None)
    assert made(6).diagnostics == {}
    positions = as_positions(bank.features)
    adapted = detector.adapt(positions).detach()
    for name, channels in (("feature_std", positions), ("adapted_std", adapted)):
        expected = channels.double().std(dim=0, correction=0).tolist()
        assert detector.diagnostics[name] == pytest.approx(expected, rel=1e-3)


def test_mixed_precision_changes_nothing_without_a_cuda_device():
    bank = draw_bank()
    on, off = (fitted(bank, mixed_precision=flag) for flag in (True, False))
    assert torch.equal(on(bank.features), off(bank.features))


def test_under_bfloat16_noise_is_added_in_float32(monkeypatch):
    """The same step in bfloat16, which the CPU knows too."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(
        "models.methods.simplenet.simplenet.bfloat16_autocast", lambda *_, **__: autocast
    )
    detector = made(8, adaptor="linear")
    seen = []
    detector.discriminator.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with autocast:
        normal, noisy = detector.logits(torch.randn(500, 8), GaussianNoise(0.015, seeded()))
    both = seen[0]
    assert both.dtype == normal.dtype == noisy.dtype == torch.float32
    assert (both[500:] - both[:500]).std().item() == pytest.approx(0.015, rel=0.05)
    plain = fitted(draw_bank(), mixed_precision=False)
    monkeypatch.setattr(
        "models.methods.simplenet.simplenet.bfloat16_autocast",
        lambda *_, **__: contextlib.nullcontext(),
    )
    exact = fitted(draw_bank(), mixed_precision=False)
    features = draw_bank(seed=7).features
    assert not torch.equal(plain(features), exact(features))
    torch.testing.assert_close(plain(features), exact(features), rtol=0.1, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_agrees_with_itself():
    bank = draw_bank()
    bank.features = bank.features.cuda()
    heads = [made(6, epochs=2, sigma=1.0).cuda() for _ in range(2)]
    for head in heads:
        head.fit(bank, generator=seeded())
    torch.testing.assert_close(heads[0](bank.features), heads[1](bank.features))
