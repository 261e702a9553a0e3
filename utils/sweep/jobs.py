"""One job of a sweep: a script's `main` and its words, run with all output going to a log file.

python -m utils.sweep.jobs    a worker: takes jobs on stdin, answers on stdout, a line of JSON each
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTERRUPTED = 130
"""Exit code by which a script says that it was interrupted from the keyboard."""
_SHOWN_LINES = 6


@dataclass(frozen=True)
class Job:
    """What an engine needs to know of a job.

    Attributes:
        name: tells it from the other jobs of the sweep.
        script: module whose `main` is called.
        argv: its words.
        log: file that gets its output; that of an earlier attempt is replaced.
    """

    name: str
    script: str
    argv: tuple[str, ...]
    log: str


@dataclass(frozen=True)
class Started:
    """A job has started, or waits in a cluster's queue."""

    name: str


@dataclass(frozen=True)
class Ended:
    """A job has ended after `seconds`; `reason` is empty, or says in a few words how it failed."""

    name: str
    seconds: float
    reason: str = ""


def run_job(job: Job) -> Ended:
    """Run a job in this process; a failure is an answer, an interrupt is not.

    Raises:
        KeyboardInterrupt: the job was interrupted.
    """
    start = time.perf_counter()
    reason = ""
    try:
        with output_to(Path(job.log)):
            reason = _call(job)
    except OSError as error:  # of the log itself: those of the job were caught inside
        reason = f"its log cannot be written: {error}"
    return Ended(job.name, round(time.perf_counter() - start, 3), reason)


def _call(job: Job) -> str:
    try:
        importlib.import_module(job.script).main(list(job.argv))
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            raise KeyboardInterrupt from None
        return f"exit code {stop.code}" if stop.code else ""
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: a defect of ours, the log has the traceback"
    finally:
        # Other workers may need it, and what the next job records is its own. Without torch nothing
        # was computed; to import it is for the script, which sets the number of its threads.
        if "torch" in sys.modules:
            from utils.device import return_freed_memory

            return_freed_memory()
    return ""


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send what this process writes to a file, output of C code and of child processes too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("wb", buffering=0) as file, contextlib.ExitStack() as stack:
        for number in (1, 2):
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(file.fileno(), number)
        # A stream of the number, not of the file: a logger that keeps it may write for ever.
        streams = [
            os.fdopen(n, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
            for n in (1, 2)
        ]
        stack.enter_context(contextlib.redirect_stdout(streams[0]))
        stack.enter_context(contextlib.redirect_stderr(streams[1]))
        for stream in streams:
            stack.callback(stream.flush)
        yield


def last_lines(log: Path, count: int = _SHOWN_LINES) -> list[str]:
    """Return the last lines of a log that are not empty; none where there is no log."""
    return _lines(log)[-count:]


def warnings_of(log: Path) -> list[str]:
    """Return what a log has of the scripts' warnings."""
    return [line for line in _lines(log) if line.startswith("warning: ")]


def _lines(log: Path) -> list[str]:
    if not log.is_file():
        return []
    text = log.read_bytes().decode("utf-8", "replace")
    # A progress bar redraws its line after a carriage return: the last state is what was seen.
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line]


def main() -> None:
    """Run jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what is written between jobs is no answer
    for line in sys.stdin:
        values = json.loads(line)
        ended = run_job(Job(values["name"], values["script"], tuple(values["argv"]), values["log"]))
        answers.write(json.dumps(dataclasses.asdict(ended)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
