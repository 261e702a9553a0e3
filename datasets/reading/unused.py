"""What lies in a data set's folder, looks like an image, and is not used."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets.reading.images import IMAGE_SUFFIXES

OTHER_SUFFIXES = frozenset(
    {".avif", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".raw", ".tga"}
)
"""Of images too, but not read."""
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir"})
"""Where macOS and network disks keep copies and thumbnails; hidden folders are left out as well."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's and not the user's."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each visible folder below `folder`, itself first, with the names of its visible files.

    Links to folders are followed, each folder once. All in alphabetical order.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield Path(place), sorted(name for name in files if not is_hidden(name))


def unused_images(folder: Path, used: Iterable[Path]) -> tuple[Path, ...]:
    """Return what looks like an image by its suffix below a folder and is not among the used."""
    known = set(used)
    suffixes = IMAGE_SUFFIXES | OTHER_SUFFIXES
    return tuple(
        place / name
        for place, names in walk(folder)
        for name in names
        if Path(name).suffix.lower() in suffixes and place / name not in known
    )


def in_words(unused: Sequence[Path], folder: Path) -> str:
    """Say how many of them lie where: "3 images in train/good/day2, 1 .gif file in test/hole"."""
    counts = Counter((path.parent.relative_to(folder).as_posix(), _kind(path)) for path in unused)
    said = [
        f"{count} {one if count == 1 else several}" + ("" if place == "." else f" in {place}")
        for (place, (one, several)), count in counts.items()
    ]
    return ", ".join(said)


def _kind(path: Path) -> tuple[str, str]:
    """Say what a file is, one and several."""
    suffix = path.suffix.lower()
    if not path.exists():
        return "link that leads nowhere", "links that lead nowhere"
    if suffix in IMAGE_SUFFIXES:
        return "image", "images"
    return f"{suffix} file", f"{suffix} files"
