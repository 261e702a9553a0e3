"""How a script meets its user: the device, and one clear message instead of a traceback."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from utils.allocator import keep_freed_memory

P = ParamSpec("P")
R = TypeVar("R")


class UsageError(Exception):
    """The command asks for something this machine or these files cannot give."""


def exits_cleanly(
    *expected: type[Exception],
    interrupted: str = "interrupted; the same command continues after what is finished",
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a script's main: expected errors end it with one message on stderr and exit code 2.

    Args:
        expected: the error classes whose message is meant for the user, as are faults of the
            machine (`machine_fault`). Anything else is a defect of ours and keeps its traceback.
        interrupted: what Ctrl-C says.
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
            except BrokenPipeError:  # whoever read our output (head, less) has seen enough
                with contextlib.suppress(OSError, ValueError):  # what is buffered would fail again
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(141) from None  # as shells report the signal
            except KeyboardInterrupt:
                sys.stderr.write(f"{interrupted}\n")
                raise SystemExit(130) from None
            except Exception as error:
                fault = machine_fault(error)
                if fault is None:
                    raise
                sys.stderr.write(f"error: {fault}\n")
                raise SystemExit(2) from error

        return guarded

    return decorate


def machine_fault(error: Exception) -> str | None:
    """Say which fault of the machine (disk, files, memory) an error is, and the way out.

    Returns:
        None for an error of another kind.
    """
    if isinstance(error, OSError) and error.errno is not None:
        place = f" ({error.filename})" if error.filename else ""
        return (
            f"{error.strerror}{place}; once that is mended, the same command continues after what "
            "is finished"
        )
    # Of the CPU's allocator, PyTorch has no error of its own.
    if (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    ):
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"out of memory ({said}); use less (--extract-batch-size, --method.batch-size, "
            "--image-size, --cache disk or none), then the same command continues after what is "
            "finished"
        )
    return None


@contextlib.contextmanager
def faults_named(what: str) -> Iterator[None]:
    """Put `what` (a category) before the message of a fault of the machine.

    Raises:
        UsageError: one happened inside of the block.
    """
    try:
        yield
    except Exception as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        raise UsageError(f"{what}: {fault}") from error


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
