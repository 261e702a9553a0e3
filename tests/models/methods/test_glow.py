"""Glow on features and on images, and what its likelihood is worth."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from skimage import data

from models.building import build_detector
from models.detector import FeatureShape
from models.errors import ModelError
from models.method import find_method
from models.methods.flows.glow_images import GlowImages, GlowImagesOptions, centred
from tests.models.banks import Bank, Stages, draw_bank, draw_images, fitted, seeded, told

SMALL = {"steps": 2, "width": 8, "epochs": 2, "warmup_epochs": 0, "batch_size": 4}
glow = functools.partial(fitted, "glow", **SMALL)


def few_dimensions(count, seed, side=6):
    """Features of six channels that are mixed of three numbers each, and a little noise."""
    mixing = torch.randn(6, 3, generator=seeded(9))
    inner = torch.randn(count, 3, side, side, generator=seeded(seed))
    noise = torch.randn(count, 6, side, side, generator=seeded(seed + 1))
    return torch.einsum("ck,nkhw->nchw", mixing, inner) + 0.1 * noise


# On features


def test_channels_are_scaled_by_all_normal_positions():
    bank = draw_bank(11, 5, 3)
    bank.features *= torch.tensor([1.0, 5, 0.1, 100, 0])[:, None, None]
    bank.features += torch.tensor([0.0, 3, 7, -50, 2])[:, None, None]
    detector = glow(bank, epochs=1)
    scaled = detector.scaled(bank.features)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-4)
    std = scaled.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(std, torch.tensor([1.0, 1, 1, 1, 0]), rtol=1e-4, atol=1e-4)
    assert detector.std[4] == 1


def test_the_sum_of_a_map_is_the_negative_log_likelihood_of_the_image():
    """By the latents and the determinant of the whole flow, of two levels."""
    detector = glow(draw_bank(side=4), levels=2, epochs=5)
    features = draw_bank(3, side=4, seed=2).features
    maps, scores = detector.score(features)
    latents, log_det = detector.flow(detector.scaled(features))
    z = torch.cat([part.flatten(1) for part in latents], dim=1)  # (3, 96)
    nll = 0.5 * (z.square().sum(dim=1) + 96 * math.log(2 * math.pi)) - log_det
    torch.testing.assert_close(maps.sum(dim=(1, 2)), nll, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(scores, nll / (96 * math.log(2)), rtol=1e-5, atol=1e-5)
    maximum, none = glow(draw_bank(side=4), levels=2, epochs=5, image_score="max").score(features)
    assert none is None
    assert torch.equal(maximum, maps)


def test_a_planted_defect_is_found_where_it_is():
    """One that no channel shows by itself: normal features lie near three dimensions of six."""
    detector = glow(
        Bank(few_dimensions(40, 1)), epochs=12, learning_rate=0.02, batch_size=10, width=16
    )
    good, bad = few_dimensions(20, 50), few_dimensions(20, 70)
    # Each channel is the one of another image: as common as ever, but not beside the others.
    bad[:, :, 2:4, 2:4] = torch.stack([bad[:, c, 2:4, 2:4].roll(c, 0) for c in range(6)], dim=1)
    (normal_maps, normal), (maps, anomalous) = detector.score(good), detector.score(bad)
    assert (anomalous[:, None] > normal[None]).double().mean() > 0.95
    inside = maps[:, 2:4, 2:4].flatten()
    assert (inside[:, None] > normal_maps.flatten()[None]).double().mean() > 0.95
    untouched = maps[:, 0, :].flatten()
    assert (untouched[:, None] > normal_maps.flatten()[None]).double().mean() < 0.65


def test_losses_are_bits_per_dimension_and_fall():
    bank = Bank(few_dimensions(24, 1))
    options = replace(find_method("glow").options, **{**SMALL, "epochs": 6, "noise": 0.0})
    detector = build_detector("glow", Stages(6), options)
    losses = [values["loss"] for values in told(detector, bank)]
    assert losses == sorted(losses, reverse=True)
    _, scores = detector.score(bank.features)
    assert losses[-1] == pytest.approx(scores.mean().item(), abs=0.2)


def test_noise_is_what_the_flow_is_trained_on():
    """Of deviation 2 on channels of deviation 1, the first actnorm divides by the root of 5."""
    bank = draw_bank(40, 6, 6)
    for noise, std in ((0.0, 1), (2.0, math.sqrt(5))):
        detector = glow(bank, noise=noise, epochs=1, batch_size=40, learning_rate=1e-9)
        (norm, *_) = detector.flow.chains[0]
        expected = torch.full((6,), -math.log(std))
        torch.testing.assert_close(norm.log_scale.detach(), expected, rtol=0, atol=0.1)


def test_noise_bounds_the_density_of_features_that_are_copies_of_others():
    three = draw_bank(16, 3, 4).features
    bank = Bank(torch.cat([three, three], dim=1))
    options = {"epochs": 20, "learning_rate": 0.03}
    free, bounded = (
        glow(bank, noise=noise, **options).score(bank.features)[1].mean() for noise in (0.0, 0.3)
    )
    # Sum and difference of a noisy pair have variances 2 + s^2 and s^2, of the pair itself 2 and 0.
    nats = 0.5 * math.log((2 * math.pi) ** 2 * (2 + 0.3**2) * 0.3**2) + 1 / (2 + 0.3**2)
    least = nats / (2 * math.log(2))
    assert bounded > least - 0.3
    assert free < bounded - 0.3


def test_a_single_position_can_be_scored():
    """As of pooled features, of which convolutions see nothing around."""
    detector = glow(
        Bank(few_dimensions(60, 1, side=1)), epochs=20, batch_size=30, learning_rate=0.02
    )
    good, bad = few_dimensions(30, 50, side=1), few_dimensions(30, 70, side=1)
    bad = torch.stack([bad[:, c].roll(c, 0) for c in range(6)], dim=1)
    maps, scores = detector.score(good)
    assert maps.shape == (30, 1, 1)
    torch.testing.assert_close(scores, maps[:, 0, 0] / (6 * math.log(2)))
    assert (detector.score(bad)[1][:, None] > scores[None]).double().mean() > 0.85


def test_refusals():
    with pytest.raises(ModelError, match="multiples of 2, these maps have 5 x 5") as caught:
        glow(draw_bank(side=5), levels=2)
    assert caught.value.change == {"levels": "lower"}
    with pytest.raises(ModelError, match="nothing to fit"):
        glow(Bank(torch.ones(4, 3, 2, 2)))


def test_the_papers_width_and_the_parameters_of_a_step():
    """3 x 3 to 512, 1 x 1, 3 x 3 to both scale and shift; actnorm and matrix."""
    options = find_method("glow").options
    with torch.device("meta"):
        detector = build_detector("glow", Stages(100, 76), options)
    network = (9 * 88 * 512 + 512) + (512 * 512 + 512) + (9 * 512 * 176 + 2 * 176)
    assert detector.num_trainable == options.steps * (network + 176**2 + 2 * 176)


# On images


def of_images(**options):
    return GlowImages(FeatureShape(()), GlowImagesOptions(**{**SMALL, "levels": 2, **options}))


def test_noise_of_one_grey_level_covers_the_unit_interval():
    levels = torch.arange(256).byte()
    low, middle, high = (centred(levels, noise) for noise in (0.0, 0.5, 1.0))
    assert (low[0], high[-1]) == (-0.5, 0.5)
    assert torch.equal(low[1:], high[:-1])
    torch.testing.assert_close(middle, (low + high) / 2)


def test_bits_are_those_of_images_of_eight_bits():
    """A density of 1 on the unit cube, that of random pixels, takes 8 bits for each number."""
    detector = of_images()
    detector.fit(Bank(draw_images(6)), generator=seeded())
    images = draw_images(3, seed=2)
    latents, log_det = detector.flow(images.float().add(0.5).div(256).sub(0.5))
    z = torch.cat([part.flatten(1) for part in latents], dim=1)
    log_density = torch.distributions.Normal(0, 1).log_prob(z).sum(dim=1) + log_det
    wanted = 8 - log_density / (3072 * math.log(2))
    torch.testing.assert_close(detector.bits(images), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(detector(images)[:, 0, 0], wanted - 8, rtol=1e-4, atol=1e-5)


def test_losses_are_the_bits_of_noisy_images_and_fall():
    losses = [
        v["loss"] for v in told(of_images(epochs=6, learning_rate=0.01), Bank(draw_images(16)))
    ]
    assert losses[-1] < losses[0]
    # Random pixels cannot be compressed.
    assert 7.9 < losses[-1] < 9


def test_typicality_is_the_distance_to_the_mean_of_the_training_images():
    bank, images = Bank(draw_images(6)), draw_images(3, seed=2)
    plain, typical = of_images(), of_images(score="typicality")
    for detector in (plain, typical):
        detector.fit(bank, generator=seeded())
    mean = plain(bank.features).mean()
    torch.testing.assert_close(typical.mean_excess, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(typical(images), (plain(images) - mean).abs(), rtol=1e-3, atol=1e-5)
    assert plain.mean_excess == 0
    assert any("misleads" in remark for remark in plain.remarks)
    assert typical.remarks == []


def test_images_that_cannot_be_halved_are_refused():
    with pytest.raises(ModelError, match="multiples of 8, these maps have 28 x 28"):
        of_images(levels=3).fit(Bank(draw_images(4, side=28)), generator=seeded())


@torch.no_grad()
def gravel(count, columns, seed):
    """Crops of 32 pixels of a photograph of gravel, (N, 3, 32, 32), from a range of columns."""
    photograph = torch.from_numpy(data.gravel())[:, slice(*columns)]
    height, width = photograph.shape
    tops = torch.randint(height - 32, (count,), generator=seeded(seed)).tolist()
    lefts = torch.randint(width - 32, (count,), generator=seeded(seed + 1)).tolist()
    crops = [photograph[y : y + 32, x : x + 32] for y, x in zip(tops, lefts, strict=True)]
    return torch.stack(crops)[:, None].expand(-1, 3, -1, -1).contiguous()


def test_the_likelihood_prefers_blank_images_to_the_normal_ones_and_typicality_does_not():
    """Fitted on gravel, a flow gives more likelihood to no gravel at all."""
    normal, unseen = gravel(48, (0, 256), 0), gravel(24, (256, 512), 5)
    # Of grey levels that are common in gravel.
    levels = torch.quantile(normal[:, 0].float().flatten(), torch.linspace(0.2, 0.8, 13))
    blank = levels.round().byte()[:, None, None, None].expand(-1, 3, 32, 32)
    detector = of_images(
        steps=4, width=16, epochs=8, warmup_epochs=1, learning_rate=8e-3, batch_size=16
    )
    detector.fit(Bank(normal), generator=seeded())
    with torch.no_grad():
        bits, bits_of_blank = detector.bits(unseen), detector.bits(blank)
        away, blank_away = (
            (some - detector.bits(normal).mean()).abs() for some in (bits, bits_of_blank)
        )
    assert bits.max() < 6  # it has learned to compress gravel
    # Every blank image is more "normal" than every image of gravel: an AUROC of 0.
    assert bits_of_blank.max() < bits.min()
    assert (blank_away[:, None] > away[None]).double().mean() > 0.9
