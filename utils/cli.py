"""How a script meets its user: the device, and one clear message instead of a traceback."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from utils.allocator import keep_freed_memory

P = ParamSpec("P")
R = TypeVar("R")


class UsageError(Exception):
    """The command asks for something this machine or these files cannot give."""


def exits_cleanly(*expected: type[Exception]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a script's main: expected errors end it with one message on stderr and exit code 2.

    Args:
        expected: the error classes whose message is meant for the user. Anything else is a defect
            of ours and keeps its traceback.
    """
    caught: tuple[type[Exception], ...] = (UsageError, *expected)

    def decorate(main: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(main)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return main(*args, **kwargs)
            except caught as error:
                sys.stderr.write(f"error: {error}\n")
                raise SystemExit(2) from error
            except KeyboardInterrupt:
                sys.stderr.write("interrupted; the same command continues after what is finished\n")
                raise SystemExit(130) from None

        return guarded

    return decorate


def pick_device(name: str) -> torch.device:
    """Return the device `name` stands for: "auto", "cpu", "cuda", "cuda:1".

    On the CPU, freed memory stays in the process from here on (see `utils.allocator`).

    Raises:
        UsageError: unknown, or CUDA asked for and absent.
    """
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
    elif device.type == "cpu":
        keep_freed_memory()
    else:  # "mps" among them: it has no float64, which scoring and the closed form need
        raise UsageError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:1")
    return device
