"""A rewritten network gives the same maps, and what cannot be rewritten stays as it is."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from models.backbone.extractor import FrozenExtractor
from models.backbone.rewriting import FullPrecision, OneSidedConv, accelerated, with_narrow_in_full
from tests.models.banks import seeded


def with_statistics(net):
    """A network in eval mode whose normalisations do something."""
    generator = seeded(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return net.eval()


def count(net, kind):
    return sum(isinstance(module, kind) for module in net.modules())


def draw(size, batch=2):
    return torch.randn(batch, 3, size, size, generator=seeded())


def assert_same_maps(net, fast, images):
    with torch.inference_mode():
        for expected, found in zip(net(images), fast(images), strict=True):
            assert expected.shape == found.shape
            assert (expected - found).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("tf_efficientnet_lite0", {}, 0),
        ("tf_efficientnet_lite0", {"feature_location": "expansion"}, 3),
        ("resnet18", {}, 0),
        ("mobilenetv3_small_100", {}, 0),
        ("densenet121", {}, None),  # normalises before it convolves: half can be folded
    ],
)
def test_the_maps_stay_the_same(name, options, left):
    torch.manual_seed(0)
    net = timm.create_model(name, features_only=True, out_indices=(1, 2, 3), **options)
    net = with_statistics(net)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    fast = accelerated(net, draw(64))
    before, after = count(net, nn.BatchNorm2d), count(fast, nn.BatchNorm2d)
    assert after < before
    # Expansion features are taken where a normalisation stands: those stay.
    assert left is None or after == left
    for size in (64, 63, 96):  # the padding of "same" convolutions depends on the size
        assert_same_maps(net, fast, draw(size))
    assert all(torch.equal(state[key], tensor) for key, tensor in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fast.parameters())


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("size", [(16, 16), (15, 15), (16, 15), (14, 18)])
@pytest.mark.parametrize("groups", [1, 4])
def test_same_padding_without_padding(side, size, groups):
    torch.manual_seed(0)
    convolution = Conv2dSame(4, 8, side, stride=2, groups=groups)
    assert OneSidedConv.replaces(convolution)
    images = torch.randn(2, 4, *size)
    with torch.inference_mode():
        expected = convolution(images)
        torch.testing.assert_close(OneSidedConv(convolution)(images), expected)
        # Symmetric padding, the careless way to save the copy, is something else on even sides.
        careless = F.conv2d(
            images, convolution.weight, convolution.bias, 2, side // 2, groups=groups
        )
    if not any(s % 2 for s in size):
        assert not torch.allclose(careless, expected, atol=1e-2)


@pytest.mark.parametrize(
    "options", [{"stride": 1}, {"stride": 2, "dilation": 2}, {"stride": 2, "kernel_size": 1}]
)
def test_other_convolutions_are_left_alone(options):
    assert not OneSidedConv.replaces(Conv2dSame(4, 4, **{"kernel_size": 3, **options}))
    assert not OneSidedConv.replaces(nn.Conv2d(4, 4, 3, stride=2))


class Twice(nn.Module):
    """Uses a convolution's output a second time, beside its normalisation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images):
        maps = self.conv(images)
        return [self.norm(maps) + maps]


def test_an_output_used_twice_keeps_the_network():
    torch.manual_seed(0)
    net = with_statistics(Twice())
    assert accelerated(net, draw(16)) is net


def test_nothing_to_rewrite_keeps_the_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert accelerated(net, draw(16)) is net


def test_the_extractor_runs_the_rewritten_network_and_says_so():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    fast = FrozenExtractor("tf_efficientnet_lite0", (2, 3))
    plain = FrozenExtractor("tf_efficientnet_lite0", (2, 3), rewrite=False)
    expected, found = plain(images), fast(images)
    assert not torch.equal(expected, found)
    assert (expected - found).abs().max() <= 2e-5 * expected.abs().max()
    assert fast.fingerprint() != plain.fingerprint()
    assert fast.fingerprint()["weights"] == plain.fingerprint()["weights"]
    # The network itself, which other methods train or count, is as it was loaded.
    assert count(fast.net, nn.BatchNorm2d) == count(plain.net, nn.BatchNorm2d) > 0
    for precision in ("fp16", "bf16"):
        half = FrozenExtractor("tf_efficientnet_lite0", (2, 3), precision=precision)
        assert not half.rewrite


def test_narrow_convolutions_leave_autocast():
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3),  # a first layer
        nn.Conv2d(32, 32, 3, groups=32),  # depthwise
        nn.Conv2d(32, 64, 1),
        nn.Conv2d(64, 64, 3, groups=4),  # 16 channels in a group
        nn.Conv2d(64, 64, 3, groups=8),
    ).eval()
    narrow = with_narrow_in_full(net)
    assert [isinstance(module, FullPrecision) for module in narrow] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert count(net, FullPrecision) == 0
    images = draw(16)
    with torch.inference_mode():
        exact = narrow[1](narrow[0](images))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept = narrow[1](narrow[0](images))
            rounded = narrow[2](kept)
        assert torch.equal(kept, exact)
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(narrow(images), net(images))


def test_a_convolution_that_is_looked_at_stays():
    net = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    net[0].register_forward_hook(lambda *_: None)
    assert count(with_narrow_in_full(net), FullPrecision) == 0


def test_half_precision_features_are_nearer_than_autocast_alone():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    exact = FrozenExtractor("tf_efficientnet_lite0", (2, 3), rewrite=False)
    half = FrozenExtractor("tf_efficientnet_lite0", (2, 3), precision="bf16")
    expected, found = exact.stage_maps(images), half.stage_maps(images)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = [F.avg_pool2d(m.float(), 3, 1, 1) for m in half.net(half.pixels(images))]
    for wanted, ours, alone in zip(expected, found, plain, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - wanted).norm() < 0.7 * (alone - wanted).norm()
    assert count(half.net, FullPrecision) == 0
