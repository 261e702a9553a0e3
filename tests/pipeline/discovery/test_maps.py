"""Maps of other software: found by name, read as they are."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from datasets.samples import DataError
from pipeline.discovery.maps import MapsOfFolder, read_map


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        assert cv2.imwrite(str(path), values)
    return path


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", np.uint8), ("a.png", np.uint16), ("a.npy", np.float32)]
)
def test_values_are_those_of_the_file(tmp_path, name, kind):
    values = (np.arange(12).reshape(3, 4) * 20).astype(kind)
    found = read_map(save(tmp_path / name, values))
    assert found.dtype == kind
    assert np.array_equal(found, values)


def test_grey_saved_in_colours_and_single_channels_are_maps(tmp_path):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(read_map(save(tmp_path / "a.png", np.dstack([values] * 3))), values)
    assert np.array_equal(read_map(save(tmp_path / "b.npy", values[None])), values)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("a.npy", np.arange(24.0).reshape(2, 3, 4), "one channel"),
        ("a.npy", np.array([[0.0, np.nan]]), "finite"),
        ("a.npy", np.array([["x"]]), "finite"),
        ("a.png", np.dstack([np.full((3, 3), i, np.uint8) for i in range(3)]), "one channel"),
    ],
)
def test_what_is_no_map_is_refused(tmp_path, name, values, said):
    path = save(tmp_path / name, values)
    with pytest.raises(DataError, match=said) as refused:
        read_map(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_no_image_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("no image")
    with pytest.raises(DataError, match="cannot be read"):
        read_map(path)


def test_maps_are_paired_by_name_whatever_their_order(tmp_path):
    for i, name in enumerate(("b", "a")):
        save(tmp_path / f"maps/{name}.npy", np.full((4, 4), float(i)))
    images = [Path("photos/a.jpg"), Path("photos/b.jpg")]
    maps, scores = MapsOfFolder(tmp_path / "maps", images).of([], images, None)
    assert scores == [1, 0]
    assert [one[0, 0] for one in maps] == [1, 0]


def test_of_maps_of_one_name_the_folders_decide(tmp_path):
    for kind in ("crack", "hole"):
        save(tmp_path / f"maps/{kind}/000.png", np.zeros((4, 4), np.uint8))
    image = Path("data/tile/test/hole/000.png")
    found = MapsOfFolder(tmp_path / "maps", [image])
    assert found.files[image] == tmp_path / "maps/hole/000.png"
    with pytest.raises(DataError, match="two maps may be of"):
        MapsOfFolder(tmp_path / "maps", [Path("data/000.png")])


def test_an_image_without_a_map_is_named(tmp_path):
    save(tmp_path / "maps/a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"no map of photos.b\.jpg"):
        MapsOfFolder(tmp_path / "maps", [Path("photos/b.jpg")])
    with pytest.raises(DataError, match="no map below"):
        MapsOfFolder(tmp_path / "nowhere", [Path("photos/b.jpg")])
