import functools
import itertools
import json

import pytest
import timm
import torch
from torch.nn import functional as F

from models.backbone.extractor import FrozenExtractor, describe_stages
from models.backbone.weights import canonical_name, options_for_any_size
from models.errors import ModelError
from tests.models.banks import seeded

LITE0 = "tf_efficientnet_lite0"


def draw(count, size, seed=0):
    """Images (count, 3, size, size), uint8."""
    return torch.randint(0, 256, (count, 3, size, size), generator=seeded(seed)).byte()


@pytest.fixture(scope="module")
def lite0():
    return FrozenExtractor(LITE0, (1, 2, 3))


def raw_maps(extractor, images):
    """The backbone's maps without any pooling, from pixels normalised here."""
    pixels = (images.float() / 255 - 0.5) / 0.5  # EfficientNet-Lite0's mean and deviation
    with torch.inference_mode():
        return extractor.net(pixels)


def average_3x3(maps):
    """The mean over each 3 x 3 neighbourhood, the zeros around the map counted: written out."""
    H, W = maps.shape[2:]
    padded = F.pad(maps, (1, 1, 1, 1))
    shifts = itertools.product(range(3), range(3))
    return sum(padded[:, :, y : y + H, x : x + W] for y, x in shifts) / 9


def test_wide_resnet_gives_the_papers_features():
    extractor = FrozenExtractor("wide_resnet50_2", (1, 2, 3), weights="random")
    features = extractor(draw(2, 224))
    assert features.shape == (2, 1792, 56, 56)
    assert features.dtype == torch.float32
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert extractor.stage_channels == (256, 512, 1024)
    assert extractor.channels == 1792
    assert extractor.random_weights
    assert "random" in extractor.weights_source


@pytest.mark.parametrize("size", [96, 100, 70])
@pytest.mark.parametrize(
    ("backbone", "layers", "location"),
    [
        (LITE0, (1, 2, 3), "bottleneck"),
        (LITE0, (1, 2, 3), "expansion"),
        (LITE0, (2,), "bottleneck"),
        ("resnet18", (3, 2), "bottleneck"),
    ],
)
def test_declared_channels_and_strides_are_the_actual_ones(backbone, layers, location, size):
    extractor = FrozenExtractor(backbone, layers, weights="random", feature_location=location)
    features = extractor(draw(1, size))
    grid = -(-size // min(extractor.strides))
    assert features.shape == (1, extractor.channels, grid, grid)
    assert [m.shape[1] for m in extractor.stage_maps(draw(1, size))] == [*extractor.stage_channels]


def test_backbone_with_channels_last_maps_is_turned():
    extractor = FrozenExtractor("swin_tiny_patch4_window7_224", (0, 1), weights="random")
    assert extractor(draw(1, 224)).shape == (1, extractor.channels, 56, 56)
    assert extractor.stage_channels == (96, 192)


def test_expansion_features_have_the_channels_before_projection():
    extractor = FrozenExtractor(LITE0, (1, 2, 3), feature_location="expansion")
    assert extractor.stage_channels == (144, 240, 672)
    assert extractor.strides == (4, 8, 16)
    assert not extractor.random_weights


@pytest.mark.parametrize(
    ("backbone", "mean", "deviation"),
    [
        (LITE0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_pixels_are_normalised_as_the_backbone_was_trained(backbone, mean, deviation):
    extractor = FrozenExtractor(backbone, (1,), weights="random")
    seen = []
    extractor.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    extractor(torch.full((1, 3, 32, 32), 51, dtype=torch.uint8))
    expected = [(51 / 255 - m) / d for m, d in zip(mean, deviation, strict=True)]
    assert seen[0].mean(dim=(0, 2, 3)).tolist() == pytest.approx(expected, abs=1e-5)


def test_patches_are_averaged_with_the_padding_counted(lite0):
    images = draw(2, 64)
    maps = raw_maps(lite0, images)
    found = lite0.stage_maps(images)
    assert [tuple(m.shape[1:]) for m in found] == [(24, 16, 16), (40, 8, 8), (112, 4, 4)]
    for pooled, raw in zip(found, maps, strict=True):
        torch.testing.assert_close(pooled, average_3x3(raw), rtol=1e-4, atol=1e-4)
        # Without the padding in the count the border would be larger: 9/4 in a corner.
        assert not torch.allclose(
            pooled, F.avg_pool2d(raw, 3, 1, 1, count_include_pad=False), rtol=1e-2, atol=1e-2
        )


def test_pooled_features_are_global_averages():
    extractor = FrozenExtractor(LITE0, (2, 4), pool="mean")
    images = draw(3, 96)
    features = extractor(images)
    assert features.shape == (3, extractor.channels, 1, 1) == (3, 40 + 320, 1, 1)
    means = torch.cat([m.mean(dim=(2, 3)) for m in raw_maps(extractor, images)], dim=1)
    torch.testing.assert_close(features.flatten(1), means, rtol=1e-4, atol=1e-5)


def test_assemble_resizes_bilinearly_to_the_largest_map_and_keeps_the_order():
    large = torch.arange(16.0).reshape(1, 1, 4, 4)
    small = torch.tensor([[[[0.0, 4.0], [0.0, 4.0]]]])
    joined = FrozenExtractor.assemble([small, large])
    assert joined.shape == (1, 2, 4, 4)
    assert torch.equal(joined[:, 1:], large)
    # A sample lies in the middle of its pixel: 1/4, 3/4 of the way between the two columns.
    assert torch.equal(joined[0, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]).expand(4, 4))


def test_forward_is_assembled_stage_maps(lite0):
    images = draw(2, 64)
    assert torch.equal(lite0(images), lite0.assemble(lite0.stage_maps(images)))


def test_layers_are_taken_in_the_order_of_the_backbone(lite0):
    shuffled = FrozenExtractor(LITE0, (3, 1, 2))
    assert shuffled.layers == (1, 2, 3)
    assert torch.equal(shuffled(draw(1, 64)), lite0(draw(1, 64)))


def test_network_stays_in_eval_mode_and_does_not_move():
    extractor = FrozenExtractor(LITE0, (1,))
    before = {name: tensor.clone() for name, tensor in extractor.net.state_dict().items()}
    torch.nn.Sequential(extractor).train()
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    first = extractor(draw(4, 64))
    extractor(draw(4, 64, seed=1))
    assert torch.equal(extractor(draw(4, 64)), first)
    for name, tensor in extractor.net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_no_gradient_reaches_the_network(lite0):
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    assert not lite0(draw(1, 64)).requires_grad


def test_an_image_has_the_same_features_in_any_batch(lite0):
    images = draw(5, 64)
    alone = torch.cat([lite0(image[None]) for image in images])
    torch.testing.assert_close(lite0(images), alone, rtol=1e-4, atol=1e-4)


def test_bf16_stays_close_and_returns_float32(lite0):
    extractor = FrozenExtractor(LITE0, (1, 2, 3), precision="bf16")
    features, exact = extractor(draw(1, 64)), lite0(draw(1, 64))
    assert features.dtype == torch.float32
    assert not torch.equal(features, exact)
    assert F.cosine_similarity(features.flatten(), exact.flatten(), dim=0) > 0.99


def test_unknown_backbone_gets_the_nearest_names():
    with pytest.raises(ModelError, match=r"no backbone 'resnet5O'; near it: .*\bresnet50\b"):
        FrozenExtractor("resnet5O", (1,), weights="random")
    with pytest.raises(ModelError, match=r"no backbone '!!!'$"):
        FrozenExtractor("!!!", (1,), weights="random")
    with pytest.raises(ModelError, match=r"resnet18\.nonsense: Invalid pretrained tag"):
        FrozenExtractor("resnet18.nonsense", (1,), weights="random")


@pytest.mark.parametrize("layers", [(1, 7), (-1,), (5,)])
def test_missing_layer_lists_those_there_are(layers):
    with pytest.raises(ModelError) as error:
        FrozenExtractor(LITE0, layers, weights="random")
    missing = next(layer for layer in layers if not 0 <= layer <= 4)
    assert f"{LITE0} has no stage {missing}; it has" in str(error.value)
    for stage in describe_stages(LITE0):
        assert stage in str(error.value)


def test_stages_are_described_as_timm_declares_them():
    info = timm.create_model("resnet18", features_only=True).feature_info
    stages = describe_stages("resnet18")
    assert len(stages) == len(info.channels()) == 5
    assert stages[1] == "1 (layer1, 64 channels, stride 4)"
    assert stages[4] == "4 (layer4, 512 channels, stride 32)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, r"layers \(\) must name at least one stage"),
        ({"layers": (1, 1)}, r"layers \(1, 1\) must name at least one stage, each once"),
        ({"patch_size": 2}, "patch size 2 is not a positive odd number"),
        ({"patch_size": 0}, "patch size 0 is not a positive odd number"),
        ({"feature_location": "depthwise"}, "'depthwise' is not bottleneck or expansion"),
        ({"feature_location": "expansion"}, "resnet18 has no expansion features"),
    ],
)
def test_bad_options_are_refused(options, message):
    arguments = {"layers": (1,), "weights": "random", **options}
    with pytest.raises(ModelError, match=message):
        FrozenExtractor("resnet18", **arguments)


def test_blocks_after_the_last_stage_do_not_run():
    """EfficientNet-Lite0 has 7 groups of blocks; stage 3 is the output of the fifth."""
    images = draw(2, 64)
    for layers, location, num_blocks in (((2, 3), "bottleneck", 5), ((2, 3), "expansion", 5)):
        whole = timm.create_model(
            LITE0, features_only=True, out_indices=layers, feature_location=location
        ).eval()
        cut = FrozenExtractor(
            LITE0,
            layers,
            weights="random",
            feature_location=location,
            patch_size=1,
            rewrite=False,
        )
        assert len(cut.net.blocks) == num_blocks < len(whole.blocks)
        missing = cut.net.load_state_dict(whole.state_dict(), strict=False)
        assert not missing.missing_keys
        assert all(name.startswith(("blocks.5", "blocks.6")) for name in missing.unexpected_keys)
        with torch.inference_mode():
            expected = whole(cut.pixels(images))
        for found, wanted in zip(cut.stage_maps(images), expected, strict=True):
            assert torch.equal(found, wanted)


def test_compiled_backbone_gives_the_same_features(monkeypatch):
    eager = functools.partial(torch.compile, backend="eager")  # inductor would take a minute
    monkeypatch.setattr(torch, "compile", eager)
    torch.manual_seed(0)
    plain = FrozenExtractor("resnet10t", (1, 2), weights="random")
    torch.manual_seed(0)
    compiled = FrozenExtractor("resnet10t", (1, 2), weights="random", compile_backbone=True)
    images = draw(3, 64)
    torch.testing.assert_close(compiled(images), plain(images), rtol=1e-5, atol=1e-6)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert compiled.fingerprint() != plain.fingerprint()


def test_a_backbone_that_cannot_be_compiled_is_named(monkeypatch):
    class CompilerError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def broken(_):
        raise CompilerError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda _: broken)
    extractor = FrozenExtractor("resnet10t", (1,), weights="random", compile_backbone=True)
    message = r"--compile: resnet10t could not be compiled \(No working C\+\+ compiler found\);"
    with pytest.raises(ModelError, match=message):
        extractor(draw(1, 64))


def test_fingerprint_tells_what_features_depend_on():
    torch.manual_seed(0)
    base = {"layers": (1, 2), "patch_size": 3, "pool": None, "precision": "fp32"}
    prints = []
    changes = ({"layers": (1,)}, {"patch_size": 1}, {"pool": "mean"}, {"precision": "bf16"})
    for change in ({}, *changes):
        torch.manual_seed(0)
        extractor = FrozenExtractor("resnet10t", weights="random", **{**base, **change})
        prints.append(extractor.fingerprint())
    torch.manual_seed(1)
    prints.append(FrozenExtractor("resnet10t", weights="random", **base).fingerprint())
    assert len({json.dumps(found, sort_keys=True) for found in prints}) == len(prints)
    torch.manual_seed(0)
    assert FrozenExtractor("resnet10t", weights="random", **base).fingerprint() == prints[0]


TRANSFORMERS = {
    "vit_tiny_patch16_224": (1, 4),
    "vit_small_patch14_dinov2.lvd142m": (2,),
    "vit_small_patch14_reg4_dinov2.lvd142m": (2, 11),
    "vit_small_patch16_dinov3.lvd1689m": (3, 11),
    "deit_tiny_distilled_patch16_224": (3,),
    "vit_base_patch32_clip_224.openai": (1,),
    "eva02_tiny_patch14_224": (3,),
}


@pytest.mark.parametrize("backbone", TRANSFORMERS)
def test_maps_of_blocks_are_timms_own(backbone):
    """Class and register tokens dropped, whatever the size that the patch divides."""
    layers = TRANSFORMERS[backbone]
    extractor = FrozenExtractor(backbone, layers, weights="random", patch_size=1)
    (patch,) = set(extractor.strides)
    side = 5 * patch
    extractor.require_size(side)
    torch.manual_seed(0)
    whole = timm.create_model(
        backbone, pretrained=False, **options_for_any_size(backbone), num_classes=0
    ).eval()
    state = whole.state_dict()
    for name, tensor in extractor.net.state_dict().items():
        matching = [other for other in state if canonical_name(other) == canonical_name(name)]
        state[matching[0]] = tensor
    whole.load_state_dict(state)
    images = draw(2, side)
    with torch.inference_mode():
        wanted = whole.forward_intermediates(
            extractor.pixels(images), indices=list(layers), intermediates_only=True
        )
    for found, expected in zip(extractor.stage_maps(images), wanted, strict=True):
        assert found.shape == (2, extractor.channels // len(layers), 5, 5)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("backbone", "layer", "size", "nearest"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 2, 224 + 6, "224 and 238"),
        ("vit_small_patch16_dinov3.lvd1689m", 2, 100, "96 and 112"),
        ("cait_xxs24_224", 2, 112, "are 224:"),
    ],
)
def test_a_size_that_a_transformer_cannot_take_is_refused(backbone, layer, size, nearest):
    extractor = FrozenExtractor(backbone, (layer,), weights="random")
    with pytest.raises(ModelError, match=f"no images of {size} pixels .*{nearest}"):
        extractor.require_size(size)


@pytest.mark.parametrize(
    "backbone", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "convnext_atto"]
)
def test_hierarchical_backbones_take_images_of_other_sizes(backbone):
    extractor = FrozenExtractor(backbone, (1, 2), weights="random")
    extractor.require_size(96)
    assert extractor(draw(1, 96)).shape == (1, extractor.channels, 12, 12)
