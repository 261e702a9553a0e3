"""The variational autoencoder; `test_autoencoder` has the network, crops and windows."""

import math

import pytest
import torch

from models.detector import FeatureShape
from models.methods.autoencoders.vae import Vae, VaeOptions, kl_to_prior
from tests.models.banks import Bank, seeded, told
from tests.models.methods.striped import SIDE, draw_striped, separation

QUICK = {
    **{"network_size": SIDE, "width": 8, "code_dim": 8, "images_per_epoch": 48, "batch_size": 8},
    **{"epochs": 6, "learning_rate": 5e-3, "samples": 3},
}


def build(**options):
    torch.manual_seed(0)  # for what is looked at unfitted
    return Vae(FeatureShape(()), VaeOptions(**{**QUICK, **options}))


def fitted(bank, **options):
    detector = build(**options)
    detector.fit(bank, generator=seeded())
    return detector


def test_divergence_from_the_prior():
    """0 for the prior itself, and else as an integral over its density says."""
    assert torch.equal(kl_to_prior(torch.zeros(2, 5), torch.zeros(2, 5)), torch.zeros(2))
    mean, log_var = torch.tensor([[0.7]]), torch.tensor([[-0.4]])
    std = math.exp(-0.2)
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    one = torch.distributions.Normal(0.7, std).log_prob(z)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    integral = torch.trapezoid(one.exp() * (one - prior), z)
    assert kl_to_prior(mean, log_var).item() == pytest.approx(integral.item(), rel=1e-5)
    both = kl_to_prior(mean.repeat(1, 3), log_var.repeat(1, 3))
    assert both.item() == pytest.approx(3 * integral.item(), rel=1e-5)


def test_loss_is_the_negative_bound_less_what_is_constant():
    detector = build(deviation=0.2, beta=0.5)
    pixels = draw_striped(4).float() / 255
    with torch.no_grad():
        losses = detector.losses(pixels, seeded(3))
        mean, log_var = detector.encode(pixels)
        drawn = torch.randn(4, 8, generator=seeded(3))
        rebuilt = detector.decode(mean + log_var.exp().sqrt() * drawn)
    density = torch.distributions.Normal(rebuilt, 0.2).log_prob(pixels).sum(dim=(1, 2, 3))
    constant = 3 * SIDE * SIDE * math.log(0.2 * math.sqrt(2 * math.pi))
    expected = -(density + constant).mean()
    torch.testing.assert_close(losses["reconstruction"], expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(losses["kl"], kl_to_prior(mean, log_var).mean())
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + 0.5 * losses["kl"])


def test_log_variance_stays_within_bounds():
    detector = build()
    with torch.no_grad():
        detector.encoder[-1].bias.copy_(torch.tensor([5.0] * 8 + [99.0] * 4 + [-99.0] * 4))
    mean, log_var = detector.encode(draw_striped(2).float() / 255)
    assert mean.shape == log_var.shape == (2, 8)
    assert log_var[0].tolist() == [10.0] * 4 + [-10.0] * 4


def test_map_is_the_mean_over_samples_whose_noise_the_head_keeps():
    detector = build()
    detector.prepare(seeded())
    assert detector.code_noise.shape == (3, 8)
    assert "code_noise" in detector.state_dict()
    images = draw_striped(2)
    pixels = images.float() / 255
    with torch.no_grad():
        mean, log_var = detector.encode(pixels)
        samples = [
            detector.decode(mean + (log_var / 2).exp() * noise) for noise in detector.code_noise
        ]
        maps = detector(images)
    errors = [((pixels - rebuilt) ** 2).mean(dim=1) for rebuilt in samples]
    torch.testing.assert_close(maps, torch.stack(errors).mean(dim=0))
    expected = (255 * torch.stack(samples).mean(dim=0)).round()
    assert (detector.reconstruct(images).float() - expected).abs().max() <= 1
    # An image's map does not depend on those beside it.
    torch.testing.assert_close(detector(images[1:]), maps[1:], rtol=1e-4, atol=1e-6)


def test_without_samples_the_mean_code_is_rebuilt():
    detector = build(samples=0)
    images = draw_striped(2)
    pixels = images.float() / 255
    with torch.no_grad():
        rebuilt = detector.decode(detector.encode(pixels)[0])
        torch.testing.assert_close(detector(images), ((pixels - rebuilt) ** 2).mean(dim=1))


def test_a_visible_defect_is_found_by_what_was_learned():
    bank = Bank(draw_striped(24))
    detector = build()
    values = told(detector, bank)
    assert set(values[0]) == {"loss", "reconstruction", "kl"}
    assert values[-1]["loss"] < 0.2 * values[0]["loss"]
    assert separation(detector, "blank") > 0.95
    assert separation(fitted(bank, epochs=1, learning_rate=1e-12), "blank") < 0.65


def test_a_heavy_prior_takes_the_code_away():
    bank = Bank(draw_striped(24))
    free, heavy = (told(build(beta=beta, epochs=4), bank)[-1] for beta in (0.0, 1e4))
    assert heavy["kl"] < 0.05 * free["kl"]
