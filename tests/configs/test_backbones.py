"""A transformer named on the command line gets blocks and sizes that it has."""

import pytest

from configs.command_line import parse
from pipeline.experiments import semantic_catalogue, structured_catalogue

STRUCTURED, SEMANTIC = structured_catalogue(), semantic_catalogue()


def parsed(*words, catalogue=STRUCTURED):
    return parse(words, catalogue, prog="train.py", description="Trains.")


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("vit_small_patch14_dinov2", 224),
        ("vit_base_patch14_reg4_dinov2.lvd142m", 224),
        ("vit_small_patch16_dinov3.lvd1689m", 224),
    ],
)
@pytest.mark.parametrize("method", ["noco_cf", "patchcore", "padim", "uniad"])
def test_dino_has_a_preset(backbone, size, method):
    found = parsed("mvtec", method, "--backbone", backbone)
    assert found.backbone == backbone
    assert (found.layers, found.patch_size) == ((5, 8, 11), 1)
    assert found.input_size == size


def test_what_is_said_counts_over_it():
    words = ("--layers", "3", "--patch-size", "3", "--image-size", "448", "--crop-size", "none")
    found = parsed("mvtec", "noco_cf", "--backbone=vit_small_patch14_dinov2", *words)
    assert (found.layers, found.patch_size, found.image_size) == ((3,), 3, 448)
    assert found.crop_size is None


def test_a_size_that_the_patches_do_not_divide_is_rounded_and_said(capsys):
    plain = parsed("visa", "stpm")
    assert (plain.image_size, plain.crop_size) == (256, None), "the preset that this test rounds"
    found = parsed("visa", "stpm", "--backbone", "vit_small_patch14_dinov2")
    assert (found.image_size, found.crop_size) == (252, None)
    assert "--image-size is 252 and not 256 by default" in capsys.readouterr().err


def test_semantic_data_take_the_last_block():
    words = ("cifar10", "noco_cf", "--backbone", "vit_small_patch14_dinov2.lvd142m")
    found = parsed(*words, catalogue=SEMANTIC)
    assert found.layers == (11,)
    assert found.input_size % 14 == 0


@pytest.mark.parametrize("backbone", ["vit_large_patch14_dinov2", "deit_tiny_patch16_224"])
def test_another_transformer_needs_its_blocks(backbone, capsys):
    with pytest.raises(SystemExit):
        parsed("mvtec", "noco_cf", "--backbone", backbone)
    message = capsys.readouterr().err
    assert f"--backbone {backbone} is a transformer without a preset" in message
    assert "--layers" in message
    assert parsed("mvtec", "noco_cf", "--backbone", backbone, "--layers", "3", "7").layers == (3, 7)


def test_other_backbones_leave_the_preset():
    found = parsed("mvtec", "noco_cf", "--backbone", "resnet18")
    preset = parsed("mvtec", "noco_cf")
    assert (found.layers, found.patch_size) == (preset.layers, preset.patch_size)


def test_a_method_without_backbone_still_refuses_one(capsys):
    with pytest.raises(SystemExit):
        parsed("mvtec", "draem", "--backbone", "deit_tiny_patch16_224")
    assert "--backbone does nothing for draem" in capsys.readouterr().err
