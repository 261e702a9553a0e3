import os
import tempfile


def pytest_configure(config):
    """Tests reach no model hub and leave the user's cache alone; both are read at import."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    cache = tempfile.TemporaryDirectory(prefix="noco-tests-")
    os.environ["NOCO_CACHE"] = cache.name
    config.add_cleanup(cache.cleanup)
