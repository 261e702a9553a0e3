"""The folder for what can be made again: built data sets and stored features."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return $NOCO_CACHE, or a folder `noco` where the platform keeps caches."""
    cache = os.environ.get("NOCO_CACHE") or platformdirs.user_cache_dir("noco", appauthor=False)
    return Path(cache)
