import functools
import math

import pytest
import torch
import torch.nn.functional as F

from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.ddad.adaptation import apart
from models.methods.ddad.ddad import Ddad, DdadOptions
from models.methods.ddad.diffusion import (
    conditioned,
    ddim_step,
    noised,
    plan,
    rebuild,
    shares_of_image,
)
from models.methods.ddad.distances import feature_distance, pixel_distance, to_bytes, to_unit
from models.methods.ddad.unet import Attention, UNet, sinusoids
from tests.models.banks import Bank, draw_images, seeded
from tests.models.methods.striped import draw_striped, localisation, separation, squares

TOY = {"base_width": 8, "channel_multipliers": (1, 2), "attention_factors": (2,), "heads": 2}
STEPS = {"diffusion_steps": 100, "start_step": 40, "sampling_step": 10}
QUICK = {**TOY, **STEPS, "blocks": 1, "epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(3)
    return FrozenExtractor("resnet10t", (1, 2), weights="random")


def build(backbone, **options):
    return Ddad(FeatureShape((), backbone), DdadOptions(**{**QUICK, **options}))


def fitted(backbone, bank, **options):
    detector = build(backbone, **options)
    detector.fit(bank, generator=seeded())
    return detector


@pytest.fixture(scope="module")
def quick(backbone):
    """A detector that has hardly learned."""
    return fitted(backbone, Bank(draw_images(6)))


# Diffusion


def test_shares_are_the_papers_linear_schedule():
    shares = shares_of_image(1000)
    assert len(shares) == 1001
    left, expected = 1.0, [1.0]
    for step in range(1000):
        left *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        expected.append(left)
    torch.testing.assert_close(shares, torch.tensor(expected))
    assert shares[250].item() == pytest.approx(0.5241, abs=1e-3)
    assert shares[1000].item() == pytest.approx(4.036e-5, rel=1e-3)


def test_ten_steps_are_taken_from_250():
    ours = plan(250, 25, released=False)
    assert (ours.noised_to, len(ours.times)) == (250, 10)
    assert ours.steps[:2] == [(250, 225), (225, 200)]
    assert ours.steps[-1] == (25, 0)
    # Counted from 0 there, and the start is a time that is never looked at.
    released = plan(250, 25, released=True)
    assert (released.noised_to, len(released.times)) == (251, 10)
    assert [time - 1 for time in released.times] == list(range(225, -1, -25))
    assert plan(10, 4, released=False).steps == [(10, 6), (6, 2), (2, 0)]


def test_a_step_is_that_of_the_paper_by_hand():
    """Of one number, with w = 2, eta = 1/2: equations 7 to 9, and the DDIM step."""
    share, following = 0.36, 0.64
    noisy, found, target, fresh = 0.5, 0.3, 0.8, -0.7
    of_target = 0.6 * target + 0.8 * found  # 0.72
    moved = found - 2 * 0.8 * (of_target - noisy)  # -0.052
    image = (noisy - 0.8 * moved) / 0.6
    deviation = 0.5 * math.sqrt((1 - following) / (1 - share) * (1 - share / following))
    kept = math.sqrt(1 - following - deviation**2)
    expected = 0.8 * image + kept * moved + deviation * fresh

    one = functools.partial(torch.full, (1, 1, 1, 1))
    a, b = torch.tensor(share), torch.tensor(following)
    noise = conditioned(one(found), one(noisy), one(target), a, 2.0)
    assert noise.item() == pytest.approx(-0.052)
    result = ddim_step(one(noisy), noise, a, b, one(fresh), 0.5)
    assert result.item() == pytest.approx(expected, rel=1e-5)


def test_the_last_step_is_the_image_itself():
    noisy, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    share = torch.tensor(0.9)
    fresh = torch.full_like(noisy, 1e6)
    found = ddim_step(noisy, noise, share, torch.tensor(1.0), fresh, 1.0)
    torch.testing.assert_close(found, (noisy - 0.1**0.5 * noise) / 0.9**0.5)


def oracle(noise):
    return lambda noisy, _: noise.expand_as(noisy)


TARGET = torch.rand(2, 3, 4, 4, generator=seeded(4)) - 0.5
SHARES = shares_of_image(100)
TIMES = plan(40, 10, released=False)
rebuilding = functools.partial(rebuild, shares=SHARES, times=TIMES)


def test_whoever_knows_the_noise_gets_the_image_back():
    noise = torch.randn(1, 3, 4, 4, generator=seeded(1))
    for weight in (0.0, 5.0):
        found = rebuilding(oracle(noise), TARGET, TARGET, noise, weight=weight, eta=0.0)
        torch.testing.assert_close(found, TARGET, rtol=0, atol=1e-5)


def some_noise(noisy, time):
    return torch.sin(3 * noisy + time) / 2


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_a_condition_it_is_plain_ddim(eta):
    noise = torch.randn(4, 3, 4, 4, generator=seeded(2))
    noisy = SHARES[40].sqrt() * TARGET + (1 - SHARES[40]).sqrt() * noise[0]
    for index, (time, following) in enumerate([(40, 30), (30, 20), (20, 10), (10, 0)]):
        a, b = SHARES[time], SHARES[following]
        found = some_noise(noisy, float(time))
        image = (noisy - (1 - a).sqrt() * found) / a.sqrt()
        sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
        noisy = b.sqrt() * image + (1 - b - sigma**2).clamp_min(0).sqrt() * found
        if index < 3:
            noisy = noisy + sigma * noise[index + 1]
    wanted = noisy.clamp(-1, 1)
    # Whatever the target is.
    found = rebuilding(some_noise, TARGET, -TARGET, noise, weight=0.0, eta=eta)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert found.abs().max() == 1


def test_the_condition_draws_towards_the_target():
    noise = torch.randn(4, 3, 4, 4, generator=seeded(2))
    away = [
        (rebuilding(some_noise, -TARGET, TARGET, noise, weight=w, eta=1.0) - TARGET).abs().mean()
        for w in (0.0, 1.0, 3.0, 8.0)
    ]
    assert away == sorted(away, reverse=True)
    assert away[-1] < 0.5 * away[0]


def test_each_image_may_have_noise_of_its_own():
    noise = torch.randn(4, 2, 3, 4, 4, generator=seeded(2))
    both = rebuilding(some_noise, TARGET, TARGET, noise, weight=1.0, eta=1.0)
    for index in range(2):
        one = TARGET[index : index + 1]
        alone = rebuilding(some_noise, one, one, noise[:, index], weight=1.0, eta=1.0)
        torch.testing.assert_close(both[index : index + 1], alone)


# U-Net


def residual(inputs, outputs, time):
    convolutions = 9 * inputs * outputs + outputs + 9 * outputs**2 + outputs
    skip = 0 if inputs == outputs else inputs * outputs + outputs
    return 2 * inputs + 2 * outputs + convolutions + time * outputs + outputs + skip


def attention(channels):
    return 2 * channels + 3 * channels * (channels + 1) + channels * (channels + 1)


def test_at_the_papers_setting_the_network_has_33_million_parameters():
    """Counted here once more: 64 channels, levels 1 1 2 2 4 4, attention at 32, 16 and 8 pixels."""
    widths, time = [64, 64, 128, 128, 256, 256], 256
    expected = 64 * time + time + time**2 + time + 27 * 64 + 64
    channels, skipped = 64, [64]
    for level, width in enumerate(widths):
        for _ in range(2):
            expected += residual(channels, width, time) + (attention(width) if level > 2 else 0)
            channels = width
            skipped.append(channels)
        if level < 5:
            expected += residual(channels, channels, time)
            skipped.append(channels)
    expected += 2 * residual(256, 256, time) + attention(256)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(3):
            expected += residual(channels + skipped.pop(), width, time)
            expected += attention(width) if level > 2 else 0
            channels = width
        expected += residual(channels, channels, time) if level else 0
    expected += 2 * 64 + 27 * 64 + 3
    options = DdadOptions()
    with torch.device("meta"):
        network = UNet(
            options.base_width,
            options.channel_multipliers,
            blocks=options.blocks,
            attention=options.attention_factors,
            heads=options.heads,
        )
    assert sum(p.numel() for p in network.parameters()) == expected == 32_952_707
    assert network.factor == 32


def toy_network(seed=0):
    network = UNet(8, (1, 2, 3), blocks=2, attention=(2,), heads=2)
    network.initialise(seeded(seed))
    return network


def test_at_first_no_noise_is_told_and_later_all_inputs_count():
    network = toy_network()
    noisy, times = torch.randn(2, 3, 8, 8, generator=seeded()), torch.tensor([3, 70])
    assert network(noisy, times).abs().max() == 0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeded(1)))
    found = network(noisy, times)
    assert found.shape == noisy.shape
    assert not torch.allclose(found, network(noisy, torch.tensor([4, 70])), atol=1e-3)
    torch.testing.assert_close(network(noisy[1:], times[1:]), found[1:], rtol=1e-4, atol=1e-4)
    alike = network(noisy, torch.tensor([70]))
    torch.testing.assert_close(alike[1:], found[1:], rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_attention_is_a_softmax_of_all_positions():
    layer = Attention(8, 2)
    maps = torch.randn(2, 8, 3, 2, generator=seeded())
    tokens = layer.norm(maps).flatten(2).mT  # (B, N, C)
    q, k, v = layer.given(tokens).unflatten(2, (3, 2, 4)).unbind(2)
    expected = []
    for head in range(2):
        weights = (q[:, :, head] @ k[:, :, head].mT / 2).softmax(dim=2)
        expected.append(weights @ v[:, :, head])
    out = layer.out(torch.cat(expected, dim=2)).mT.unflatten(2, (3, 2))
    torch.testing.assert_close(layer(maps), maps + out, rtol=1e-4, atol=1e-5)


def test_a_time_is_told_by_sinusoids():
    found = sinusoids(torch.tensor([0, 7]), 6)
    angles = [7 * 10_000 ** (-index / 3) for index in range(3)]
    expected = [[0.0] * 3 + [1.0] * 3, [*map(math.sin, angles), *map(math.cos, angles)]]
    torch.testing.assert_close(found, torch.tensor(expected))


# Distances


def test_features_are_compared_by_the_cosine_of_their_neighbourhoods():
    one, other = torch.randn(2, 5, 4, 4, generator=seeded()), torch.randn(2, 5, 4, 4)
    found = feature_distance([one], [other], 4)
    for y in range(4):
        for x in range(4):
            near = (slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2))
            left, right = (m[:, :, near[0], near[1]].sum(dim=(2, 3)) for m in (one, other))
            cosine = (left * right).sum(dim=1) / (left.norm(dim=1) * right.norm(dim=1))
            torch.testing.assert_close(found[:, y, x], 1 - cosine)
    both = feature_distance([one, one[:, :, :2, :2]], [other, other[:, :, :2, :2]], 8)
    small = feature_distance([one[:, :, :2, :2]], [other[:, :, :2, :2]], 8)
    torch.testing.assert_close(both, feature_distance([one], [other], 8) + small)


def test_the_range_of_images_and_the_distance_of_pixels():
    images = torch.arange(256).byte().reshape(1, 1, 16, 16).expand(-1, 3, -1, -1)
    values = to_unit(images)
    assert (values.min(), values.max()) == (-1, 1)
    assert torch.equal(to_bytes(values), images)
    other = values.clone()
    other[:, 0] += 0.3
    torch.testing.assert_close(pixel_distance(values, other), torch.full((1, 16, 16), 0.1))


def test_the_map_is_of_what_is_rebuilt_scaled_by_training_images(backbone, quick):
    bank = draw_images(6)
    largest = []
    for image in bank:  # one after the other
        values = to_unit(image[None])
        rebuilt = quick.rebuilt(values).detach()
        maps = [
            backbone.net(((v + 1) / 2 - backbone.mean) / backbone.std) for v in (values, rebuilt)
        ]
        by_features = feature_distance(*maps, 32)
        by_pixels = (values - rebuilt).abs().mean(dim=1)
        largest.append((by_features.max().item(), by_pixels.max().item()))
        assert (quick.reconstruct(image[None]) - to_bytes(rebuilt)).abs().max() <= 1
    ratio = max(f for f, _ in largest) / max(p for _, p in largest)
    assert quick.ratio.item() == pytest.approx(ratio, rel=1e-3)
    torch.testing.assert_close(
        quick(image[None]), by_features + ratio * by_pixels, rtol=1e-3, atol=1e-4
    )


def test_a_score_depends_on_the_image_alone(quick):
    images = draw_images(11, seed=5)  # more than go through the network together
    with torch.no_grad():
        whole, turned = quick(images), quick(images.flip(0)).flip(0)
        alone = torch.cat([quick(image[None]) for image in images])
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole, turned, rtol=1e-3, atol=1e-4)


def test_the_loss_is_summed_over_an_image_and_averaged_over_images(quick, monkeypatch):
    values = to_unit(draw_images(3))
    monkeypatch.setattr(quick.network, "forward", lambda noisy, *_: torch.zeros_like(noisy))
    loss = quick._loss(values, seeded(), None)
    drawn = seeded()
    times = torch.randint(1, 101, (3,), generator=drawn)
    noise = torch.randn(values.shape, generator=drawn)
    assert loss.item() == pytest.approx(noise.square().sum().item() / 3, rel=1e-5)
    seen = []
    monkeypatch.setattr(quick.network, "forward", lambda *given: (seen.append(given), given[0])[1])
    quick._loss(values, seeded(), None)
    noisy, told, _ = seen[0]
    assert torch.equal(told, times)
    a = SHARES[times][:, None, None, None]
    torch.testing.assert_close(noisy, noised(values, noise, a))
    torch.testing.assert_close(noisy, a.sqrt() * values + (1 - a).sqrt() * noise)


# Training


@pytest.fixture(scope="module")
def trained(backbone):
    bank = Bank(draw_striped(32))
    options = {"base_width": 16, "epochs": 8, "learning_rate": 6e-3, "weight_decay": 0.0}
    return fitted(backbone, bank, **options)


def test_a_turned_square_is_found_and_not_without_training(backbone, trained):
    assert separation(trained, "turned") > 0.95
    assert localisation(trained, "turned") > 0.8
    untrained = fitted(backbone, Bank(draw_striped(8)), learning_rate=1e-9)
    assert separation(untrained, "turned") < 0.6


def test_a_defect_is_not_rebuilt_and_what_is_beside_it_is(trained):
    images, masks = draw_striped(8, seed=21, defect="turned"), squares(8, 21)
    found = trained.reconstruct(images)
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    difference = (found.float() - images.float()).abs().mean(dim=1)
    assert difference[~masks].mean() < 15
    assert difference[masks].mean() > 1.5 * difference[~masks].mean()


def test_dropout_is_of_training_only(backbone):
    bank = Bank(draw_images(6))
    plain, dropped = (fitted(backbone, bank, dropout=rate, epochs=3) for rate in (0.0, 0.5))
    assert not torch.equal(plain.network.last.weight, dropped.network.last.weight)
    images = draw_images(2, seed=9)
    assert torch.equal(dropped(images), dropped(images))


def test_the_adapted_copy_alone_learns_and_is_what_compares(backbone):
    bank = Bank(draw_striped(8))
    before = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    plain = fitted(backbone, bank)
    options = {"adaptation_epochs": 12, "adaptation_learning_rate": 3e-3}
    adapted = fitted(backbone, bank, **options)
    assert all(
        torch.equal(value, before[name]) for name, value in backbone.net.state_dict().items()
    )
    assert not any(name.startswith("adapted") for name in plain.state_dict())
    moved = adapted.adapted.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in moved.items())
    assert not adapted.adapted.training
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, adapted.network.state_dict()[name])
    images = draw_striped(4, seed=3)
    values = to_unit(images)
    rebuilt = adapted.rebuilt(values).detach()
    of_backbone, of_copy = (
        [net(((v + 1) / 2 - backbone.mean) / backbone.std) for v in (values, rebuilt)]
        for net in (backbone.net, adapted.adapted)
    )
    assert apart(*of_copy) < 0.5 * apart(*of_backbone)
    expected = feature_distance(*of_copy, 32) + adapted.ratio * pixel_distance(values, rebuilt)
    torch.testing.assert_close(adapted(images), expected, rtol=1e-3, atol=1e-4)


def test_whole_maps_are_compared_in_the_adaptation():
    one, other = torch.randn(3, 4, 2, 2, generator=seeded()), torch.randn(3, 4, 2, 2)
    expected = sum(
        1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        for a, b in zip(one, other, strict=True)
    )
    torch.testing.assert_close(apart([one, one], [other, one]), expected / 3)


def test_where_nothing_is_to_be_localised_the_map_is_its_maximum():
    torch.manual_seed(3)
    pooled = FrozenExtractor("resnet10t", (1, 2), weights="random", pool="mean")
    detector = fitted(pooled, Bank(draw_images(6)))
    assert detector(draw_images(2)).shape == (2, 1, 1)


# Refusals


@pytest.mark.parametrize(
    ("options", "message", "change"),
    [
        ({"start_step": 101}, "to time 101 of 100", {"start_step", "diffusion_steps"}),
        (
            {"start_step": 100, "released_steps": True},
            "to time 101",
            {"start_step", "diffusion_steps"},
        ),
        ({"sampling_step": 41}, "no step of 41 can be taken", {"sampling_step"}),
        ({"channel_multipliers": ()}, "a number above 0 for each level", {"channel_multipliers"}),
        ({"channel_multipliers": (1, 0)}, "a number above 0", {"channel_multipliers"}),
        ({"attention_factors": (4,)}, "they are 1, 2 times", {"attention_factors"}),
        ({"heads": 3}, "16 channels cannot be split among 3 heads", {"heads"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_go_together_are_refused(backbone, options, message, change):
    with pytest.raises(ModelError, match=message) as caught:
        build(backbone, **options)
    assert set(caught.value.change) == change


def test_images_of_other_sizes_are_refused(backbone, quick):
    message = "halves images 1 times, which 33 pixels cannot be: set --image-size to 32 or 34"
    with pytest.raises(ModelError, match=message):
        fitted(backbone, Bank(draw_images(4, side=33)))
    with pytest.raises(ModelError, match="fitted on images of 32 pixels, these have 48"):
        quick(draw_images(1, side=48))
    with pytest.raises(ModelError, match="3 images are too few to adapt") as caught:
        fitted(backbone, Bank(draw_images(3)), adaptation_epochs=1)
    assert set(caught.value.change) == {"adaptation_epochs"}
    tiny = {"base_width": 8, "channel_multipliers": (1, 1, 1, 2), "attention_factors": ()}
    with pytest.raises(ModelError, match="are one position of 16 channels, each norm") as caught:
        fitted(backbone, Bank(draw_images(4, side=8)), **tiny, heads=1)
    assert set(caught.value.change) == {"base_width", "channel_multipliers"}
