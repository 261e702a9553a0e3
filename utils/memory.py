"""How much memory a piece of work takes at most."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

SECONDS = 0.01
"""Between two looks at the memory of the process."""


@dataclass
class Peak:
    """The most memory in use so far, in bytes."""

    num_bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Give the most memory in use while a `with` block runs; known when it has ended.

    On a GPU that is what its tensors take, stored features among them, and not its libraries.
    Without one it is the resident memory of this process, libraries and stored features included,
    looked at a hundred times a second. What the C library keeps of freed memory counts, so what ran
    before in the process is part of it, unless `utils.device.return_freed_memory` came between.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    process, done = psutil.Process(), threading.Event()

    def look() -> None:
        peak.num_bytes = max(peak.num_bytes, process.memory_info().rss)

    def watch() -> None:
        while not done.wait(SECONDS):
            look()

    look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        look()
