"""What the terminal shows of a sweep: its jobs, how far it is, and how it ended."""

import os
import sys
from typing import TextIO

from tqdm import tqdm

from utils.sweep.jobs import Ended, Started
from utils.sweep.manifest import DONE, FAILED, PENDING, RUNNING, Manifest


class Progress:
    """The bar in the terminal: how many jobs have ended, how, and which run.

    Args:
        manifest: of the sweep.
        total: jobs to run.
    """

    def __init__(self, manifest: Manifest, total: int) -> None:
        self._manifest = manifest
        # A stream of its own: jobs in this process send standard error to their logs.
        self._stream: TextIO = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        self._bar = tqdm(total=total, unit="job", file=self._stream, disable=None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._stream.close()

    def show(self, event: Started | Ended) -> None:
        """Draw what has changed; failures, and without a terminal every job, get a line."""
        if isinstance(event, Ended) and (event.reason or self._bar.disable):
            how = f"failed ({event.reason})" if event.reason else "done"
            line = f"{event.name}: {how}, {event.seconds:.1f} s"
            self._bar.write(line, file=self._stream)
            self._stream.flush()
        running = [job.name for job in self._manifest.jobs.values() if job.status == RUNNING]
        others = f" and {len(running) - 1} more" if len(running) > 1 else ""
        self._bar.set_postfix_str(
            f"{self._manifest.count(DONE)} done, {self._manifest.count(FAILED)} failed; "
            f"{running[0] if running else '-'}{others}",
            refresh=False,
        )
        self._bar.update(isinstance(event, Ended))
        self._bar.refresh()


def show(manifest: Manifest) -> None:
    """Print the jobs of a sweep that is not run."""
    lines = [
        f"{'finished' if job.status == DONE else 'to run':8}  {job.command}"
        for job in manifest.jobs.values()
    ]
    lines += [f"left out  {title}: {reason}" for title, reason in manifest.left_out.items()]
    lines.append(f"{len(manifest.jobs)} jobs, {manifest.count(PENDING)} to run")
    sys.stdout.write("\n".join(lines) + "\n")


def report(manifest: Manifest) -> bool:
    """Print how a sweep ended, failures with their last words; return whether all went well."""
    counts = f"{manifest.count(DONE)} done, {manifest.count(FAILED)} failed"
    lines = [f"{len(manifest.jobs)} jobs: {counts}"]
    lines += [f"left out: {title}: {reason}" for title, reason in manifest.left_out.items()]
    failures = [
        (f"{job.name}: {job.reason}", job.message, job.command, job.log)
        for job in manifest.jobs.values()
        if job.status == FAILED
    ]
    failures += [
        (f"table of {title}: {run.reason}", run.message, run.command, run.log)
        for title, run in manifest.runs.items()
        if run.status == FAILED
    ]
    for what, message, command, log in failures:
        lines += [f"failed: {what}", *(f"    {line}" for line in message)]
        lines += [f"    alone: {command}", f"    log: {log}"]
    lines += [line for run in manifest.runs.values() if run.status == DONE for line in run.message]
    lines += [f"run folder: {folder}" for folder in manifest.run_folders()]
    lines.append(f"all of this is in {manifest.folder}: sweep.json, sweep.csv, runs.txt")
    sys.stdout.write("\n".join(lines) + "\n")
    return not failures
