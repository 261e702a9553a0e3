"""One process at a time writes into a run folder."""

import contextlib
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import RunError

_LOCK, _HOLDER = ".run.lock", ".run.holder"


def lock_run(folder: Path) -> FileLock | None:
    """Take a run folder for this process, until what is returned is let go or the process ends.

    Within one process it may be taken again: a sweep merges a run and then has its table written.

    Returns:
        The lock; None where the file system has none.

    Raises:
        RunError: another process has it; which one is named.
    """
    lock = FileLock(folder / _LOCK, thread_local=False, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = "it does not say which"
        with contextlib.suppress(OSError):
            holder = (folder / _HOLDER).read_text(encoding="utf-8")
        raise RunError(
            f"{folder}: another process works on this run ({holder}): wait for its end and start "
            "the same command again, or use another --run name"
        ) from None
    except (NotImplementedError, OSError):  # some network disks have no locks
        return None
    with contextlib.suppress(OSError):
        (folder / _HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock
