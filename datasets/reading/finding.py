"""Image files that a user names: files, folders, patterns; and copies of files among others."""

import glob
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets.reading.images import is_image_file
from datasets.reading.unused import walk
from datasets.samples import DataError

PREDICTIONS = "maps.json"
"""A file by which a folder of predictions with pictures is known."""


def find_images(words: Sequence[str]) -> list[Path]:
    """Find the images that words name, each once, in the order of the words.

    A folder stands for all images below it, through links too, without what is hidden or the
    system's and without what predict.py wrote. A pattern (`*`, `?`, `[]`, `**`) stands for the
    files and folders it matches, sorted. What is no folder and no pattern is taken as a file,
    whatever its suffix, so that reading it can say what is wrong with it.

    Raises:
        DataError: A folder or a pattern has no image, or there are no words.
    """
    if not words:
        raise DataError("no images: name files, folders or patterns")
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found += _images_below(path)
        elif not path.exists() and _is_pattern(path):
            # Path.glob takes no absolute pattern.
            matches = [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
            images = [image for match in matches for image in _images_at(match)]
            if not images:
                raise DataError(f"no image matches the pattern {word}")
            found += images
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def find_copies(given: Iterable[Path], known: Iterable[Path]) -> list[Path]:
    """Return which of the given files are among the known ones, by path or by content.

    Files that do not exist are no copies. Only files of equal size are read.
    """
    sizes: dict[int, list[Path]] = defaultdict(list)
    paths = set()
    for path in known:
        if path.is_file():
            paths.add(path.resolve())
            sizes[path.stat().st_size].append(path)
    contents: dict[int, set[str]] = {}
    copies = []
    for path in given:
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size in sizes and size not in contents:
            contents[size] = {content_digest(other) for other in sizes[size]}
        if path.resolve() in paths or (size in contents and content_digest(path) in contents[size]):
            copies.append(path)
    return copies


def _is_pattern(path: Path) -> bool:
    """Whether a path that does not exist is a pattern; folders may be called like one."""
    return glob.has_magic(path.name) or (glob.has_magic(str(path)) and not path.parent.is_dir())


def _images_below(folder: Path) -> list[Path]:
    images: list[Path] = []
    written: list[Path] = []  # folders of predictions
    for place, names in walk(folder):
        if PREDICTIONS in names and place != folder:
            written.append(place)
        if not any(place.is_relative_to(other) for other in written):
            images += [place / name for name in names if is_image_file(place / name)]
    if not images:
        raise DataError(f"{folder}: no image in this folder or below it")
    return sorted(images)


def _images_at(path: Path) -> list[Path]:
    return _images_below(path) if path.is_dir() else [path] * is_image_file(path)


def content_digest(path: Path) -> str:
    """Return 32 hex digits of a file's content."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
