import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.data_set import StructuredSet, find_data_sets
from datasets.reading.images import read_image, read_mask
from datasets.reading.masks import read_masks
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError, Sample
from datasets.tasks import structured
from datasets.tasks.structured import list_categories, task_of
from tests.datasets.trees import draw_mvtec_category, save, texture

SETS = find_data_sets(StructuredSet)


def read_category(name, root, category):
    return structured.read_category(SETS[name], root, category, SETS[name].options)


def names(samples):
    return [sample.path.name for sample in samples]


def test_mvtec_layout(tmp_path):
    draw_mvtec_category(tmp_path, "screw", num_train=3, num_good=2)
    category = read_category("mvtec", tmp_path, "screw")
    folder = tmp_path / "screw"
    assert category.name == "screw"
    assert category.has_masks
    assert category.train == tuple(
        Sample(folder / f"train/good/{index:03d}.png", label=0) for index in range(3)
    )
    assert category.test[:2] == tuple(
        Sample(folder / f"test/good/{index:03d}.png", label=0) for index in range(2)
    )
    assert category.test[2:] == tuple(
        Sample(
            folder / f"test/{defect}/{index:03d}.png",
            label=1,
            defect=defect,
            mask_path=folder / f"ground_truth/{defect}/{index:03d}_mask.png",
        )
        for defect in ("hole", "scratch")
        for index in range(2)
    )


@pytest.mark.parametrize(
    "suffix", [".png", ".jpg", ".JPEG", ".bmp", ".tif", ".TIFF", ".webp", ".ppm", ".PGM"]
)
def test_any_image_extension(tmp_path, suffix):
    folder = draw_mvtec_category(tmp_path, "nuts", num_train=2)
    for path in folder.glob("t*/*/*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if suffix == ".PGM" else "RGB"))
        path.unlink()
        save(path.with_suffix(suffix), pixels)
    category = read_category("folder", tmp_path, "nuts")
    assert len(category.train) == 2
    assert len(category.test) == 6
    assert all(sample.mask_path for sample in category.test if sample.label)
    assert read_image(category.test[-1].path).shape == (64, 64, 3)


def test_masks_without_the_mask_ending_and_of_another_format(tmp_path):
    folder = draw_mvtec_category(tmp_path, "nuts", defects=("hole",))
    mask = folder / "ground_truth/hole/000_mask.png"
    mask.rename(folder / "ground_truth/hole/000.png")
    (folder / "ground_truth/hole/001_mask.png").unlink()
    save(folder / "ground_truth/hole/001_mask.BMP", np.ones((64, 64), dtype=bool))
    category = read_category("folder", tmp_path, "nuts")
    assert [sample.mask_path.name for sample in category.test[2:]] == ["000.png", "001_mask.BMP"]


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    folder = draw_mvtec_category(tmp_path, "nuts")
    expected = read_category("folder", tmp_path, "nuts")
    for place in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (folder / place / "Thumbs.db").touch()
        (folder / place / "notes.txt").touch()
        save(folder / place / "._000.png", texture(np.random.default_rng(0), (8, 8)))
        (folder / place / "nested.png").mkdir()
    save(folder / "test/.cache/000.png", texture(np.random.default_rng(0), (8, 8)))
    assert read_category("folder", tmp_path, "nuts") == expected


def test_order_is_by_path_not_by_creation(tmp_path):
    folder = draw_mvtec_category(tmp_path, "nuts", num_train=1)
    for name in ("b", "a", "10", "9"):
        save(folder / f"train/good/{name}.png", texture(np.random.default_rng(0), (8, 8)))
    found = names(read_category("folder", tmp_path, "nuts").train)
    assert found == ["000.png", "10.png", "9.png", "a.png", "b.png"]


def test_no_ground_truth(tmp_path):
    draw_mvtec_category(tmp_path, "nuts", masks=False)
    category = read_category("folder", tmp_path, "nuts")
    assert not category.has_masks
    assert all(sample.mask_path is None for sample in category.test)
    assert sum(sample.label for sample in category.test) == 4


@pytest.mark.parametrize("lost", ["ground_truth/hole/001_mask.png", "ground_truth/hole"])
def test_missing_mask(tmp_path, lost):
    folder = draw_mvtec_category(tmp_path, "nuts")
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as caught:
        read_category("folder", tmp_path, "nuts")
    stem = "001" if path.suffix else "000"
    assert str(folder / f"test/hole/{stem}.png") in str(caught.value)
    assert str(folder / f"ground_truth/hole/{stem}_mask.png") in str(caught.value)


def test_two_masks(tmp_path):
    folder = draw_mvtec_category(tmp_path, "nuts")
    save(folder / "ground_truth/hole/000.png", np.ones((64, 64), dtype=bool))
    with pytest.raises(
        DataError, match=r"more than one mask in .*hole: 000_mask\.png and 000\.png"
    ):
        read_category("folder", tmp_path, "nuts")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("train/good/*", r"'nuts' has no training images.*nuts/train/good"),
        ("train", r"'nuts' has no training images.*nuts/train/good"),
        ("test", r"'nuts' has no test images.*nuts/test/<defect>"),
    ],
)
def test_a_split_without_images(tmp_path, lost, message):
    for path in draw_mvtec_category(tmp_path, "nuts").glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("folder", "mvtec"):
        with pytest.raises(DataError, match=message):
            read_category(name, tmp_path, "nuts")


def test_no_normal_test_images_are_allowed(tmp_path):
    draw_mvtec_category(tmp_path, "nuts", num_good=0)
    assert [sample.label for sample in read_category("folder", tmp_path, "nuts").test] == [1] * 4


@pytest.mark.parametrize(
    ("dataset", "page"),
    [
        ("mvtec", "https://www.mvtec.com/company/research/datasets/mvtec-ad"),
        ("mpdd", "https://github.com/stepanje/MPDD"),
        ("visa", "https://github.com/amazon-science/spot-diff"),
        ("folder", ""),
    ],
)
def test_missing_root(tmp_path, dataset, page):
    message = rf"{tmp_path}/absent does not exist: pass --data-root.*{re.escape(page)}"
    with pytest.raises(DataError, match=message):
        list_categories(SETS[dataset], tmp_path / "absent")
    with pytest.raises(DataError, match=message):
        read_category(dataset, tmp_path / "absent", "bottle")


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "mvtec.tar").touch()
    with pytest.raises(DataError, match=r"mvtec\.tar is not a folder"):
        list_categories(SETS["mvtec"], tmp_path / "mvtec.tar")


def test_official_categories_in_order(tmp_path):
    mpdd = SETS["mpdd"]
    for name in mpdd.categories:
        draw_mvtec_category(tmp_path, name, num_train=1)
    draw_mvtec_category(tmp_path, "another", num_train=1)
    assert list_categories(mpdd, tmp_path) == mpdd.categories
    assert list_categories(mpdd, tmp_path, ()) == mpdd.categories
    wanted = ["tubes", "connector", "tubes"]
    assert list_categories(mpdd, tmp_path, wanted) == ("tubes", "connector")


def test_missing_category_of_a_fixed_data_set(tmp_path):
    draw_mvtec_category(tmp_path, "bottle")
    draw_mvtec_category(tmp_path, "wood")
    with pytest.raises(DataError, match=r"no folder carpet, .*--categories wood bottle"):
        list_categories(SETS["mvtec"], tmp_path)
    assert list_categories(SETS["mvtec"], tmp_path, ["bottle"]) == ("bottle",)
    with pytest.raises(DataError, match=r"no folder cable: pass --categories wood bottle"):
        read_category("mvtec", tmp_path, "cable")
    with pytest.raises(DataError, match=r"no folder connector: pass --data-root.*MPDD"):
        read_category("mpdd", tmp_path, "connector")


def test_unknown_category(tmp_path):
    draw_mvtec_category(tmp_path, "metal_nut")
    message = (
        r"unknown category 'Metal_nuts'; did you mean metal_nut .*\? .*: carpet, grid, .*zipper"
    )
    with pytest.raises(DataError, match=message):
        list_categories(SETS["mvtec"], tmp_path, ["Metal_nuts"])
    with pytest.raises(DataError, match=r"unknown category 'qqqq'\. The data set mvtec has: carp"):
        list_categories(SETS["mvtec"], tmp_path, ["qqqq"])
    with pytest.raises(DataError, match=r"unknown category 'nut'.* folder has: metal_nut"):
        list_categories(SETS["folder"], tmp_path, ["nut"])


def test_categories_of_a_folder(tmp_path):
    for name in ("zebra", "ant", ".trash"):
        draw_mvtec_category(tmp_path, name)
    (tmp_path / "notes").mkdir()
    assert list_categories(SETS["folder"], tmp_path) == ("ant", "zebra")
    assert list_categories(SETS["folder"], tmp_path, ["zebra"]) == ("zebra",)


def test_folder_root_that_is_a_category(tmp_path):
    folder = draw_mvtec_category(tmp_path, "nuts")
    with pytest.raises(DataError, match=rf"is itself a category.*--data-root {tmp_path}, "):
        list_categories(SETS["folder"], folder)


def test_folder_root_without_categories(tmp_path):
    with pytest.raises(DataError, match="has no categories: each is a sub-folder that holds train"):
        list_categories(SETS["folder"], tmp_path)


def test_tasks_have_images_of_their_own(tmp_path):
    for name in ("ant", "zebra"):
        draw_mvtec_category(tmp_path, name, num_train=3, masks=name == "ant")
    folder = SETS["folder"]
    zebra, ant = structured.structured_tasks(folder, tmp_path, ["zebra", "ant"], folder.options)
    for task, name in ((ant, "ant"), (zebra, "zebra")):
        assert (task.category, task.label, task.peers) == (name, name, ())
    category = read_category("folder", tmp_path, "ant")
    assert ant.train.paths == tuple(sample.path for sample in category.train)
    assert ant.train_indices.tolist() == [0, 1, 2]
    assert ant.test.names == tuple(str(sample.path) for sample in category.test)
    assert ant.test_labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert ant.kinds == ("good", "good", "hole", "hole", "scratch", "scratch")
    assert ant.masks == tuple(sample.mask_path for sample in category.test)
    assert zebra.masks is None


def test_magnetic_tiles():
    root = Path(os.environ.get("NOCO_TEST_DATA", "nowhere"), "magnetic_tile")
    if not root.is_dir():
        pytest.skip("NOCO_TEST_DATA names no folder with magnetic_tile")
    assert list_categories(SETS["folder"], root) == ("tile",)
    category = read_category("folder", root, "tile")
    assert len(category.train) == 759
    labels = [sample.label for sample in category.test]
    assert len(labels) == 585
    assert sum(labels) == 392
    assert category.has_masks
    defects = sorted({sample.defect for sample in category.test if sample.label})
    assert defects == ["blowhole", "break", "crack", "fray", "uneven"]
    # Reading checks each mask's size against its image.
    task, transform = task_of(category), PairTransform(224, None, "opencv_square")
    whole = read_masks(task.test.paths, task.masks, transform)
    assert whole[193:].any((1, 2)).sum() >= 385
    assert not whole[:193].any()
    # Blowholes are darker than what surrounds them, if image and mask are a pair.
    blowholes = [sample for sample in category.test if sample.defect == "blowhole"]
    darker = 0
    for sample in blowholes:
        grey, mask = read_image(sample.path)[:, :, 0], read_mask(sample.mask_path)
        darker += grey[mask].mean() < grey[~mask].mean()
    assert darker > 0.8 * len(blowholes)
