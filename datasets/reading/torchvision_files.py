"""CIFAR and MNIST as decoded arrays, from torchvision's folders; downloaded when absent."""

import contextlib
import gzip
import http.client
import io
import math
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.datasets.utils import check_integrity

from datasets.samples import DataError
from datasets.tasks.labelled import LabelledSet, LabelledSplit

_TIMEOUT_SECONDS = 10.0
_DOWNLOAD_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    http.client.HTTPException,
    tarfile.TarError,
    zlib.error,
)
_IDX_FILES = tuple(
    f"{split}-{content}-ubyte"
    for split in ("train", "t10k")
    for content in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True)
class _Source:
    """Where a data set is, in torchvision's layout.

    Attributes:
        reader: torchvision's class.
        folder: Below the data root.
        files: What the folder must hold.
        suffixes: What may follow each of those names.
        url: Where torchvision downloads from.
        archive: The file a user may have downloaded into the data root; None for several files.
    """

    reader: type[CIFAR10] | type[MNIST]
    folder: Path
    files: tuple[str, ...]
    suffixes: tuple[str, ...]
    url: str
    archive: str | None


def _cifar(reader: type[CIFAR10]) -> _Source:
    files = [name for name, _ in reader.train_list + reader.test_list]
    files.append(str(reader.meta["filename"]))
    return _Source(
        reader=reader,
        folder=Path(reader.base_folder),
        files=tuple(files),
        suffixes=("",),
        url=reader.url,
        archive=reader.filename,
    )


def _mnist(reader: type[MNIST]) -> _Source:
    return _Source(
        reader=reader,
        folder=Path(reader.__name__, "raw"),
        files=_IDX_FILES,
        suffixes=("", ".gz"),
        url=reader.mirrors[0],
        archive=None,
    )


_SOURCES = {
    "cifar10": _cifar(CIFAR10),
    "cifar100": _cifar(CIFAR100),
    "mnist": _mnist(MNIST),
    "fashion_mnist": _mnist(FashionMNIST),
}
_CLASS_NAMES = {
    "mnist": tuple(str(digit) for digit in range(10)),
    # torchvision's names hold a slash and blanks, and a class name becomes part of a file name.
    "fashion_mnist": (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
    ),
}


def read_torchvision_set(name: str, root: Path) -> LabelledSet:
    """Reads "cifar10", "cifar100" (fine classes), "mnist" or "fashion_mnist".

    The files are looked for under root in torchvision's layout, in a folder of the data set's name,
    and in root itself; MNIST's also still packed. A folder that is only read may be read-only.
    Where nothing is found they are downloaded into root, in torchvision's layout.

    Raises:
        DataError: The files are absent and cannot be downloaded, incomplete or damaged.
    """
    source = _SOURCES[name]
    folder = _find(name, source, root)
    if folder is None:
        folder = _download(name, source, root)
    if issubclass(source.reader, CIFAR10):
        return _read_cifar(name, source.reader, folder, source.url)
    return _read_mnist(name, source, folder)


def _find(name: str, source: _Source, root: Path) -> Path | None:
    incomplete: list[tuple[Path, list[str]]] = []
    for base in (root, root / name, root / source.reader.__name__):
        for folder in (base / source.folder, base / source.folder.name, base):
            missing = [file for file in source.files if not _existing(source, folder, file)]
            if len(missing) == len(source.files) or _is_of_another_set(name, folder):
                continue
            if not missing:
                return folder
            incomplete.append((folder, missing))
    if incomplete:
        folder, missing = incomplete[0]
        raise DataError(
            f"{folder} lacks {', '.join(missing)} of {name}; add what is missing from "
            f"{source.url}, or remove the other files to download all again"
        )
    return None


def _existing(source: _Source, folder: Path, file: str) -> Path | None:
    paths = (folder / f"{file}{suffix}" for suffix in source.suffixes)
    return next((path for path in paths if path.is_file()), None)


def _is_of_another_set(name: str, folder: Path) -> bool:
    """Whether a folder's name says that its files, equal by name, are another set's."""
    rivals = {key for key in _SOURCES if _SOURCES[key].files == _SOURCES[name].files}
    key_of_plain = {key.replace("_", ""): key for key in rivals}
    for part in reversed(folder.resolve().parts[-3:]):
        key = key_of_plain.get(part.lower().replace("_", "").replace("-", ""))
        if key is not None:
            return key != name
    return False


def _download(name: str, source: _Source, root: Path) -> Path:
    """Downloads next to the final place and moves there what is complete."""
    target = root / source.folder
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=root) as scratch,
            _quiet_network(),
        ):
            if source.archive is not None:
                _link_archive(source, root, Path(scratch))
            source.reader(scratch, download=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / source.folder).rename(target)
    except _DOWNLOAD_ERRORS as error:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        packed = source.archive or f"{', '.join(source.files)} (each also as .gz)"
        place = root if source.archive else target
        raise DataError(
            f"{name} is neither in {target} nor could it be downloaded from {source.url} "
            f"({_reason(error)}). Download {packed} by hand into {place}, "
            f"or name the folder that holds {source.folder} with --data-root"
        ) from error
    return target


def _link_archive(source: _Source, root: Path, scratch: Path) -> None:
    """Lets torchvision unpack an archive that the user has downloaded; a damaged one is ignored."""
    archive = root / source.reader.filename
    if check_integrity(archive, source.reader.tgz_md5):
        (scratch / archive.name).symlink_to(archive.resolve())


@contextlib.contextmanager
def _quiet_network() -> Iterator[None]:
    """Ends a connection that does not answer and drops what torchvision prints, but not its bar."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: BaseException) -> str:
    # torchvision lists every mirror it tried; the last line says why the last one failed.
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _read_cifar(name: str, reader: type[CIFAR10], folder: Path, url: str) -> LabelledSet:
    folder = folder.resolve()
    # The folder may have another name than torchvision's; its checksums are verified all the same,
    # before anything is unpickled.
    renamed = type(reader.__name__, (reader,), {"base_folder": folder.name})
    try:
        train, test = renamed(folder.parent, train=True), renamed(folder.parent, train=False)
    except RuntimeError as error:
        raise DataError(
            f"a file in {folder} has not the official checksum of {reader.__name__}; "
            f"remove the folder and unpack {url} again"
        ) from error
    return LabelledSet(
        name=name,
        class_names=tuple(train.classes),
        train=LabelledSplit(
            "train", images=train.data, labels=np.array(train.targets, dtype=np.int64)
        ),
        test=LabelledSplit("test", images=test.data, labels=np.array(test.targets, dtype=np.int64)),
    )


def _read_mnist(name: str, source: _Source, folder: Path) -> LabelledSet:
    class_names = _CLASS_NAMES[name]
    splits = []
    for split in ("train", "t10k"):
        images = _read_idx(source, folder, f"{split}-images-idx3-ubyte")  # (N, 28, 28)
        labels = _read_idx(source, folder, f"{split}-labels-idx1-ubyte")  # (N,)
        if len(images) != len(labels):
            raise DataError(
                f"{folder}: {len(images)} images but {len(labels)} labels in {split}-*; "
                "download the files again"
            )
        if labels.max(initial=0) >= len(class_names):
            raise DataError(
                f"{folder}: {split}-labels-idx1-ubyte holds the label {labels.max()}, "
                f"above {len(class_names) - 1}; download the file again"
            )
        splits.append((images, labels.astype(np.int64)))
    (train_images, train_labels), (test_images, test_labels) = splits
    return LabelledSet(
        name=name,
        class_names=class_names,
        train=LabelledSplit("train", images=train_images, labels=train_labels),
        test=LabelledSplit("test", images=test_images, labels=test_labels),
    )


def _read_idx(source: _Source, folder: Path, file: str) -> np.ndarray:
    """Reads an idx file of bytes, plain or packed: torchvision reads them from unpacked files only.

    The layout is two zero bytes, the type (8: unsigned bytes), the number of axes, the length of
    each axis as a big-endian 32-bit integer, then the values.
    """
    path = _existing(source, folder, file)
    assert path is not None, "found before"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; download the file again") from error
    num_axes = int(file[-len("3-ubyte")])  # the file's name states it: idx3 or idx1
    header_size = 4 + 4 * num_axes
    header = content[:header_size]
    if len(header) < header_size or header[:4] != bytes([0, 0, 8, num_axes]):
        raise DataError(f"{path} is no idx file of {num_axes} axes; download it again")
    shape = np.frombuffer(header, dtype=">u4", offset=4).tolist()
    if len(content) - header_size != math.prod(shape):
        raise DataError(
            f"{path} holds {len(content) - header_size} values where its header says "
            f"{' x '.join(map(str, shape))}; download it again"
        )
    values = np.frombuffer(content, dtype=np.uint8, offset=header_size)
    return values.reshape(shape).copy()  # (N, 28, 28) or (N,)
