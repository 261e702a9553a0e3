import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.deep_svdd import deep_svdd
from models.methods.deep_svdd.deep_svdd import DeepSvdd, DeepSvddOptions, soft_boundary_loss
from models.methods.deep_svdd.lenet import (
    NETWORKS,
    build_decoder,
    build_encoder,
    draw_weights,
    global_contrast_normalise,
)
from tests.models.banks import Bank, seeded, told

SIZES = {"cifar": 32, "mnist": 28}


def draw_images(count, *, side=28, seed=1, across=False):
    """Noisy stripes, down the image or across it; equal channels, as grey images arrive."""
    stripes = torch.where(torch.arange(side) % 8 < 4, 60, 180).expand(side, side)  # down
    stripes = stripes.T if across else stripes
    noise = torch.randint(-40, 41, (count, 1, side, side), generator=seeded(seed))
    return (stripes + noise).to(torch.uint8).expand(count, 3, side, side).contiguous()


def bank_of_images(count=24, **options):
    return Bank(draw_images(count, **options))


def build(**options):
    quick = {"network": "mnist", "epochs": 2, "pretrain_epochs": 1, "batch_size": 8}
    return DeepSvdd(FeatureShape(()), DeepSvddOptions(**{**quick, **options}))


def fitted(bank, seed=0, **options):
    detector = build(**options)
    detector.fit(bank, generator=seeded(seed))
    return detector


# Networks


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar", 3 * 32 * 25 + 32 * 64 * 25 + 64 * 128 * 25 + 128 * 4 * 4 * 128),
        ("mnist", 1 * 8 * 25 + 8 * 4 * 25 + 4 * 7 * 7 * 32),
    ],
)
def test_encoders_have_weights_and_nothing_that_shifts(name, count):
    net = NETWORKS[name]
    encoder = build_encoder(net, 0.1)
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert not any("bias" in n for n, _ in encoder.named_parameters())
    norms = [m for m in encoder if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == len(net.widths)
    assert all(norm.eps == 1e-4 and not norm.affine for norm in norms)
    images = torch.rand(3, net.channels, SIZES[name], SIZES[name])
    codes = encoder(images)
    assert codes.shape == (3, net.code_dim)
    decoded = build_decoder(net, 0.1)(codes)
    assert decoded.shape == images.shape
    assert decoded.min() > 0
    assert decoded.max() < 1


def test_contrast_normalisation_on_hand_worked_numbers():
    image = torch.tensor([[[0.0, 2.0], [4.0, 6.0]]])  # mean 3, mean absolute deviation 2
    flat = torch.full((1, 2, 2), 0.3)
    normalised = global_contrast_normalise(torch.stack([image, flat]))
    assert torch.equal(normalised[0, 0], torch.tensor([[-1.5, -0.5], [0.5, 1.5]]))
    torch.testing.assert_close(normalised[1], torch.zeros(1, 2, 2))


def test_normal_images_span_zero_to_one():
    bank = bank_of_images()
    detector = fitted(bank)
    inputs = detector.normalise(bank.features)
    assert inputs.shape == (24, 1, 28, 28)
    assert inputs.min() == 0
    assert inputs.max() == pytest.approx(1)
    # Brightness and contrast are gone; the range is the training images', not the batch's.
    dimmed = (bank.features[:3].float() / 2 + 10).to(torch.uint8)
    torch.testing.assert_close(detector.normalise(dimmed), inputs[:3], atol=0.02, rtol=0)


# Loss, center and radius


def test_soft_boundary_loss_on_hand_worked_numbers():
    distances = torch.tensor([1.0, 5.0, 9.0])
    # R^2 = 4; excesses 0, 1, 5 with mean 2, divided by nu.
    assert soft_boundary_loss(distances, torch.tensor(2.0), 0.1).item() == pytest.approx(24.0)


def test_one_class_loss_is_the_mean_squared_distance():
    bank = bank_of_images()
    detector = build(batch_size=24, epochs=1)
    start = {}

    def mean_code(bank, original=detector._mean_code):
        center = original(bank)
        start["state"] = {n: t.clone() for n, t in detector.encoder.state_dict().items()}
        start["center"] = center.float()
        return center

    detector._mean_code = mean_code
    (values,) = told(detector, bank)
    encoder = build_encoder(NETWORKS["mnist"], 0.1)
    encoder.load_state_dict(start["state"])
    inputs = detector.normalise(bank.features)
    # The center is the mean code in eval mode, moved off zero; the loss takes batch statistics.
    mean = encoder.eval()(inputs).mean(dim=0)
    moved = torch.where(mean.abs() < 0.1, torch.where(mean < 0, -0.1, 0.1), mean)
    torch.testing.assert_close(detector.center, moved, rtol=1e-4, atol=1e-5)
    assert detector.center.abs().min() >= 0.1 - 1e-6
    expected = (encoder.train()(inputs) - start["center"]).square().sum(dim=1).mean()
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_radius_is_the_quantile_of_distances_after_the_warm_up():
    bank = bank_of_images()
    options = {"objective": "soft_boundary", "warmup_epochs": 2, "batch_size": 24, "nu": 0.25}
    detector = build(epochs=4, **options)
    distances = []
    measure = detector.squared_distances
    detector.squared_distances = lambda images: distances.append(measure(images)) or distances[-1]
    radii = [values["radius"] for values in told(detector, bank)]
    assert radii[:2] == [0, 0]
    for radius, batch in zip(radii[2:], distances[2:], strict=True):
        expected = np.quantile(np.sqrt(batch.detach().numpy()), 0.75)
        assert radius == pytest.approx(expected, rel=1e-5)
    scores = detector(bank.features)
    inside = measure(bank.features) - detector.radius**2
    torch.testing.assert_close(scores[:, 0, 0], inside)


def test_learning_rate_drops_to_a_tenth_at_the_milestone(monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def watched(self, *args, **options):
        rates.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    fitted(
        bank_of_images(8),
        pretrain_epochs=3,
        pretrain_milestone=2,
        pretrain_weight_decay=1e-3,
        epochs=3,
        milestone=1,
    )
    expected = [(1e-4, 1e-3)] * 2 + [(1e-5, 1e-3)] + [(1e-4, 1e-6)] + [(1e-5, 1e-6)] * 2
    assert np.allclose(rates, expected, rtol=1e-9)


# Training


def test_pretraining_reconstructs_and_training_contracts():
    detector = build(pretrain_epochs=15, epochs=15, learning_rate=1e-2)
    losses = [values["loss"] for values in told(detector, bank_of_images())]
    pretraining = detector.diagnostics["pretrain_loss"]
    assert len(pretraining) == 15
    assert pretraining[-1] < 0.7 * pretraining[0]
    assert losses[-1] < 0.5 * losses[0]


def test_pretraining_sums_the_squared_error_over_an_image(monkeypatch):
    """Without weights every pixel is rebuilt as sigmoid(0)."""

    def no_weights(module, *_):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)

    monkeypatch.setattr(deep_svdd, "draw_weights", no_weights)
    bank = bank_of_images(8)
    detector = fitted(bank, pretrain_epochs=1, batch_size=8)
    (images,) = bank.batches(8)
    expected = (detector.normalise(images) - 0.5).square().sum() / 8
    assert np.isclose(detector.diagnostics["pretrain_loss"][0], expected, rtol=1e-5)


def test_every_weight_of_the_encoder_moves_in_both_trainings():
    detector = build(epochs=1)
    drawn = build_encoder(NETWORKS["mnist"], 0.1)
    draw_weights(drawn, 0.1, seeded())
    states = [drawn.state_dict()]

    def after_pretraining(bank, mean_code=detector._mean_code):
        states.append(copy.deepcopy(detector.encoder.state_dict()))
        return mean_code(bank)

    detector._mean_code = after_pretraining
    detector.fit(bank_of_images(), generator=seeded())
    states.append(detector.encoder.state_dict())
    assert len(states) == 3
    for earlier, later in itertools.pairwise(states):
        for name, tensor in earlier.items():
            assert not torch.equal(tensor, later[name]), name


def test_last_batch_of_one_image_is_skipped():
    """It has no batch statistics; the epoch's loss is that of the others."""
    bank = bank_of_images(9)
    detector = fitted(bank, network="mnist", batch_size=8)
    assert detector.encoder[1].num_batches_tracked == 1 + 2
    cifar = bank_of_images(9, side=32)
    assert fitted(cifar, network="cifar", epochs=1).encoder[1].num_batches_tracked == 1 + 1


@pytest.mark.parametrize("network", ["cifar", "mnist"])
@pytest.mark.parametrize("objective", ["one_class", "soft_boundary"])
def test_visible_anomalies_are_found(network, objective):
    side = SIZES[network]
    tests = [draw_images(10, side=side, seed=s, across=s > 2) for s in (2, 3)]
    detector = fitted(
        bank_of_images(side=side),
        network=network,
        objective=objective,
        warmup_epochs=2,
        epochs=8,
        pretrain_epochs=3,
        learning_rate=1e-3,
    )
    scores = detector(torch.cat(tests))[:, 0, 0]
    assert roc_auc_score([0] * 10 + [1] * 10, scores.detach()) > 0.9


def test_colour_is_averaged_for_the_grey_network_and_seen_by_the_other():
    images = draw_images(4, side=32)
    tinted = images.clone()
    tinted[:, 0] += 15
    tinted[:, 1] -= 15
    grey = fitted(bank_of_images())
    torch.testing.assert_close(grey(tinted[..., 2:-2, 2:-2]), grey(images[..., 2:-2, 2:-2]))
    colour = fitted(bank_of_images(side=32), network="cifar")
    assert not torch.allclose(colour(tinted), colour(images), rtol=1e-3)


def test_errors_name_the_cause():
    with pytest.raises(ModelError, match=r"takes 28 x 28 .* 32 x 32: pass --image-size 28"):
        fitted(bank_of_images(side=32))
    with pytest.raises(ModelError, match=r"takes 32 x 32 .* 28 x 28: pass --image-size 32"):
        fitted(bank_of_images(), network="cifar")
    with pytest.raises(ModelError, match="at least two training images"):
        fitted(bank_of_images(1))
    with pytest.raises(ModelError, match="single colour"):
        fitted(Bank(torch.full((4, 3, 28, 28), 7, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"--method\.batch-size 1 must be at least 2"):
        DeepSvddOptions(batch_size=1)
