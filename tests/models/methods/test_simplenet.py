from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score

from models.building import build_detector
from models.detector import FeatureShape
from models.method import find_method
from models.methods.simplenet.discriminator import cross_entropy, truncated_l1
from models.methods.simplenet.noise import GaussianNoise
from models.methods.simplenet.simplenet import SimpleNet, SimpleNetOptions
from tests.models.banks import Bank, Stages, draw_bank, seeded

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


PAPER = 1536 * 1536 + (1536 * 1536 + 1536) + 2 * 1536 + (1536 + 1)
RELEASED = (1536 * 1536 + 1536) + (1536 * 1024 + 1024) + 2 * 1024 + 1024


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PAPER),
        ({"norm": 1.0}, PAPER),
        ({"adaptor_bias": True, "hidden": 1024, "last_bias": False}, RELEASED),
    ],
)
def test_number_of_trainable_parameters(options, expected):
    assert made(1536, **options).num_trainable == expected
    assert (PAPER, RELEASED) == (4_724_737, 3_937_792)


@pytest.mark.parametrize("norm", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("adaptor", ["linear", "none", "mlp"])
def test_norm_of_adapted_features_is_exact(adaptor, scale, norm):
    detector = made(24, adaptor=adaptor, norm=norm)
    adapted = detector.adapt(scale * torch.randn(100, 24)).double()
    assert (adapted.norm(dim=1) / norm - 1).abs().max() < 1e-6


def test_norm_keeps_directions_and_leaves_zero_alone():
    detector = made(3, adaptor="none", norm=2.0)
    adapted = detector.adapt(torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(adapted, torch.tensor([[1.2, 0.0, 1.6], [0.0, 0.0, 0.0]]))


def test_norm_is_there_before_noise_and_discriminator_in_training_and_scoring():
    detector = made(4, norm=3.0)
    seen = []
    detector.discriminator.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    detector.logits(10 * torch.randn(50, 4), GaussianNoise(1e-4, seeded()))
    detector(10 * torch.randn(2, 4, 5, 5))
    both, scored = seen
    assert both.shape == (100, 4)
    torch.testing.assert_close(both[:50].norm(dim=1), torch.full((50,), 3.0))
    difference = both[50:] - both[:50]
    assert 0 < difference.abs().max() < 1e-3  # the noise is added to what is on the sphere
    torch.testing.assert_close(scored.norm(dim=1), torch.full((50,), 3.0))


def test_norm_none_is_simplenet():
    nc_disc = find_method("nc_disc").options
    assert replace(nc_disc, norm=None) == find_method("simplenet").options


def test_adaptor_none_trains_the_discriminator_alone():
    detector = fitted(draw_bank(), adaptor="none")
    assert list(detector.adaptor.parameters()) == []
    assert detector.num_trainable == sum(p.numel() for p in detector.discriminator.parameters())


def test_scores_are_negative_logits_in_eval_mode():
    bank = draw_bank(side=4)
    detector = fitted(bank)
    assert not detector.training
    maps = detector(bank.features)
    assert maps.shape == (8, 4, 4)
    one = detector(bank.features[2:3, :, 1:2, 3:4])  # batch statistics would make this 0
    torch.testing.assert_close(one[0, 0, 0], maps[2, 1, 3])
    adapted = detector.adapt(bank.features[2, :, 1, 3][None])
    torch.testing.assert_close(-detector.discriminator(adapted)[0], maps[2, 1, 3])


def test_loss_kinds():
    normal, noisy = torch.tensor([0.1, 0.9]), torch.tensor([-0.2, 0.4])
    assert made(3, threshold=0.3).loss(normal, noisy) == truncated_l1(normal, noisy, 0.3)
    entropy = made(3, loss="cross_entropy").loss(normal, noisy)
    assert entropy == cross_entropy(normal, noisy)


@pytest.mark.parametrize("method", ["simplenet", "nc_disc"])
@pytest.mark.parametrize("loss", ["truncated_l1", "cross_entropy"])
@pytest.mark.parametrize("side", [1, 6])
def test_it_learns_to_tell_separable_features(method, loss, side):
    """Normal features fill a plane of 16 dimensions; anomalous ones lie a little off it."""
    plane = torch.randn(16, 3, generator=seeded(5))
    count = 60 if side > 1 else 400

    def draw(off, seed):
        inner = 2 + torch.randn(count, 3, side, side, generator=seeded(seed))
        outer = torch.randn(count, 16, side, side, generator=seeded(seed + 1))
        return torch.einsum("cd,ndhw->nchw", plane, inner) + off * outer

    options = {"sigma": 0.1 if method == "nc_disc" else 0.4}
    options |= {"epochs": 12 if side > 1 else 40, "batch_size": 4 if side > 1 else 64}
    options = replace(find_method(method).options, loss=loss, learning_rate=1e-2, **options)
    detector = build_detector(method, Stages(6, 10), options)
    detector.fit(Bank(draw(0.02, 10)), generator=seeded())
    assert detector.remarks == []
    test = torch.cat([draw(0.02, 20), draw(0.5, 30)])
    scores = detector(test).flatten(1).mean(dim=1).detach()
    assert roc_auc_score([0] * count + [1] * count, scores) > 0.9
