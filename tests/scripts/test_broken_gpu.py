"""A machine whose GPU PyTorch sees but cannot use: what a newcomer's first run and tests meet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = """
import os
import sys
import torch
import train_mnist

def fails():
    raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\\nand more")

torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init = fails
train_mnist.main(sys.argv[1:])
"""


def run(output, *options, device=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert environment.pop("NOCO_DEVICE") == "cpu"  # tests compute there, their processes too
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if device is not None:
        environment["NOCO_DEVICE"] = device
    words = ["digits", "noco", "--method.epochs", "1", "--categories", "0", "--output", str(output)]
    quick = ["--image-size", "32", "--workers", "0", "--overlays", "0", "--cache", "host"]
    return subprocess.run(
        [sys.executable, "-c", BROKEN, *words, *quick, *options],
        env=environment,
        cwd=output,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("options", [(), ("--device", "cuda")])
def test_a_gpu_that_cannot_be_used_is_named_with_the_way_out(tmp_path, options):
    ended = run(tmp_path, *options)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "error: --device cuda: there is a CUDA device, but it cannot be used (CUDA error: all "
        "CUDA-capable devices are busy or unavailable); compute with --device cpu, or set "
        "NOCO_DEVICE=cpu in the environment"
    )
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("device", "options"), [("cpu", ()), (None, ("--device", "cpu"))])
def test_a_run_on_the_cpu_does_not_see_it(tmp_path, device, options):
    """PyTorch's optimizers would."""
    ended = run(tmp_path, *options, device=device)
    assert ended.returncode == 0, ended.stderr
    assert len(list(tmp_path.glob("*/*/results.csv"))) == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_test_asks_for_no_gpu():
    """`-n` prints what it would run."""
    made = subprocess.run(
        ["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert '-m "not gpu"' in next(line for line in made.splitlines() if "-m pytest" in line)
