"""Readers of labelled defects: two layouts, masks by name, and one error for what does not fit."""

import numpy as np
import pytest
from PIL import Image

from datasets.reading.labelled_defects import LabelledDefect, read_labelled_defects
from datasets.samples import DataError


def write(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0]), dtype=np.uint8)).save(path)
    return path


def cropped(folder):
    for kind in ("groove", "break"):
        for name in ("b", "a"):
            write(folder / "images" / kind / f"{name}.jpg")
            write(folder / "masks" / kind / f"{name}.png")
    return folder


def aebad(folder):
    """Domains below kinds; two images of one name in two of them."""
    for domain in ("same", "view"):
        for kind in ("groove", "ablation"):
            write(folder / "test" / kind / domain / "001.png")
            write(folder / "ground_truth" / kind / domain / "001.png")
        write(folder / "test" / "good" / domain / "001.png")
    return folder


def test_cropped_defects(tmp_path):
    found = read_labelled_defects(cropped(tmp_path))
    assert [(one.kind, one.image.name, one.mask.name) for one in found] == [
        ("break", "a.jpg", "a.png"),
        ("break", "b.jpg", "b.png"),
        ("groove", "a.jpg", "a.png"),
        ("groove", "b.jpg", "b.png"),
    ]
    assert all(one.is_cropped for one in found)
    assert found[0].mask == tmp_path / "masks" / "break" / "a.png"


def test_whole_images_with_domains(tmp_path):
    found = read_labelled_defects(aebad(tmp_path))
    assert found[0] == LabelledDefect(
        tmp_path / "test/ablation/same/001.png",
        tmp_path / "ground_truth/ablation/same/001.png",
        "ablation",
        is_cropped=False,
    )
    assert [one.kind for one in found] == ["ablation"] * 2 + ["groove"] * 2
    assert [one.image.parent.name for one in found] == ["same", "view"] * 2
    assert all(one.image.parent.name == one.mask.parent.name for one in found)


def test_masks_of_mvtec_are_found_by_name_not_by_place(tmp_path):
    for name in ("000", "000_b", "001"):
        write(tmp_path / "test" / "crack" / f"{name}.png")
        write(tmp_path / "ground_truth" / "crack" / f"{name}_mask.png")
    found = read_labelled_defects(tmp_path)
    assert [(one.image.stem, one.mask.stem) for one in found] == [
        ("000", "000_mask"),
        ("000_b", "000_b_mask"),
        ("001", "001_mask"),
    ]


def test_hidden_files_and_others_are_left(tmp_path):
    cropped(tmp_path)
    write(tmp_path / "images" / "break" / ".a.png")
    (tmp_path / "images" / "break" / "notes.txt").write_text("no image")
    (tmp_path / "masks" / ".cache").mkdir()
    assert len(read_labelled_defects(tmp_path)) == 4


def refused(folder, words):
    with pytest.raises(DataError, match=words):
        read_labelled_defects(folder)


def test_layouts_that_are_none(tmp_path):
    refused(tmp_path / "nowhere", r"nowhere does not exist")
    (tmp_path / "images").mkdir()
    refused(tmp_path, r"must have either images/ and masks/ .* it has: images$")
    (tmp_path / "masks").mkdir()
    refused(tmp_path, r"masks has no folder: expected .*masks/<kind>/<mask>")
    aebad(tmp_path)
    refused(tmp_path, r"it has: ground_truth, images, masks, test$")


def test_a_missing_mask(tmp_path):
    write(aebad(tmp_path) / "test" / "groove" / "view" / "002.png")
    words = r"view/002.png has no mask: expected .*groove/view/002.png or .*view/002_mask.png"
    refused(tmp_path, words)


def test_a_mask_in_another_domain_is_none(tmp_path):
    aebad(tmp_path)
    (tmp_path / "ground_truth/groove/view/001.png").rename(
        tmp_path / "ground_truth/groove/same/002.png"
    )
    refused(tmp_path, r"groove/view/001.png has no mask")


def test_a_mask_without_an_image(tmp_path):
    write(cropped(tmp_path) / "masks" / "break" / "c.png")
    refused(tmp_path, r"the mask .*break/c.png has no image in .*images/break: add it, or remove")


def test_two_files_of_one_name(tmp_path):
    second = write(cropped(tmp_path) / "images" / "break" / "a.png")
    refused(tmp_path, r"break/a.jpg and .*break/a.png are images of one name.*keep one")
    second.unlink()
    write(tmp_path / "masks" / "break" / "a_mask.png")
    refused(tmp_path, r"a.png and .*a_mask.png are masks of one name, for the image .*keep one")


def test_kinds_on_one_side_only(tmp_path):
    aebad(tmp_path)
    write(tmp_path / "test" / "normal" / "001.png")
    refused(
        tmp_path, r"test/normal has no folder of masks .*a folder of normal images is called good"
    )
    (tmp_path / "test" / "normal" / "001.png").unlink()
    (tmp_path / "test" / "normal").rmdir()
    write(tmp_path / "ground_truth" / "fracture" / "001.png")
    refused(tmp_path, r"test/fracture holds no image")
    cropped(tmp_path / "crops")
    write(tmp_path / "crops" / "images" / "good" / "a.png")
    refused(tmp_path / "crops", r"images/good has no folder of masks .*: add it, or remove")


def test_empty_folders(tmp_path):
    cropped(tmp_path)
    (tmp_path / "masks" / "dent").mkdir()
    refused(tmp_path, r"images/dent holds no image")


def test_masks_of_another_size(tmp_path):
    write(cropped(tmp_path) / "masks" / "groove" / "b.png", size=(6, 8))
    refused(
        tmp_path, r"groove/b.png is 6 x 8 pixels, its image .*b.jpg is 8 x 6 \(width x height\)"
    )
