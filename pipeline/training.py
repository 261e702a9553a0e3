"""The training of an experiment's heads: from a run folder that is opened to one that is full.

`train_head` is the experiment in the order in which it happens: choose, build, fit, evaluate,
record. What it is given holds features only: no image is looked at again.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from configs.presets import with_options
from datasets.samples import Task
from models.building import build_detector, compile_networks
from models.detector import Detector, Extractor, KnowsCategory
from models.errors import compiler_error
from models.method import find_method
from pipeline.experiments import AnyExperiment
from pipeline.features import Extraction, TaskData, calibration_split
from pipeline.made_of import made_of
from pipeline.recording import Fitted, record, unused_in_words
from utils.device import pick_device
from utils.errors import UsageError
from utils.evaluation.monitor import FitMonitor
from utils.evaluation.selection import choose, joined_validation
from utils.features.tiled import of_windows
from utils.memory import peak_memory
from utils.runs.checkpoints import Checkpoint
from utils.runs.run import Run
from utils.seeding import seed_everything


def open_run(
    experiment: AnyExperiment, tasks: Sequence[Task], extractor: Extractor, command: Sequence[str]
) -> Run:
    """Start the run folder of an experiment, or continue it after its last finished head.

    Raises:
        RunError: the folder holds another run, one of other data or weights, or a file of it is
            corrupt.
        UsageError: a task has too few images for the calibration that is asked for.
    """
    if experiment.calibration_share:
        for task in tasks:
            calibration_split(experiment, task, len(task.train_indices))
    return Run.open(
        experiment.run_folder,
        experiment.to_json(),
        categories=[task.category for task in tasks],
        seeds=experiment.seeds,
        command=command,
        device=str(pick_device(experiment.device)),
        restart=experiment.restart,
        made_of=made_of(experiment, tasks, extractor.weights_digest),
    )


def train_together(
    experiment: AnyExperiment, run: Run, extraction: Extraction, tasks: Sequence[Task]
) -> None:
    """Extract the features of tasks, then train one head for all of them for each pending seed.

    It is fitted on the normal images of all, and evaluated and recorded on each.
    """
    for task in tasks:
        tqdm.write(images_line(task))
    data = extraction.data_together(tasks)
    for seed in run.pending(tasks[0].category):
        train_head(experiment, run, extraction.extractor, data, seed)


def train_head(
    experiment: AnyExperiment, run: Run, extractor: Extractor, data: Sequence[TaskData], seed: int
) -> None:
    """Fit a head on normal features with one seed, evaluate it, and write all of it down.

    Everything random follows from the seed alone, so a category gives the same bits whether it runs
    alone or among others. What is written last makes the pair count: one that is interrupted before
    is run again.

    Args:
        experiment: the settings.
        run: where it is written.
        extractor: the backbone.
        data: of the task, or of each task that the head is for: all with the same `train`, those
            of `--select synthetic` with the same images to fit candidates on.
        seed: of the fit.

    Raises:
        FloatingPointError: the fit left the finite numbers; category, seed, epoch and step are
            named.
        UsageError: `best_test` without normal and anomalous test images.
    """
    tests, train = [one.test for one in data], data[0].train
    logs = [functools.partial(run.log, one.task.category, seed) for one in data]
    for log, one in zip(logs, data, strict=True):
        _log_data(log, one)

    def build(changes: dict[str, Any]) -> Detector:
        options = with_options(experiment.method, changes)
        detector = build_detector(experiment.method_name, extractor, options).to(extractor.device)
        if experiment.compile and "images" in find_method(experiment.method_name).takes:
            compile_networks(detector)
        if isinstance(detector, KnowsCategory) and len(data) == 1:
            detector.category = data[0].task.category.replace("_", " ")
        return detector

    with (
        _named(experiment, " and ".join(one.task.category for one in data), seed),
        peak_memory(extractor.device) as peak,
    ):
        options: dict[str, Any] = {}
        validation = joined_validation([one.validation for one in data])
        if validation is not None:
            watched = tests if experiment.monitor_test else ()
            candidates = experiment.candidates()
            choice = choose(build, candidates, validation, seed=seed, logs=logs, watched=watched)
            options = choice.options
            for log in logs:
                log(event="chosen", options=options, synthetic_auroc=choice.auroc)

        checkpoint = None
        if experiment.checkpoint_minutes is not None:
            categories = [one.task.category for one in data]
            checkpoint = Checkpoint(run, categories, seed, experiment.checkpoint_minutes)
        generator = seed_everything(seed)
        detector = build(options)
        monitor = FitMonitor(
            detector,
            tests,
            experiment.select,
            logs,
            monitor_test=experiment.monitor_test,
            checkpoint=checkpoint,
        )
        detector.fit(
            of_windows(train, tests[0].scoring.tiles), generator=generator, monitor=monitor
        )
        fit_seconds = monitor.fit_seconds

        outcomes = monitor.outcomes()
    if detector.diagnostics:
        for log in logs:
            log(event="diagnostics", **detector.diagnostics)
    learner = build(options) if experiment.online else None
    digest = extractor.weights_digest
    fits = [
        Fitted(seed, detector, options, found, fit_seconds, learner, digest, peak.num_bytes)
        for found in outcomes
    ]
    record(experiment, run, data, fits)
    if checkpoint is not None:
        checkpoint.delete()


def _log_data(log: Callable[..., None], data: TaskData) -> None:
    """Log which images are left out or cannot count, and which have near-duplicates."""
    empty = [data.test.names[i] for i in data.test.empty_masks]
    unused = [str(path) for path in data.task.unused]
    log(event="data", skipped=list(data.skipped), empty_masks=empty, unused=unused)
    for leak in data.leaks:
        log(event="twins", what=leak.words, pairs=leak.pairs())


def images_line(task: Task) -> str:
    """Say in one line which images a task has, and what lies beside them and is not used."""
    # Of a labelled set there may be a hundred kinds.
    kinds = ["anomalous" if x else "normal" for x in task.test_labels] if task.peers else task.kinds
    tested = ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
    unused = f"; not used: {said}" if (said := unused_in_words(task)) else ""
    return f"{task.category}:  train on {len(task.train_indices)}, test on {tested}{unused}"


@contextlib.contextmanager
def _named(experiment: AnyExperiment, category: str, seed: int) -> Iterator[None]:
    """Put category and seed before the message of a fit that failed; name a compiler that did."""
    try:
        yield
    except RuntimeError as error:
        failed = compiler_error(experiment.method_name, error) if experiment.compile else None
        if failed is None:
            raise
        raise failed from error
    except (FloatingPointError, UsageError) as error:
        hint = ""
        if isinstance(error, FloatingPointError) and hasattr(experiment.method, "learning_rate"):
            hint = "; lower --method.learning-rate"
        raise type(error)(f"{category}, seed {seed}: {error}{hint}") from error
