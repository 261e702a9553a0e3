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
import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.experiment import Experiment
from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from configs.sweep import Combination, PlanError, SweepOptions, combinations, sweep_options
from datasets.sets.demo.demo import build_demo
from datasets.tasks.labelled import read_labelled_set
from datasets.tasks.one_class import one_class_tasks
from datasets.samples import DataError
from datasets.tasks.structured import list_categories
from utils.cli import exits_cleanly
from utils.errors import UsageError
from utils.runs.merging import Pair, merge
from utils.errors import RunError
from utils.runs.run import Run
from utils.sweep.engines import Engine, InProcess, RayTasks, Workers, cuda_devices
from utils.sweep.jobs import Job, Started, run_job
from utils.sweep.manifest import DONE, PENDING, RUNNING, JobRecord, Manifest
from utils.sweep.report import Progress, report, show


@dataclass(frozen=True)
class PlannedJob:
    """A job, the pair it makes, and where."""

    job: Job
    pair: Pair
    folder: Path


@dataclass(frozen=True)
class PlannedRun:
    """A combination with its categories, and a job for each pair of a category and a seed."""

    combination: Combination
    experiment: Experiment
    categories: tuple[str, ...]
    jobs: tuple[PlannedJob, ...]

    @property
    def command(self) -> tuple[str, ...]:
        """The plain training command that makes the same run."""
        words = self.combination.command(self.experiment.output)
        return (f"{self.combination.script}.py", *words)


@exits_cleanly(PlanError, DataError, RunError)
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


def plan(options: SweepOptions, extra: Sequence[str]) -> tuple[list[PlannedRun], dict[str, str]]:
    """Return the runs of a sweep, and the combinations left out, with the reason.

    Raises:
        PlanError: combinations cannot run, and `--skip-invalid` is not given.
    """
    needs_cuda = options.engine == "gpus" or options.gpus_per_task > 0
    if needs_cuda and any(word.partition("=")[0] == "--device" for word in extra):
        raise PlanError("--device is chosen by the engine here; leave it out")
    runs: dict[Path, PlannedRun] = {}
    left_out: dict[str, str] = {}
    listed: dict[tuple[object, ...], tuple[str, ...]] = {}
    for combination in combinations(options, extra):
        try:
            planned = plan_run(combination, options.output, listed, needs_cuda=needs_cuda)
        except (PlanError, DataError) as error:
            left_out[combination.title] = str(error)
        else:
            runs.setdefault(planned.experiment.run_folder, planned)  # two ways to write one run
    if left_out and not options.skip_invalid:
        lines = [f"  {title}\n    {reason}" for title, reason in left_out.items()]
        raise PlanError(
            "these combinations cannot run:\n" + "\n".join(lines) + "\nTake them out of the grid "
            "(--set names single combinations), or pass --skip-invalid to run the others."
        )
    if not runs:
        raise PlanError("no combination can run:\n" + "\n".join(left_out.values()))
    return list(runs.values()), left_out


def plan_run(
    combination: Combination,
    output: Path,
    listed: dict[tuple[object, ...], tuple[str, ...]],
    *,
    needs_cuda: bool,
) -> PlannedRun:
    """Check a combination and make its jobs; `listed` keeps categories that were looked up.

    Raises:
        PlanError: its script would refuse it.
        DataError: its data cannot be found.
    """
    experiment = combination.parse(combination.command(output))
    key = (
        *(combination.script, experiment.dataset, experiment.data_root, experiment.categories),
        getattr(experiment, "protocol", None),
    )
    if key not in listed:
        listed[key] = categories_of(experiment)
    jobs = []
    # Seeds outside: the first seed of each category stores the features that the others read.
    for seed in combination.seeds:
        for category in listed[key]:
            words = combination.words_for([category], [seed], output / "jobs")
            if not any(word.partition("=")[0] == "--cache" for word in combination.words):
                words = (*words, "--cache", "disk")
            if seed != combination.seeds[0]:
                words = (*words, "--overlays", "0")  # of the first seed only, as in a plain run
            if needs_cuda:
                words = (*words, "--device", "cuda")
            folder = combination.parse(words).run_folder
            name = f"{combination.title}, {category}, seed {seed}"
            job = Job(name, combination.script, words, log=str(log_beside(folder)))
            jobs.append(PlannedJob(job, (category, seed), folder))
    return PlannedRun(combination, experiment, listed[key], tuple(jobs))


def categories_of(experiment: Experiment) -> tuple[str, ...]:
    """Return the categories or classes of an experiment, in the order of its table.

    Raises:
        DataError: the data cannot be found, or has no such category.
    """
    if isinstance(experiment, StructuredExperiment):
        root = experiment.data_root
        root = build_demo(root) if experiment.dataset == "demo" else root
        return list_categories(experiment.dataset, root, experiment.categories or None)
    assert isinstance(experiment, SemanticExperiment)
    labelled = read_labelled_set(experiment.dataset, experiment.data_root)
    tasks = one_class_tasks(labelled, experiment.protocol, experiment.categories)
    return tuple(task.category for task in tasks)


def sweep_folder(options: SweepOptions, runs: Sequence[PlannedRun]) -> Path:
    """Return the folder for the lists of a sweep; the same grid always names the same one."""
    folders = "\n".join(str(run.experiment.run_folder.relative_to(options.output)) for run in runs)
    digest = hashlib.blake2b(folders.encode(), digest_size=4).hexdigest()
    return options.output / f"sweep-{options.name or digest}"


def log_beside(run_folder: Path) -> Path:
    """Return where the output of a job goes: a folder that is thrown away keeps its log."""
    return run_folder.with_name(f"{run_folder.name}.log")


def records(runs: Sequence[PlannedRun]) -> list[JobRecord]:
    """Return the jobs of all runs for the manifest, those that are finished as done."""
    return [
        JobRecord(
            planned.job.name,
            run.combination.title,
            *planned.pair,
            run_folder=str(planned.folder),
            log=planned.job.log,
            command=shlex.join(["python", f"{planned.job.script}.py", *planned.job.argv]),
            status=DONE if planned.pair in there | finished_pairs(planned.folder) else PENDING,
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
                parts={planned.pair: planned.folder for planned in run.jobs},
                command=run.command,
            )
        except (RunError, OSError) as error:
            reason = str(error)
        else:
            words = (*run.command[1:], "--device", "cpu")  # nothing is left to compute
            reason = run_job(Job(command, run.combination.script, words, str(log))).reason
    manifest.record_run(run.combination.title, folder, command, log, reason)


if __name__ == "__main__":
    main()
