import gzip
import hashlib
import os
import pickle
import socket
import tarfile
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets.cifar
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

from datasets.data_set import SemanticSet, find_data_sets
from datasets.samples import DataError
from datasets.sets.cifar100_coarse import FINE_OF_COARSE

SPLITS = {"train": 30, "t10k": 20}


def read_set(name, root):
    return find_data_sets(SemanticSet)[name].read(root)


@pytest.fixture
def no_network(monkeypatch):
    """Makes every connection fail at once; returns the addresses that were asked for."""
    asked = []

    def refuse(request, *args, **kwargs):
        asked.append(request.full_url)
        assert socket.getdefaulttimeout() is not None, "a silent server would block for ever"
        raise URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


@pytest.fixture
def any_checksum(monkeypatch):
    """Lets torchvision accept small files in place of the official ones."""

    def exists(path, md5=None):
        return Path(path).is_file()

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", exists)


def write_idx(path, values, packed):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_mnist(folder, packed=True):
    """Writes small idx files; returns images (N, 28, 28) and labels (N,) of each split."""
    rng = np.random.default_rng(0)
    written = {}
    for split, size in SPLITS.items():
        images = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = np.arange(size) % 10
        write_idx(folder / f"{split}-images-idx3-ubyte", images, packed)
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels, packed)
        written[split] = (images, labels)
    return written


def write_cifar(folder, reader, class_names, label_key):
    """Writes the pickles of CIFAR, two images a file; returns the training images as HWC."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    train = []
    for name, _ in reader.train_list + reader.test_list:
        data = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        (folder / name).write_bytes(
            pickle.dumps({"data": data, label_key: [0, len(class_names) - 1]})
        )
        if name in dict(reader.train_list):
            train.append(data.reshape(2, 3, 32, 32).transpose(0, 2, 3, 1))  # (2, 32, 32, 3)
    meta = {reader.meta["key"]: list(class_names)}
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps(meta))
    return np.concatenate(train)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inner", ["MNIST/raw", "raw", ".", "mnist", "mnist/MNIST/raw", "MNIST"])
def test_mnist_layouts(tmp_path, inner, packed, no_network):
    written = write_mnist(tmp_path / inner, packed)
    before = sorted(tmp_path.rglob("*"))
    mnist = read_set("mnist", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    np.testing.assert_array_equal(mnist.train.images, written["train"][0])
    np.testing.assert_array_equal(mnist.test.images, written["t10k"][0])
    np.testing.assert_array_equal(mnist.test.labels, written["t10k"][1])
    assert mnist.test.labels.dtype == np.int64
    assert mnist.train.names[7] == "train/7"
    assert mnist.test.names[0] == "test/0"
    assert not no_network


def test_fashion_mnist_is_not_taken_from_the_folder_of_mnist(tmp_path, no_network):
    write_mnist(tmp_path / "MNIST" / "raw")
    for root in (tmp_path, tmp_path / "MNIST", tmp_path / "MNIST" / "raw"):
        with pytest.raises(DataError, match="fashion_mnist is neither in"):
            read_set("fashion_mnist", root)
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    fashion = read_set("fashion_mnist", tmp_path)
    assert fashion.class_names[0] == "t-shirt"
    assert not any("/" in name or " " in name for name in fashion.class_names)


def test_incomplete_mnist_names_the_missing_file(tmp_path, no_network):
    write_mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte of mnist"):
        read_set("mnist", tmp_path)
    assert not no_network


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: gzip.compress(content)[:-20], "cannot read"),
        (lambda content: content, "cannot read"),
        (lambda content: gzip.compress(content[:-1]), "holds 15679 values"),
        (lambda content: gzip.compress(b"\0\0\x09" + content[3:]), "no idx file of 3 axes"),
        (lambda content: gzip.compress(content[:9]), "no idx file of 3 axes"),
    ],
)
def test_damaged_mnist_names_the_file(tmp_path, damage, message):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(DataError, match=message) as caught:
        read_set("mnist", tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"), [(np.full(20, 10), "label 10"), (np.zeros(19), "20 images but 19")]
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, message):
    write_mnist(tmp_path, packed=False)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels, packed=False)
    with pytest.raises(DataError, match=message):
        read_set("mnist", tmp_path)


def test_real_mnist():
    root = os.environ.get("NOCO_TEST_DATA")
    if root is None or not Path(root, "MNIST", "raw").is_dir():
        pytest.skip("NOCO_TEST_DATA names no folder with MNIST/raw")
    mnist = read_set("mnist", Path(root))
    assert mnist.train.images.shape == (60000, 28, 28)
    assert mnist.test.images.shape == (10000, 28, 28)
    counts = np.bincount(mnist.train.labels) + np.bincount(mnist.test.labels)
    # Counted over both splits, so that it holds in any order of the images.
    assert counts.tolist() == [6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958]


@pytest.mark.parametrize("inner", ["cifar-10-batches-py", "cifar10", "."])
def test_cifar10_layouts(tmp_path, inner, any_checksum, no_network):
    names = [f"class{number}" for number in range(10)]
    root = tmp_path / "my data"
    train = write_cifar(root / inner, CIFAR10, names, "labels")
    cifar = read_set("cifar10", root)
    np.testing.assert_array_equal(cifar.train.images, train)
    assert cifar.train.labels.tolist() == [0, 9] * 5
    assert cifar.test.images.shape == (2, 32, 32, 3)
    assert cifar.class_names == tuple(names)
    assert not no_network


def test_cifar100_fine_and_coarse(tmp_path, any_checksum):
    fine_names = sorted(fine for group in FINE_OF_COARSE.values() for fine in group)
    write_cifar(tmp_path / "cifar-100-python", CIFAR100, fine_names, "fine_labels")
    fine = read_set("cifar100", tmp_path)
    assert len(fine.class_names) == 100
    assert fine.train.labels.tolist() == [0, 99]
    coarse = read_set("cifar100_coarse", tmp_path)
    assert coarse.class_names == tuple(FINE_OF_COARSE)
    named = [coarse.class_names[label] for label in coarse.train.labels]
    assert named == ["fruit_and_vegetables", "non-insect_invertebrates"]  # apple, worm
    np.testing.assert_array_equal(coarse.train.images, fine.train.images)


def test_cifar_with_a_wrong_checksum_is_refused_before_it_is_unpickled(tmp_path, no_network):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    write_cifar(tmp_path / "cifar-10-batches-py", CIFAR10, range(10), "labels")
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not the official checksum of CIFAR10"):
        read_set("cifar10", tmp_path)
    assert not (tmp_path / "exploded").exists()
    assert not no_network


def test_a_downloaded_archive_is_unpacked(tmp_path, monkeypatch, any_checksum, no_network):
    write_cifar(tmp_path / "made" / "cifar-10-batches-py", CIFAR10, range(10), "labels")
    root = tmp_path / "root"
    root.mkdir()
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert read_set("cifar10", root).train.labels.tolist() == [0, 9] * 5
    assert sorted(path.name for path in root.iterdir()) == ["cifar-10-batches-py", archive.name]
    assert not no_network


@pytest.mark.parametrize(
    ("dataset", "folder", "url"),
    [
        ("cifar10", "cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/cifar-10-python"),
        ("cifar100_coarse", "cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-"),
        ("mnist", "MNIST/raw", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
        ("fashion_mnist", "FashionMNIST/raw", "http://fashion-mnist.s3-website"),
    ],
)
def test_absent_set_says_where_it_looked_and_leaves_nothing_behind(
    tmp_path, dataset, folder, url, no_network, capsys
):
    root = tmp_path / "data" / "here"
    timeout = socket.getdefaulttimeout()
    with pytest.raises(DataError) as caught:
        read_set(dataset, root)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(root / folder), url, "--data-root", "no network in this test"):
        assert part in message
    assert no_network, "a download was tried"
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == timeout
    assert capsys.readouterr() == ("", "")


def test_failed_download_keeps_what_the_root_held(tmp_path, no_network):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(DataError):
        read_set("mnist", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_download_moves_the_complete_files_into_place(tmp_path, monkeypatch, capsys):
    def download(self):
        print("Downloading ...")  # noqa: T201
        write_mnist(Path(self.raw_folder), packed=False)

    monkeypatch.setattr(MNIST, "download", download)
    root = tmp_path / "new"
    assert len(read_set("mnist", root).train) == SPLITS["train"]
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    assert len(list((root / "MNIST" / "raw").iterdir())) == 4
    assert capsys.readouterr() == ("", "")
