"""Whether Ray can be tested here."""

import functools
import subprocess
import sys

import pytest

START = "import ray; ray.init(num_cpus=1, include_dashboard=False); ray.shutdown()"


def require_ray():
    """Skip a test where Ray is not installed, or a plain start of it fails or hangs."""
    pytest.importorskip("ray", reason="ray is not installed (requirements-ray.txt)")
    if (problem := _problem()) is not None:
        pytest.skip(f"ray does not start on this machine: {problem}")


@functools.cache
def _problem():
    try:
        done = subprocess.run(
            [sys.executable, "-c", START], capture_output=True, text=True, timeout=90, check=False
        )
    except subprocess.TimeoutExpired:
        return "no answer within 90 seconds"
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
