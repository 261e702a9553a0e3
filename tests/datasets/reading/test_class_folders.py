import functools

import pytest
from PIL import Image

from datasets.reading.class_folders import read_cats_and_dogs, read_class_folders
from datasets.samples import DataError

read_folder = functools.partial(read_class_folders, name="folder")
read_pets = functools.partial(read_cats_and_dogs, name="cats_vs_dogs")


def write_images(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (6, 5), (200, 10, 10)).save(folder / name)


def write_class_folders(root):
    write_images(root / "train" / "screw", ["b.png", "a.JPG"])
    write_images(root / "train" / "bolt", ["0.bmp", "1.png", "2.png"])
    write_images(root / "test" / "screw", ["9.png"])
    write_images(root / "test" / "bolt", ["9.png"])
    write_images(root / "test" / "alien", ["x.png"])


def test_folder_of_classes(tmp_path):
    write_class_folders(tmp_path)
    (tmp_path / "train" / "bolt" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "bolt" / "._0.png").write_text("a resource fork")
    folder = read_folder(tmp_path)
    assert folder.class_names == ("bolt", "screw", "alien")
    assert folder.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert folder.test.labels.tolist() == [0, 1, 2]
    names = [path.name for path in folder.train.paths]
    assert names == ["0.bmp", "1.png", "2.png", "a.JPG", "b.png"]
    assert folder.test.names[2] == str(tmp_path / "test" / "alien" / "x.png")


def test_unpacked_archive_is_descended_into(tmp_path):
    write_class_folders(tmp_path / "my_set")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "my_set.zip").write_text("the archive itself")
    assert len(read_folder(tmp_path).train) == 5


def test_folder_messages(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist.*--data-root"):
        read_folder(tmp_path / "nowhere")
    write_images(tmp_path / "train" / "screw", ["a.png"])
    with pytest.raises(DataError, match=r"no train/ and test/ folders side by side.*train"):
        read_folder(tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"test holds no folder of images"):
        read_folder(tmp_path)
    (tmp_path / "train" / "bolt").mkdir()
    with pytest.raises(DataError, match=r"bolt holds no image .*\.png"):
        read_folder(tmp_path)


def test_cats_vs_dogs_with_named_test_files(tmp_path):
    write_images(tmp_path / "train" / "cat", ["cat.0.jpg", "cat.1.jpg"])
    write_images(tmp_path / "train" / "dog", ["dog.0.jpg", "dog.1.jpg"])
    write_images(tmp_path / "test", ["dog.7.jpg", "cat.5.jpg", "Cat.6.JPG", "dog.8.jpg"])
    pets = read_pets(tmp_path)
    assert pets.class_names == ("cat", "dog")
    for path, label in zip(pets.test.paths, pets.test.labels, strict=True):
        assert path.name.lower().startswith(pets.class_names[label])
    assert pets.train.labels.tolist() == pets.test.labels.tolist() == [0, 0, 1, 1]


def test_cats_vs_dogs_with_class_folders(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split / "dog", ["0.jpg", "1.jpg"])
        write_images(tmp_path / split / "cat", ["0.jpg"])
    pets = read_pets(tmp_path)
    assert pets.train.labels.tolist() == pets.test.labels.tolist() == [0, 1, 1]


def test_cats_vs_dogs_messages(tmp_path):
    write_images(tmp_path / "train" / "cat", ["cat.0.jpg"])
    write_images(tmp_path / "test", ["cat.5.jpg", "12.jpg"])
    with pytest.raises(DataError, match=r"train holds no dog: .*dog\.\*"):
        read_pets(tmp_path)
    write_images(tmp_path / "train" / "dog", ["dog.0.jpg"])
    with pytest.raises(DataError, match=r"12\.jpg: neither a cat nor a dog by its name"):
        read_pets(tmp_path)
