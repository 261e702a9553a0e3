"""A grid of data sets, methods and options as independent jobs, one for each category and seed.

    python sweep.py --datasets demo digits --methods noco noco_cf knn --seeds 0 1 2
    python sweep.py --datasets mvtec --data-roots mvtec=/data/mvtec --options method.norm=0.5,1,4
    python sweep.py --set "demo simplenet" "demo nc_disc --method.sigma 0.05" -- --monitor-test
    python sweep.py --datasets visa --methods noco --engine gpus          # a process a device
    python sweep.py --datasets demo --engine local --jobs 2 --dry-run     # lists the jobs

Jobs lie in `<output>/jobs`. When all jobs of a run are finished they are merged into the folder
that the plain training command with all categories and seeds has, which then finds nothing left to
do: a category alone gives the row it has in the full table. The same command continues a sweep;
failed jobs stop no other, are listed at the end, and make the exit code 1.
Jobs keep features on disk (`--cache disk`), so that seeds and methods share one extraction.
"""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.experiment import Experiment
from configs.options import Role, fields_marked
from configs.sweep import SweepOptions, sweep_options
from pipeline.experiments import read_tasks
from pipeline.made_of import made_of
from pipeline.planning import PlanError, PlannedRun, log_beside, plan, sweep_folder
from utils.cli import exits_cleanly, stopped_as_interrupted
from utils.errors import RunError, UsageError
from utils.runs.made_of import check_made_of
from utils.runs.merging import Pair, merge
from utils.runs.run import Run
from utils.sweep.engines import Engine, InProcess, RayTasks, Workers, cuda_devices
from utils.sweep.jobs import Job, Started, run_job
from utils.sweep.manifest import DONE, PENDING, RUNNING, JobRecord, Manifest
from utils.sweep.report import Progress, report, show

OTHER_DATA = "Delete that folder, give the sweep another --output, or put the data back."
MAY_DIFFER = fields_marked(Experiment, Role.PART) | {"overlays"}
"""Options in which a job may differ from its run: which pairs, and whether they are drawn."""


@exits_cleanly(PlanError)
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is not finished of a sweep; return the run folders that are complete.

    Raises:
        SystemExit: 1, a job failed; 2, the sweep cannot be run.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options, extra = sweep_options(words)
    engine = None if options.dry_run else engine_of(options)
    runs, left_out = plan(options, extra)
    folder = sweep_folder(options, runs)
    manifest = Manifest(folder, ["sweep.py", *words], records(runs), left_out)
    if options.dry_run:
        show(manifest)
        return []
    assert engine is not None
    manifest.save()
    try:
        with stopped_as_interrupted():
            execute(engine, runs, manifest)
    finally:
        for job in manifest.jobs.values():
            job.status = PENDING if job.status == RUNNING else job.status
        manifest.save()
    if not report(manifest):
        raise SystemExit(1)
    return manifest.run_folders()


def engine_of(options: SweepOptions) -> Engine:
    """Return the engine that a command line asks for."""
    jobs = options.jobs or 1
    if options.engine == "ray":
        return RayTasks(options.ray_address, num_gpus=options.gpus_per_task, at_once=options.jobs)
    if options.engine == "local":
        return InProcess() if options.jobs is None else Workers([{} for _ in range(jobs)])
    known = cuda_devices()
    if not known:
        raise UsageError("--engine gpus: no CUDA device is available here; use --engine local")
    if unknown := [name for name in options.gpus if name not in known]:
        raise UsageError(f"--gpus {' '.join(unknown)}: this machine has {' '.join(known)}")
    devices = options.gpus or known
    return Workers([{"CUDA_VISIBLE_DEVICES": name} for _ in range(jobs) for name in devices])


def records(runs: Sequence[PlannedRun]) -> list[JobRecord]:
    """Return the jobs of all runs for the manifest, those that are finished as done.

    Raises:
        RunError: one is finished that was made of other data or weights than are there.
    """
    for run in runs:
        check_data(run)
    return [
        JobRecord(
            planned.job.name,
            run.combination.title,
            " and ".join(category for category, _ in planned.pairs),
            planned.pairs[0][1],
            run_folder=str(planned.folder),
            log=planned.job.log,
            command=shlex.join(["python", f"{planned.job.script}.py", *planned.job.argv]),
            status=DONE
            if set(planned.pairs) <= there | finished_pairs(planned.folder)
            else PENDING,
        )
        for run in runs
        for there in [finished_pairs(run.experiment.run_folder)]
        for planned in run.jobs
    ]


def finished_pairs(folder: Path) -> set[Pair]:
    """Return the pairs that a run folder has; none where it is not there."""
    try:
        return {(row["category"], row["seed"]) for row in Run.read(folder).rows()}
    except RunError:  # absent, or corrupt: then the job itself says what is wrong
        return set()


def check_data(run: PlannedRun) -> None:
    """Compare what a run and its jobs were made of with what is there, as far as finished.

    Raises:
        RunError: it is something else.
    """
    folders = [run.experiment.run_folder, *(planned.folder for planned in run.jobs)]
    finished = {folder: pairs for folder in folders if (pairs := finished_pairs(folder))}
    if not finished:
        return
    there = made_of(run.experiment, read_tasks(run.experiment))
    for folder, pairs in finished.items():
        check_made_of(folder, pairs, there, way_out=OTHER_DATA)


def execute(engine: Engine, runs: Sequence[PlannedRun], manifest: Manifest) -> None:
    """Run the jobs that are not done; complete each run as soon as its last job is."""
    run_of = {planned.job.name: run for run in runs for planned in run.jobs}
    todo = [
        planned.job
        for run in runs
        for planned in run.jobs
        if manifest.jobs[planned.job.name].status != DONE
    ]
    for run in runs:
        complete(run, manifest)
    with Progress(manifest, len(todo)) as progress, contextlib.closing(engine.run(todo)) as events:
        for event in events:
            if isinstance(event, Started):
                manifest.start(event.name)
            else:
                manifest.end(event.name, event.seconds, event.reason)
                complete(run_of[event.name], manifest)
            progress.show(event)


def complete(run: PlannedRun, manifest: Manifest) -> None:
    """Merge a run whose jobs are all done, and let its own command write the table."""
    if any(manifest.jobs[planned.job.name].status != DONE for planned in run.jobs):
        return
    folder = run.experiment.run_folder
    command = shlex.join(["python", *run.command])
    log = log_beside(run.jobs[0].folder.with_name(folder.name))
    reason = ""
    if not (folder / "table.md").exists():  # which is written last
        try:
            merge(
                folder,
                run.experiment.to_json(),
                categories=run.categories,
                seeds=run.experiment.seeds,
                parts={pair: planned.folder for planned in run.jobs for pair in planned.pairs},
                command=run.command,
                may_differ=MAY_DIFFER,
            )
        except (RunError, OSError) as error:
            reason = str(error)
        else:
            words = (*run.command[1:], "--device", "cpu")  # nothing is left to compute
            reason = run_job(Job(command, run.combination.script, words, str(log))).reason
    manifest.record_run(run.combination.title, folder, command, log, reason)


if __name__ == "__main__":
    main()
