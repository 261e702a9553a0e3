"""What tells images from any others: hashes of files and of the code that reads them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path


def digest(parts: Sequence[str]) -> str:
    """Hashes some words together with the code that reads and transforms images."""
    files = [Path(__file__).with_name(f"{name}.py") for name in ("loading", "images", "transforms")]
    text = json.dumps([*parts, *(path.read_text(encoding="utf-8") for path in files)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stamp(path: Path) -> str:
    """Says where a file is, how large it is and when it was changed, or that it is missing."""
    try:
        status = path.stat()
    except OSError:
        return f"{path.absolute()} missing"
    return f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
