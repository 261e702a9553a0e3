"""What a task's images and masks are: a digest of each file's content, so that a change is told.

A file is read once: its digest is kept by path, size and time of change, which a second run asks
for instead.
"""

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from datasets.reading.finding import content_digest
from datasets.reading.mvtec_layout import NORMAL, mask_files
from datasets.samples import ImageSet, Task

Contents = dict[str, dict[str, str]]
"""Group ("train/good", "test/hole", "masks/hole") -> name of a file below the data root -> digest.

Where tasks share their images, as the classes of a labelled set do, a group has one entry without a
name for all of its images: how many, and a digest of them in order."""
MISSING = "missing"
_TABLE = "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, stamp TEXT, digest TEXT)"


class Digests:
    """Digests of files, remembered on disk.

    Args:
        file: of the memory; None for none. Where it cannot be read or written, files are read.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._told: dict[tuple[Path, ...], list[str]] = {}  # of sets that several tasks share
        self._memory: sqlite3.Connection | None = None
        if file is not None:
            with contextlib.suppress(OSError, sqlite3.Error):
                file.parent.mkdir(parents=True, exist_ok=True)
                self._memory = sqlite3.connect(file, timeout=30)
                self._memory.execute(_TABLE)

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Return the digest of each file, 32 hex digits; `MISSING` of one that is not there."""
        key = tuple(paths)
        if key not in self._told:
            self._told[key] = self._of(key)
        return self._told[key]

    def _of(self, paths: Sequence[Path]) -> list[str]:
        stamps = [_stamp(path) for path in paths]
        names = [_name(path) for path in paths]
        known = self._known(names)
        found, new = [], []
        for path, name, stamp in zip(paths, names, stamps, strict=True):
            before, digest = known.get(name, ("", MISSING))
            if before != stamp:
                digest = file_digest(path)
                new.append((name, stamp, digest))
            found.append(digest)
        if new and self._memory is not None:
            with contextlib.suppress(sqlite3.Error), self._memory:
                self._memory.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", new)
        return found

    def _known(self, names: Sequence[str]) -> dict[str, tuple[str, str]]:
        known: dict[str, tuple[str, str]] = {}
        if self._memory is None:
            return known
        with contextlib.suppress(sqlite3.Error):
            for start in range(0, len(names), 500):  # SQLite takes no more than 999 at once
                some = names[start : start + 500]
                marks = ",".join("?" * len(some))
                query = f"SELECT path, stamp, digest FROM digests WHERE path IN ({marks})"
                known |= {path: (s, d) for path, s, d in self._memory.execute(query, some)}
        return known


def file_digest(path: Path) -> str:
    """Return 32 hex digits of a file's content; `MISSING` where it cannot be read."""
    try:
        return content_digest(path)
    except OSError:
        return MISSING


def contents_of(task: Task, root: Path, digests: Digests) -> Contents:
    """Return what a task's images and masks are.

    Args:
        task: whose.
        root: the data root; files below it are named from there, so that a copy elsewhere is equal.
        digests: of files.
    """
    train = [(f"train/{NORMAL}", int(i)) for i in task.train_indices]
    test = [(f"test/{kind}", i) for i, kind in enumerate(task.kinds)]
    found: Contents = {}
    sets = [(task.train, train), (task.test, test)]
    if task.validation is not None:
        validation = [(f"validation/{NORMAL}", i) for i in range(len(task.validation))]
        sets.append((task.validation, validation))
    for images, places in sets:
        if images.paths is None or task.peers:
            found |= _of_all(images, places, root, digests)
            continue
        files = [images.paths[i] for _, i in places]
        for (group, _), path, digest in zip(places, files, digests.of(files), strict=True):
            found.setdefault(group, {})[name_below(root, path)] = digest
    masks = zip(task.kinds, task.masks or (None,) * len(task.kinds), strict=True)
    pairs = [(kind, file) for kind, m in masks if m is not None for file in mask_files(m)]
    for (kind, path), digest in zip(pairs, digests.of([m for _, m in pairs]), strict=True):
        found.setdefault(f"masks/{kind}", {})[name_below(root, path)] = digest
    return found


def _of_all(
    images: ImageSet, places: Sequence[tuple[str, int]], root: Path, digests: Digests
) -> Contents:
    """Return one entry for all images of each group."""
    groups: dict[str, list[int]] = {}
    for group, index in places:
        groups.setdefault(group, []).append(index)
    paths = images.paths or ()
    of_files = digests.of(paths)
    found: Contents = {}
    for group, indices in groups.items():
        digest = hashlib.blake2b(digest_size=16)
        if images.images is not None:
            digest.update(images.images[indices].data)
        else:
            lines = [f"{name_below(root, paths[i])} {of_files[i]}\n" for i in indices]
            digest.update(os.fsencode("".join(lines)))
        found[group] = {"": f"{len(indices)} images {digest.hexdigest()}"}
    return found


def name_below(root: Path, path: Path) -> str:
    """Return a file's path from the data root, or all of it where it lies elsewhere."""
    with contextlib.suppress(ValueError):
        return path.relative_to(root).as_posix()
    return path.as_posix()


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _name(path: Path) -> str:
    """Return a path as SQLite takes it, which has no surrogates."""
    return os.fsencode(path.absolute()).decode("latin-1")
