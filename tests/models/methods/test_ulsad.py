"""ULSAD against its published sizes, its formulas, and what its quantiles promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from kornia.filters import get_gaussian_kernel2d

from models.detector import FeatureShape, HasParts
from models.errors import ModelError
from models.method import find_method
from models.methods.ulsad.losses import attend, patch_distance
from models.methods.ulsad.networks import FeatureAutoencoder, ImageAutoencoder
from models.methods.ulsad.scales import blurred
from models.methods.ulsad.ulsad import Ulsad, UlsadOptions
from tests.models.banks import StagedBank, seeded, told

SIDE = 64
SMALL = {"epochs": 2, "batch_size": 4, "bottleneck": 2, "validation_share": 0.25}


def drawn(count, seed=0, channels=(3, 5)):
    """Stages of smooth features at an eighth of the images' side and below, and the images."""
    generator = seeded(seed)
    stages = [
        F.interpolate(torch.randn(count, c, 4, 4, generator=generator), (side, side), mode="area")
        + 0.1 * torch.randn(count, c, side, side, generator=generator)
        + 2
        for c, side in zip(channels, (8, 4), strict=True)
    ]
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    images = (255 * F.interpolate(coarse, (SIDE, SIDE), mode="bilinear")).byte()
    return [*stages, images]


def bank_of(count, **options):
    return StagedBank(drawn(count, **options))


def fitted(bank, **options):
    detector = Ulsad(FeatureShape((3, 5)), UlsadOptions(**SMALL | options))
    detector.fit(bank, generator=seeded())
    return detector


def count_parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_published_sizes():
    rebuild = FeatureAutoencoder(384, 768, final_relu=True)
    assert count_parameters(rebuild) == 65_487_744
    imagine = ImageAutoencoder(384, 8)
    assert count_parameters(imagine) == 1_030_720
    detector = Ulsad(FeatureShape((512, 1024)), UlsadOptions())
    assert detector.num_trainable == 65_487_744 + 1_030_720


def test_shapes_and_where_the_image_becomes_one_position():
    imagine = ImageAutoencoder(10, 8).eval()
    sides = []
    hooks = [m.register_forward_hook(lambda *a: sides.append(a[2].shape[-1]))
             for m in imagine.modules() if isinstance(m, torch.nn.Conv2d)]  # fmt: skip
    with torch.no_grad():
        assert imagine(torch.zeros(1, 3, 256, 256)).shape == (1, 10, 32, 32)
    assert sides == [128, 64, 32, 16, 8, 1, 4, 9, 16, 32, 64, 32, 32]
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        assert imagine(torch.zeros(1, 3, 320, 320)).shape == (1, 10, 40, 40)
    rebuild = FeatureAutoencoder(6, 12, final_relu=True)
    shapes = []
    for layer in rebuild.layers:
        layer.register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape[1:])))
    found = rebuild(torch.randn(2, 6, 32, 32))
    convolved = [s for s, m in zip(shapes, rebuild.layers, strict=True) if hasattr(m, "stride")]
    assert convolved == [
        *((12, 16, 16), (24, 8, 8), (24, 8, 8)),
        *((12, 16, 16), (6, 32, 32), (12, 32, 32)),
    ]
    assert found.min() == 0
    # A grid that no two halvings divide comes back at its own size.
    assert rebuild(torch.randn(2, 6, 38, 38)).shape == (2, 12, 38, 38)


def test_patch_distance_by_hand():
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    maps = [x.reshape(1, 2, 1, 1) for x in (one, other)]
    assert patch_distance(*maps, 0.0).item() == pytest.approx(1)
    assert patch_distance(*maps, 0.5).item() == pytest.approx(1 + 0.5 * (1 - 24 / 25))


def test_attention_of_features_on_themselves():
    features, queries = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    found = attend(queries, features)
    tokens, asked = features.flatten(2).mT.double(), queries.flatten(2).mT.double()  # (B, P, C)
    weights = (asked @ tokens.mT / math.sqrt(5)).softmax(dim=2)
    torch.testing.assert_close(found.flatten(2).mT.double(), weights @ tokens, rtol=1e-4, atol=1e-5)
    # What equals the features attends as they do: the attention loss is 0.
    same = patch_distance(attend(features, features), attend(features.clone(), features), 0.5)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-6)


def test_losses_before_training():
    """Of features of unit variance: 2 local, 1 global, at most 1.5 by attention (derived)."""
    detector = Ulsad(FeatureShape((16, 80)), UlsadOptions())
    for network in (detector.rebuild, detector.imagine):
        network.initialise(seeded())
    detector.train()
    stages = [torch.randn(4, 16, 32, 32, generator=seeded(1)),
              torch.randn(4, 80, 32, 32, generator=seeded(2)),
              torch.randint(256, (4, 3, 256, 256), generator=seeded(3)).byte()]  # fmt: skip
    with torch.no_grad():
        losses = {name: loss.item() for name, loss in detector.losses(stages).items()}
    assert losses["local"] == pytest.approx(2, abs=0.2)
    assert losses["global"] == pytest.approx(1, abs=0.2)
    assert losses["attention"] < 1.6
    assert 4 < sum(losses.values()) < 4.6


def test_training_features_have_mean_0_and_deviation_1():
    bank = bank_of(9)
    detector = fitted(bank, validation_share=0.0, epochs=1)
    with torch.no_grad():
        features = detector.standardised(bank.stages)
    torch.testing.assert_close(features.mean(dim=(0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
    deviations = features.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(deviations, torch.ones(8), rtol=1e-4, atol=0)


def test_more_channels_are_averaged_in_groups():
    detector = Ulsad(FeatureShape((8, 16)), UlsadOptions(**SMALL | {"channels": 6}))
    stages = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 8, 8)]
    groups = torch.cat(stages, dim=1).unflatten(1, (6, 4)).mean(dim=2)
    torch.testing.assert_close(detector.standardised(stages), groups)


def test_the_blur_sums_to_1():
    assert get_gaussian_kernel2d((33, 33), (4.0, 4.0)).sum().item() == pytest.approx(1, abs=1e-5)
    flat = blurred(torch.full((1, 8, 8), 3.0), torch.Size((64, 64)))
    torch.testing.assert_close(flat, torch.full((1, 64, 64), 3.0))


@pytest.mark.parametrize("own", [True, False], ids=["the data set's", "held out"])
def test_rescaled_maps_of_held_out_normals_have_their_quantiles_at_0_and_a_tenth(own):
    bank = bank_of(12)
    if own:
        bank.held_out = bank_of(5, seed=4)
    detector = fitted(bank)
    held = bank.held_out
    if held is None:
        rows = torch.randperm(12, generator=after_initialising(detector))[:3]
        held = bank.subset(rows)
    with torch.no_grad():
        parts = detector.score_parts(held.stages)
    for part in parts:
        pixels = blurred(part, torch.Size((SIDE, SIDE)))
        low, high = pixels.flatten().quantile(torch.tensor([0.9, 0.995])).tolist()
        assert low == pytest.approx(0, abs=1e-4)
        assert high == pytest.approx(0.1, abs=1e-4)


def after_initialising(detector):
    """The generator of the fit where it holds images out."""
    generator, copy = seeded(), Ulsad(FeatureShape((3, 5)), detector.options)
    for network in (copy.rebuild, copy.imagine):
        network.initialise(generator)
    return generator


def test_the_map_is_the_mean_of_its_parts_and_each_can_stand_alone():
    bank = bank_of(12)
    for branches, names in (("both", ("local", "global")), ("local", ("local",)),
                            ("global", ("global",))):  # fmt: skip
        detector = fitted(bank, branches=branches)
        assert isinstance(detector, HasParts)
        assert detector.part_names == names
        with torch.no_grad():
            parts = detector.score_parts(bank.stages)
            maps, own = detector.score_stages(bank.stages)
        assert own is None
        assert len(parts) == len(names)
        torch.testing.assert_close(maps, torch.stack(parts).mean(dim=0))


def test_what_trains_what():
    """Features are fixed; the local loss trains one network, the attention loss the other."""
    detector = Ulsad(FeatureShape((3, 5)), UlsadOptions(**SMALL))
    stages = drawn(4)
    stages[0].requires_grad_(True)
    trained = {"local": {"rebuild"}, "attention": {"imagine"}, "global": {"rebuild", "imagine"}}
    for detached in (False, True):
        options = UlsadOptions(**SMALL | {"detach_global": detached})
        detector = Ulsad(FeatureShape((3, 5)), options).train()
        for name, wanted in trained.items():
            detector.zero_grad()
            detector.losses(drawn(4))[name].backward()
            reached = {
                part.partition(".")[0]
                for part, p in detector.named_parameters()
                if p.grad is not None and p.grad.abs().sum() > 0
            }
            assert reached == (wanted if not detached or name != "global" else {"rebuild"})


def test_direct_regression_in_place_of_attention():
    detector = Ulsad(FeatureShape((3, 5)), UlsadOptions(**SMALL | {"tie": "direct"}))
    stages = drawn(4)
    with torch.no_grad():
        features, _, _, imagined = detector._compared(stages)
        found = detector.losses(stages)["attention"]
    assert found.item() == pytest.approx(patch_distance(features, imagined, 0.5).mean().item())


def test_the_monitor_sees_the_terms_and_a_fit_lowers_them():
    detector = Ulsad(FeatureShape((3, 5)), UlsadOptions(**SMALL | {"epochs": 12}))
    values = told(detector, bank_of(12))
    assert set(values[0]) == {"loss", "local", "attention", "global"}
    assert values[-1]["loss"] < 0.8 * values[0]["loss"]


def test_a_changed_part_is_seen_where_it_is():
    detector = fitted(bank_of(24), epochs=40)
    stages = drawn(6, seed=9)
    stages[0][:, :, 2:4, 5:7] += 8
    with torch.no_grad():
        local, _ = detector.score_parts(stages)
    inside = local[:, 2:4, 5:7].mean(dim=(1, 2))
    local[:, 2:4, 5:7] = -torch.inf
    assert (inside > 2 * local.amax(dim=(1, 2))).all()


def test_too_small_images_and_too_few_are_refused():
    with pytest.raises(
        ModelError, match=r"at least 256 pixels; these have 64.*--method.bottleneck 2"
    ):
        fitted(bank_of(8), bottleneck=8)
    with pytest.raises(ModelError, match="batches of at least two images"):
        fitted(bank_of(1))
    with pytest.raises(ModelError, match="batches of at least two images"):
        fitted(bank_of(8), batch_size=1)


def test_a_last_smaller_batch_is_left_out():
    steps = []
    detector = Ulsad(FeatureShape((3, 5)), UlsadOptions(**SMALL | {"validation_share": 0.0}))
    losses = detector.losses
    detector.losses = lambda stages: steps.append(len(stages[0])) or losses(stages)
    detector.fit(bank_of(11), generator=seeded())
    assert steps == [4, 4, 4, 4]
    steps.clear()
    detector.fit(bank_of(3), generator=seeded())
    assert steps == [3, 3]


def test_released_and_reduced_variants():
    paper, released, local = map(find_method, ("ulsad", "ulsad_released", "dfr"))
    assert released.experiment["structured"]["select"] == "best_test"
    assert released.experiment["structured"]["scale_on"] == "test"
    assert released.experiment["structured"]["test_batches"] == 32
    assert released.options == UlsadOptions(quantiles="last_epoch")
    assert "select" not in paper.experiment["structured"]
    assert local.options.branches == "local"
    options = UlsadOptions(quantiles="last_epoch", epochs=5)
    detector = Ulsad(FeatureShape((3, 5)), options)
    assert detector.stopped_at(3) == {"epochs": 3, "quantiles": "none"}
    assert detector.stopped_at(5) == {"epochs": 5}
