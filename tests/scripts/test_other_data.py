"""A run knows which images, masks and weights it was made of, and is not taken up with others."""

import re
import shutil

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import predict
import sweep
import train_mnist
import train_mvtec
from tests.datasets.trees import draw_mvtec_category
from tests.scripts.runs import IMAGES, refusal, words_of
from utils.runs.made_of import load_made_of, made_of_file


@pytest.fixture
def root(tmp_path):
    for name in ("cloth", "wood"):
        draw_mvtec_category(tmp_path / "images", name, num_train=6, num_good=4, num_defective=3)
    return tmp_path / "images"


def command(root, tmp_path, *options):
    return words_of(root, tmp_path, "knn", "--image-size", "32", "--run", "mine", *options)


def move_defects(folder):
    """Take two holes for normal images."""
    for number in range(2):
        (folder / f"test/hole/00{number}.png").rename(folder / f"test/good/moved{number}.png")
        (folder / f"ground_truth/hole/00{number}_mask.png").unlink()


def test_moved_and_removed_images_are_named(root, tmp_path, capsys):
    words = command(root, tmp_path)
    folder = train_mvtec.main(words)
    table = (folder / "table.md").read_bytes()
    assert train_mvtec.main(words) == folder
    move_defects(root / "wood")
    (root / "wood/train/good/000.png").unlink()
    message = refusal(capsys, train_mvtec.main, *words)
    assert "wood, seed 0 was made of other data" in message
    assert "2 files moved from test/hole to test/good" in message
    assert "2 files gone from masks/hole" in message
    assert "1 file gone from train/good" in message
    assert "--restart" in message
    assert (folder / "table.md").read_bytes() == table
    train_mvtec.main([*words, "--restart"])
    train_mvtec.main(words)


def test_a_half_finished_run_does_not_go_on_with_other_data(root, tmp_path, capsys):
    broken = sorted((root / "wood/test/good").iterdir())[0]
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    refusal(capsys, train_mvtec.main, *command(root, tmp_path))
    broken.write_bytes(whole)
    for name in ("cloth", "wood"):
        (root / name / "train/good/001.png").unlink()
    message = refusal(capsys, train_mvtec.main, *command(root, tmp_path))
    assert "cloth, seed 0 was made of other data" in message


def test_a_corrected_mask_and_a_changed_image_are_others(root, tmp_path, capsys):
    folder = train_mvtec.main(command(root, tmp_path))
    mask = root / "cloth/ground_truth/hole/000_mask.png"
    Image.fromarray(255 - np.asarray(Image.open(mask))).save(mask)
    message = refusal(capsys, train_mvtec.main, *command(root, tmp_path))
    assert "1 file of masks/hole changed" in message
    # An evaluation sees the masks, but none of the training images.
    assert "changed" in refusal(capsys, evaluate.main, folder, "--device", "cpu")
    train_mvtec.main([*command(root, tmp_path), "--restart"])
    (root / "cloth/train/good/000.png").unlink()
    assert evaluate.main([str(folder), "--device", "cpu"]) == 0


def test_a_copy_of_the_data_elsewhere_is_the_same(root, tmp_path):
    folder = train_mvtec.main(command(root, tmp_path))
    root.rename(tmp_path / "moved")
    there = ["--data-root", str(tmp_path / "moved"), "--device", "cpu"]
    assert evaluate.main([str(folder), *there]) == 0


def test_replaced_weights_are_told(root, tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), file)
    words = command(root, tmp_path, "--backbone", "resnet18", "--weights", str(file))
    train_mvtec.main([*words, "--layers", "2"])
    state = load_file(file)
    save_file({name: tensor * 2 for name, tensor in state.items()}, file)
    message = refusal(capsys, train_mvtec.main, *words, "--layers", "2")
    assert "a file that the options name (--weights or the method's) has changed" in message


def test_a_sweep_does_not_take_other_data_for_done(root, tmp_path, capsys):
    words = ["--datasets", "train_mvtec:folder", "--methods", "knn", "--data-roots", str(root)]
    words += ["--output", str(tmp_path / "swept"), "--", *IMAGES, "--image-size", "32"]
    sweep.main(words)
    sweep.main(words)
    move_defects(root / "wood")
    message = refusal(capsys, sweep.main, *words)
    assert "wood, seed 0 was made of other data" in message
    shutil.rmtree(tmp_path / "swept")
    sweep.main(words)


def test_calibration_refuses_training_images_that_are_gone_from_their_place(root, tmp_path, capsys):
    folder = train_mvtec.main(command(root, tmp_path, "--categories", "cloth"))
    copy = shutil.copy(root / "cloth/train/good/000.png", tmp_path / "copy.png")
    shutil.rmtree(root)
    message = refusal(capsys, predict.main, folder, copy, "--calibrate", "--device", "cpu")
    assert "1 of 1 images are training images" in message


def test_a_run_of_an_earlier_version_is_continued_with_a_warning(root, tmp_path, capsys):
    folder = train_mvtec.main(command(root, tmp_path))
    shutil.rmtree(folder / "data")
    train_mvtec.main(command(root, tmp_path))
    assert "did not keep of which data" in capsys.readouterr().err


def test_labelled_images_are_one_entry_a_class(tmp_path):
    words = ["digits", "knn", "--output", str(tmp_path), "--image-size", "32", "--overlays", "0"]
    folder = train_mnist.main([*words, "--categories", "3", "--workers", "0"])
    made_of = load_made_of(made_of_file(folder, "3", 0))
    assert re.fullmatch(r"\d+ images [0-9a-f]{32}", made_of.images["train/good"][""])
    assert len([group for group in made_of.images if group.startswith("test/")]) == 10
