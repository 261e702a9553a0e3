"""Features on disk: a folder for each set of images, written whole or not at all.

<folder>/<key>/entry.json    what the features are of, their shapes, which images are missing
<folder>/<key>/stage<i>.bin  the features of stage i, (N, H, W, C) without a header
<folder>/<key>/thumbnails.bin  small copies of the images, (N, 32, 32)
<folder>/partial-*/          being written; renamed when complete, so a killed run leaves no entry

The key is a hash of everything the features depend on: files (path, size, time of change),
transform, backbone, weights, versions. Two processes that extract the same features write two
partial folders; the first to finish is kept and both read it.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import torch
from torch import Tensor

from configs.cache import cache_folder
from utils.errors import UsageError

FORMAT = 3
"""Part of every key: raise it when the content of the files changes its meaning."""
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.float32, torch.uint8)}
THUMBNAILS = "thumbnails.bin"
STALE_SECONDS = 7 * 24 * 3600
"""Partial folders of another machine are leftovers after this."""


def default_folder() -> Path:
    """Return where features are kept: below $NOCO_CACHE or the platform's cache folder."""
    return cache_folder() / "features"


@dataclass(frozen=True)
class Entry:
    """A finished entry.

    Attributes:
        folder: its place; the name is the key.
        identity: what the features depend on.
        description: what the images are, for people.
        indices: position in the data set of each image.
        skipped: images that could not be read, with the reason.
        files: name, shape and dtype of each stage's file.
        seconds: time the extraction took.
    """

    folder: Path
    identity: dict[str, Any]
    description: str
    indices: list[int]
    skipped: list[str]
    files: list[tuple[str, tuple[int, ...], torch.dtype]]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Size of the features on disk."""
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.files)

    def stages(self) -> list[Tensor]:
        """Map the files into memory, (N, H, W, C) each; pages are read when they are needed.

        Raises:
            UsageError: a file is missing or has another size than it should.
        """
        return [self._mapped(*file) for file in self.files if file[0] != THUMBNAILS]

    def thumbnails(self) -> Tensor:
        """Map the small copies of the images into memory, (N, 32, 32) uint8.

        Raises:
            UsageError: the file is missing or has another size than it should.
        """
        (file,) = [file for file in self.files if file[0] == THUMBNAILS]
        return self._mapped(*file)

    def _mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != math.prod(shape) * dtype.itemsize:
            raise UsageError(f"{path} is damaged; {_clear_hint(self.folder.name)}")
        kind = str(dtype).removeprefix("torch.")
        # Copy on write: nothing is written, and PyTorch wants arrays it could write to.
        return torch.from_numpy(np.memmap(path, kind, mode="c", shape=shape))


class FeatureStore:
    """The entries below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, identity: Mapping[str, Any]) -> Entry | None:
        """Return the entry of an identity, if there is one, and note that it was used."""
        path = self.folder / key_of(identity)
        if not path.is_dir():
            return None
        with contextlib.suppress(OSError):  # a cache on a read-only disk can still be read
            os.utime(path)
        return _read_entry(path)

    def entries(self) -> list[Entry]:
        """Return all entries, the last used first."""
        if not self.folder.is_dir():
            return []
        folders = [p for p in self.folder.iterdir() if (p / "entry.json").is_file()]
        folders = [p for p in folders if not p.name.startswith("partial-")]
        folders.sort(key=lambda p: p.stat().st_mtime, reverse=True)
        return [_read_entry(path) for path in folders]

    def clear(self, keys: Sequence[str] = ()) -> list[str]:
        """Delete entries, all by default, and what killed runs left; return the keys deleted.

        A run that is reading an entry keeps what it reads.

        Raises:
            UsageError: there is no such key.
        """
        self.delete_leftovers()
        known = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        known = sorted(name for name in known if not name.startswith("partial-"))
        if unknown := sorted(set(keys) - set(known)):
            raise UsageError(f"{self.folder} has no entry {unknown[0]}; see --list")
        for key in keys or known:
            shutil.rmtree(self.folder / key)
        return list(keys or known)

    def delete_leftovers(self) -> None:
        """Delete partial folders whose process is gone."""
        if not self.folder.is_dir():
            return
        for path in self.folder.glob("partial-*"):
            if not _is_being_written(path):
                shutil.rmtree(path, ignore_errors=True)  # another process may be at it too

    @contextlib.contextmanager
    def writing(self, identity: Mapping[str, Any], needed: int) -> Iterator["EntryWriter"]:
        """Open a partial entry, which `EntryWriter.finish` completes; else it is deleted.

        Args:
            identity: what the features depend on.
            needed: bytes the whole entry will take.

        Raises:
            UsageError: the folder cannot be written to, or the disk is too full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.delete_leftovers()
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise UsageError(
                    f"{self.folder}: the features need {needed / 1e9:.1f} GB and "
                    f"{free / 1e9:.1f} GB are free; {_SPACE_HINT}"
                )
            prefix = f"partial-{socket.gethostname()}-{os.getpid()}-"
            partial = Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))
        except OSError as error:
            raise _refusal(self.folder, error) from error
        writer = EntryWriter(partial, self.folder / key_of(identity), identity)
        try:
            yield writer
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise _refusal(self.folder, error) from error
            raise
        finally:
            writer.close()
            shutil.rmtree(partial, ignore_errors=True)  # already renamed when all went well


class EntryWriter:
    """Writes the stages' maps of one batch after another."""

    def __init__(self, partial: Path, final: Path, identity: Mapping[str, Any]) -> None:
        self._partial = partial
        self._final = final
        self._identity = identity
        self._handles: list[BinaryIO] = []
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[torch.dtype] = []

    def append(self, maps: Sequence[Tensor]) -> None:
        """Write one (B, H, W, C) tensor per stage."""
        if not self._handles:
            names = [f"stage{i}.bin" for i in range(len(maps))]
            self._handles = [(self._partial / name).open("wb") for name in names]
            self._shapes = [tuple(m.shape[1:]) for m in maps]
            self._dtypes = [m.dtype for m in maps]
        for handle, stage_map in zip(self._handles, maps, strict=True):
            handle.write(stage_map.contiguous().cpu().numpy().data)

    def finish(
        self,
        indices: Sequence[int],
        skipped: Sequence[str],
        description: str,
        seconds: float,
        thumbnails: Tensor,
    ) -> Entry:
        """Complete the entry and return it, or the one another process completed first."""
        self.close()
        (self._partial / THUMBNAILS).write_bytes(thumbnails.contiguous().numpy().tobytes())
        files = [
            {"name": f"stage{i}.bin", "shape": [len(indices), *shape], "dtype": str(dtype)}
            for i, (shape, dtype) in enumerate(zip(self._shapes, self._dtypes, strict=True))
        ]
        shape, dtype = list(thumbnails.shape), str(thumbnails.dtype)
        files.append({"name": THUMBNAILS, "shape": shape, "dtype": dtype})
        entry = {
            "identity": dict(self._identity),
            "description": description,
            "indices": list(indices),
            "skipped": list(skipped),
            "files": files,
            "seconds": seconds,
        }
        (self._partial / "entry.json").write_text(json.dumps(entry), encoding="utf-8")
        try:
            self._partial.rename(self._final)
        except OSError:
            if not self._final.is_dir():
                raise
        return _read_entry(self._final)

    def close(self) -> None:
        """Close the files."""
        for handle in self._handles:
            handle.close()


def key_of(identity: Mapping[str, Any]) -> str:
    """Return the name of an identity's entry."""
    text = json.dumps([FORMAT, dict(identity)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _read_entry(folder: Path) -> Entry:
    try:
        entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        files = [(f["name"], tuple(f["shape"]), DTYPES[f["dtype"]]) for f in entry["files"]]
        if any(Path(name).name != name for name, _, _ in files):
            raise ValueError("a file lies elsewhere")
        return Entry(
            folder, entry["identity"], entry["description"], entry["indices"], entry["skipped"],
            files, float(entry["seconds"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}/entry.json is damaged; {_clear_hint(folder.name)}") from error


def _is_being_written(path: Path) -> bool:
    host, _, rest = path.name.removeprefix("partial-").rpartition("-")[0].rpartition("-")
    if host == socket.gethostname() and rest.isdigit():
        return psutil.pid_exists(int(rest))
    try:
        return time.time() - path.stat().st_mtime < STALE_SECONDS
    except FileNotFoundError:
        return False


_SPACE_HINT = (
    "free some (`python -m utils.features.bank --clear` deletes stored features), name another "
    "disk with NOCO_CACHE, or use --cache host or none"
)


def _clear_hint(key: str) -> str:
    return f"delete it with `python -m utils.features.bank --clear {key}`"


def _refusal(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"{folder}: cannot store features ({error.strerror}); {_SPACE_HINT}")
