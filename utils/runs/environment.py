"""What a run was made with: command, commit, versions and machine."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def environment_record(command: Sequence[str], device: str) -> dict[str, Any]:
    """Return what environment.json records of one start; commit is None outside a checkout."""
    import torch  # only who computes records this

    commit, dirty = _git_state(Path(__file__).parents[2])
    packages = ("torch", "torchvision", "timm", "numpy")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name()
    return {
        "command": shlex.join(command),
        "folder": str(Path.cwd()),
        "commit": commit,
        "dirty": dirty,
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "platform": platform.platform(),
        "device": device,
        "device_name": name,
        **(_cuda_record(device) if device.startswith("cuda") else {}),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cuda_record(device: str) -> dict[str, Any]:
    """Return what numbers of a GPU depend on; the driver is None where nvidia-smi does not run."""
    import torch

    from models.features.matmul import fp32_settings

    products, convolutions = fp32_settings()
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "capability": f"{major}.{minor}",
        "fp32_products": products,
        "fp32_convolutions": convolutions,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _driver() -> str | None:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(found.stdout.splitlines()), "").strip() or None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit checked out in `root` and whether files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip

    try:
        # Unpacked inside another checkout, the suite would report that one's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None
