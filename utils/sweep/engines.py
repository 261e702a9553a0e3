"""Where the jobs of a sweep run: in this process, in processes of their own, on a Ray cluster.

An engine's `run` yields what happens as it happens. Closing it ends the jobs that are running.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from utils.errors import UsageError
from utils.sweep.jobs import Ended, Job, Started, run_job

ROOT = Path(__file__).resolve().parents[2]
Event = Started | Ended


class Engine(Protocol):
    """Runs jobs, in order as far as there is one."""

    def run(self, jobs: Sequence[Job]) -> Generator[Event, None, None]:
        """Yield `Started` and `Ended` of each job; a failed job stops no other."""
        ...


class InProcess:
    """One job after the other in this process: the imports and the device are set up once."""

    def run(self, jobs: Sequence[Job]) -> Generator[Event, None, None]:
        """Run the jobs; see `Engine`."""
        for job in jobs:
            yield Started(job.name)
            yield run_job(job)


class Workers:
    """Processes of this machine; each runs a job at a time, and one that dies is replaced.

    Args:
        environments: one process for each, with these variables changed, e.g. one with
            CUDA_VISIBLE_DEVICES for each device. The cores are shared out between them unless
            OMP_NUM_THREADS is set.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        threads = max(1, (os.cpu_count() or 1) // max(1, len(environments)))
        shared = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": python_path()}
        self.environments = [{**shared, **changes} for changes in environments]

    def run(self, jobs: Sequence[Job]) -> Generator[Event, None, None]:
        """Run the jobs; see `Engine`."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        workers = [_Worker(environment) for environment in self.environments[: len(jobs)]]
        left = len(jobs)
        try:
            for worker in workers:
                threading.Thread(target=worker.serve, args=(waiting, events), daemon=True).start()
            while left:
                event = events.get()
                left -= isinstance(event, Ended)
                yield event
        finally:
            for worker in workers:
                worker.stop()


class _Worker:
    """One process at a time that runs jobs; see the main of utils.sweep.jobs."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def serve(self, waiting: queue.SimpleQueue[Job], events: queue.SimpleQueue[Event]) -> None:
        """Take jobs until there are none; runs in a thread of its own."""
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            events.put(Started(job.name))
            try:
                process = self._ready()
                if process is None:
                    return
                events.put(self._run(process, job))
            except Exception as error:  # whatever it is, somebody waits for the end of this job
                self._abandon()
                events.put(Ended(job.name, 0.0, f"{type(error).__name__}: {error}"))

    def stop(self) -> None:
        """End the process, and those that read images for it."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _end_tree(self._process)

    def _abandon(self) -> None:
        """End a process of which nobody knows what it would answer next."""
        with self._lock:
            if self._process is not None:
                _end_tree(self._process)

    def _ready(self) -> "subprocess.Popen[str] | None":
        """Return a living process; None once stopped."""
        with self._lock:
            if self._stopped:
                return None
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "utils.sweep.jobs"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
                    env=dict(self._environment),
                    start_new_session=True,  # an interrupt from the keyboard is for us to handle
                )  # fmt: skip
            return self._process

    def _run(self, process: "subprocess.Popen[str]", job: Job) -> Ended:
        assert process.stdin is not None
        assert process.stdout is not None
        start = time.perf_counter()
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # it has died: there is no answer to read
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer:
            return Ended(**json.loads(answer))
        return Ended(job.name, round(time.perf_counter() - start, 3), _death(process.wait()))


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended by itself with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = "; the system does that when memory runs out" if name == "SIGKILL" else ""
    return f"its process was killed ({name}{hint})"


def _end_tree(process: "subprocess.Popen[str]") -> None:
    """Kill a process and those it started; return once they have ended, not once they are told."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # first, or it would see its children die and could start others
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait()
    deadline = time.monotonic() + 10  # one stuck in the kernel, say on a lost file server
    while any(map(_runs, children)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    """Tell whether a process still runs; one that waits to be collected by its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class RayTasks:
    """One task of a Ray cluster for each job.

    Args:
        address: of the cluster as `ray.init` takes it: "auto" for the one this machine is in,
            "local" to start one on this machine for as long as the sweep runs.
        num_gpus: devices each task claims; 0.5 lets two share one.
        at_once: tasks given to the cluster at a time; None for all.

    Raises:
        UsageError: Ray is not installed.
    """

    def __init__(self, address: str, *, num_gpus: float = 0.0, at_once: int | None = None) -> None:
        self._ray = _ray()
        self._address = address
        self._num_gpus = num_gpus
        self._at_once = at_once

    def run(self, jobs: Sequence[Job]) -> Generator[Event, None, None]:
        """Run the jobs; see `Engine`.

        Raises:
            UsageError: the cluster does not answer, or a local one has too few devices.
        """
        ray = self._ray
        self._connect()
        running: dict[Any, tuple[Job, float]] = {}
        try:
            self._check_devices()
            # A task that died is a failed job: Ray would run it again, and perhaps kill it again.
            task = ray.remote(num_gpus=self._num_gpus, max_retries=0)(_run_in)
            waiting = deque(jobs)
            while waiting or running:
                while waiting and (self._at_once is None or len(running) < self._at_once):
                    job = waiting.popleft()
                    running[task.remote(str(Path.cwd()), job)] = (job, time.perf_counter())
                    yield Started(job.name)
                (reference,), _ = ray.wait(list(running), num_returns=1)
                job, start = running.pop(reference)
                try:
                    ended = ray.get(reference)
                except ray.exceptions.RayError as error:
                    reason = " ".join(str(error).split("\n")[0].split())
                    seconds = round(time.perf_counter() - start, 3)
                    ended = Ended(job.name, seconds, f"{type(error).__name__}: {reason}")
                yield ended
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            ray.shutdown()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        variables = {"PYTHONPATH": python_path()}
        if "NOCO_CACHE" in os.environ:
            variables["NOCO_CACHE"] = os.environ["NOCO_CACHE"]
        here: dict[str, Any] = {"include_dashboard": False} if self._address == "local" else {}
        try:
            self._ray.init(
                address=self._address,
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                logging_level="warning",
                **here,
            )
        except ConnectionError as error:
            first = str(error).split("\n")[0]
            raise UsageError(
                f"--ray-address {self._address}: no cluster answers ({first}); start one with "
                "`ray start --head`, or use --ray-address local"
            ) from error

    def _check_devices(self) -> None:
        devices = self._ray.cluster_resources().get("GPU", 0)
        if self._num_gpus > devices and self._address == "local":
            raise UsageError(
                f"--gpus-per-task {self._num_gpus:g}: this machine has {devices:g} CUDA devices"
            )
        if devices and not self._num_gpus:
            sys.stderr.write(
                f"warning: the cluster has {devices:g} GPUs, and without --gpus-per-task the jobs "
                "run on CPUs\n"
            )


def _run_in(folder: str, job: Job) -> Ended:
    """Run a job in the folder the sweep was started in, so that relative paths mean the same."""
    os.chdir(folder)
    return run_job(job)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install -r requirements-ray.txt") from error
    return ray


def python_path() -> str:
    """Return a PYTHONPATH by which another process finds this code, whatever its folder."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def cuda_devices() -> list[str]:
    """Return the CUDA devices of this process, by the names CUDA_VISIBLE_DEVICES takes."""
    import torch  # only --engine gpus asks

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return names[:count]
