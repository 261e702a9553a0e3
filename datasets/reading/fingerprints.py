"""What tells images from any others: hashes of files, transforms, and what reads them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import PIL

VERSION = 1
"""Raise it with any change of this package, or of `datasets.synthetic`, that changes a pixel:
stored features are then not read."""


def digest(parts: Sequence[str]) -> str:
    """Hashes some words together with the versions of what reads and resizes images."""
    text = json.dumps([*parts, VERSION, PIL.__version__, cv2.__version__])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stamp(path: Path) -> str:
    """Says where a file is, how large it is and when it was changed, or that it is missing."""
    try:
        status = path.stat()
    except OSError:
        return f"{path.absolute()} missing"
    return f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
