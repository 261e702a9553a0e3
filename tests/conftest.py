import os
import tempfile

import pytest

# Asserts outside of test files say what they compared as well.
pytest.register_assert_rewrite("tests.scripts.runs")


def pytest_configure(config):
    """Set what libraries read when they are imported, which is later than this.

    No test reaches a model hub or the user's cache, and none runs on a GPU unless it names one.
    With `-m "not gpu"` none sees one: a GPU that does not work fails nothing.
    Threads that wait sleep instead of spinning:
    on two cores that something else uses too, tests take half the time. Where several processes run
    tests, each has one thread.
    """
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["NOCO_DEVICE"] = "cpu"
    if config.option.markexpr == "not gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cache = tempfile.TemporaryDirectory(prefix="noco-tests-")
    os.environ["NOCO_CACHE"] = cache.name
    config.add_cleanup(cache.cleanup)
