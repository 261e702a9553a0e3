"""The folder of a sweep: its jobs and what became of them, logs, and the list of run folders.

sweep.json   the command, the runs and all jobs, with status, seconds and the reason of a failure
sweep.csv    the jobs, a row each
runs.txt     the run folders that are complete, a line each
"""

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from utils.runs.files import read_object, write_text
from utils.sweep.jobs import last_lines, warnings_of

PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"


@dataclass
class JobRecord:
    """One job in the manifest.

    Attributes:
        name: tells it from the other jobs.
        run: what it is a part of.
        category: of the job.
        seed: of the job.
        status: "pending", "running", "done" or "failed".
        seconds: of its last attempt; None where another sweep finished it.
        run_folder: where it leaves its results.
        log: its output.
        command: runs it alone.
        reason: of a failure, in a few words.
        message: the last lines of a failed job's output.
    """

    name: str
    run: str
    category: str
    seed: int
    run_folder: str
    log: str
    command: str
    status: str = PENDING
    seconds: float | None = None
    reason: str = ""
    message: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """The run that the jobs of a combination make together; fields as in `JobRecord`.

    Where it is complete, `message` has the warnings of the command that wrote its table.
    """

    run_folder: str
    status: str
    command: str
    log: str
    reason: str
    message: list[str]


class Manifest:
    """What `sweep.json` and the files beside it hold; written whole at each change.

    Args:
        folder: of the sweep.
        command: the words of the sweep's command.
        jobs: in order.
        left_out: combinations that cannot run, with the reason.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        jobs: Sequence[JobRecord],
        left_out: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.jobs = {job.name: job for job in jobs}
        self.runs: dict[str, RunRecord] = {}
        self._command = shlex.join(command)
        self.left_out = dict(left_out)
        self._recall_seconds()

    def start(self, name: str) -> None:
        """Record that a job runs."""
        self.jobs[name].status = RUNNING
        self.save()

    def end(self, name: str, seconds: float, reason: str) -> None:
        """Record that a job has ended; a reason says that it failed."""
        job = self.jobs[name]
        job.status = FAILED if reason else DONE
        job.seconds, job.reason = seconds, reason
        job.message = last_lines(Path(job.log)) if reason else []
        self.save()

    def record_run(self, title: str, folder: Path, command: str, log: Path, reason: str) -> None:
        """Record the merged run of a combination, or why there is none."""
        status = FAILED if reason else DONE
        message = last_lines(log) if reason else warnings_of(log)
        self.runs[title] = RunRecord(str(folder), status, command, str(log), reason, message)
        self.save()

    def count(self, status: str) -> int:
        """Return how many jobs have a status."""
        return sum(job.status == status for job in self.jobs.values())

    def run_folders(self) -> list[Path]:
        """Return the run folders that are complete."""
        return [Path(run.run_folder) for run in self.runs.values() if run.status == DONE]

    def save(self) -> None:
        """Write all files.

        Raises:
            RunError: they cannot be written.
        """
        text = json.dumps(
            {
                "command": self._command,
                "runs": {title: asdict(run) for title, run in self.runs.items()},
                "left_out": self.left_out,
                "jobs": [asdict(job) for job in self.jobs.values()],
            },
            indent=2,
        )
        write_text(self.folder / "sweep.json", text + "\n")
        table = io.StringIO(newline="")
        columns = [entry.name for entry in fields(JobRecord) if entry.name != "message"]
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(job) for job in self.jobs.values())
        write_text(self.folder / "sweep.csv", table.getvalue())
        lines = "".join(f"{folder}\n" for folder in self.run_folders())
        write_text(self.folder / "runs.txt", lines)

    def _recall_seconds(self) -> None:
        """Take over how long jobs took that an earlier start of this sweep finished."""
        path = self.folder / "sweep.json"
        earlier = read_object(path).get("jobs", []) if path.exists() else []
        for entry in earlier:
            job = self.jobs.get(entry["name"])
            if job is not None and entry["status"] == job.status == DONE:
                job.seconds = entry["seconds"]
