"""How a script meets its user: one clear message instead of a traceback."""

import contextlib
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from configs.options import option_name
from datasets.samples import DataError
from models.errors import ModelError
from utils.errors import RunError, UsageError

P = ParamSpec("P")
R = TypeVar("R")


FOR_THE_USER = (UsageError, RunError, DataError, ModelError, FloatingPointError)
"""Errors whose message is meant for the user; any other is a defect of ours, or the machine's."""


def exits_cleanly(
    *expected: type[Exception],
    interrupted: str = "interrupted; the same command continues after what is finished",
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a script's main: expected errors end it with one message on stderr and exit code 2.

    Those are `FOR_THE_USER` and faults of the machine (`machine_fault`). Anything else is a defect
    of ours and keeps its traceback.

    Args:
        expected: error classes of the script's own whose message is for the user too.
        interrupted: what Ctrl-C says.
    """
    caught: tuple[type[Exception], ...] = (*FOR_THE_USER, *expected)

    def decorate(main: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(main)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            print_what_the_terminal_lacks()
            try:
                return main(*args, **kwargs)
            except caught as error:
                sys.stderr.write(f"error: {told(error)}\n")
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


@contextlib.contextmanager
def stopped_as_interrupted() -> Iterator[None]:
    """Take what else tells a process to stop for an interrupt.

    That is SIGTERM, which clusters, containers and `timeout` send, and SIGHUP, of a terminal that
    is closed. By themselves they would end this process alone: the processes that it has started,
    and what they hold of a GPU, would stay until their work is done.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, _: object) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a process that was forked from this one
        os.kill(os.getpid(), number)

    # Windows has no SIGHUP; who starts a process with nohup ignores it, to outlive the terminal.
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: handler for n in known if (handler := signal.getsignal(n)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_what_the_terminal_lacks() -> None:
    """Let stdout escape letters that its encoding has not, as stderr does: no name ends a run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def told(error: Exception) -> str:
    """Return an error's message, with the options by which it can be mended as they are typed."""
    change = error.change if isinstance(error, ModelError) else {}
    ways = [f"{what} {option_name(name, 'method.')}" for name, what in change.items()]
    return "; ".join([str(error), *ways])


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
    # Of the CPU's allocator PyTorch has no error of its own; of CUDA's, one that is no MemoryError.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
        # Of the libraries that it calls, which ask for memory of their own.
        or re.search(r"CU[A-Z]+_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)", str(error))
    ):
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"out of memory ({said}); use less (--extract-batch-size, --method.batch-size, "
            "--image-size, --cache disk or none, fewer --jobs of a sweep), then the same command "
            "continues after what is finished"
        )
    if "does not have a deterministic implementation" in str(error):
        operation = str(error).split(" does not")[0]
        return (
            f"{operation} gives other bits each time on a GPU, and --deterministic forbids that: "
            "leave it out, or compute with --device cpu"
        )
    return None


def require_device(name: str) -> None:
    """Say that a device is not there before anything is read, and hide GPUs from a run without.

    PyTorch's optimizers start any GPU that they see, also for parameters on a CPU: that takes some
    of its memory, and fails where it cannot be used. A process that has asked for it sees it still.

    Args:
        name: as `pick_device` takes it; a CPU needs no torch to be asked.

    Raises:
        UsageError: it is unknown or absent, or there and not to be used.
    """
    if name == "auto":
        name = os.environ.get("NOCO_DEVICE", "auto")
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif name != "auto":
        from utils.device import pick_device

        pick_device(name)


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
