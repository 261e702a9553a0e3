"""The folder for what can be made again: built data sets and stored features."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return $NOCO_CACHE, or a folder `noco` where the platform keeps caches."""
    if named := os.environ.get("NOCO_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "noco"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/noco"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noco"
