"""The device that a command line names, and what a process keeps of its memory there."""

import contextlib
import ctypes
import gc
import os
import sys

import torch

from utils.errors import UsageError

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def pick_device(name: str) -> torch.device:
    """Return the device `name` stands for: "auto", "cpu", "cuda", "cuda:1".

    "auto" is what $NOCO_DEVICE names, or else a GPU where there is one. On the CPU, freed memory
    stays in the process from here on (see `keep_freed_memory`).

    Raises:
        UsageError: unknown, or CUDA asked for and absent, or there and not to be used.
    """
    if name == "auto":
        name = os.environ.get("NOCO_DEVICE", "auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: no CUDA device is available here; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()}")
        if device.index is not None:
            torch.cuda.set_device(device)  # libraries allocate on the current one
        require_works(device, name)
    elif device.type == "cpu":
        keep_freed_memory()
    else:  # "mps" among them: it has no float64, which scoring and the closed form need
        raise UsageError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:1")
    return device


def require_works(device: torch.device, name: str) -> None:
    """Say that a GPU which PyTorch sees cannot be used, before anything is read.

    That is so where another process has all of it, where its driver is too old, or where this
    build of PyTorch has no kernels for it.

    Raises:
        UsageError: nothing can be computed on it.
    """
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--device {name}: there is a CUDA device, but it cannot be used ({said}); compute "
            "with --device cpu, or set NOCO_DEVICE=cpu in the environment"
        ) from error


def set_deterministic(wanted: bool) -> None:
    """Let PyTorch use only operations that give the same bits each time, or any.

    cuBLAS reads its setting when it is first used, so this comes before any work on a GPU.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # What is read before it is written would be a defect whatever it holds.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def wait_for_device() -> None:
    """Wait until a GPU in use has done what it was given, so that a clock tells the time of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large blocks instead of returning each to the system.

    glibc maps every block above 32 MB anew and unmaps it when freed, so the tensors of each batch
    touch fresh pages, and the page faults take longer than the arithmetic. Without effect outside
    glibc.

    Returns:
        Whether it took effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, as on Alpine
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Give back what glibc and PyTorch's CUDA keep of freed memory, for others to have it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library, as on Alpine
            ctypes.CDLL("libc.so.6").malloc_trim(0)
