"""A trained head into the run folder, and the finished run folder into its table."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from configs.structured import StructuredExperiment
from datasets.data_set import num_categories
from datasets.reading import unused
from datasets.samples import Task
from models.detector import Detector, Extractor, HasParts, Reconstructs
from models.method import published_name
from pipeline.drawing import draw
from pipeline.experiments import AnyExperiment, groups_of, leaves_one_out
from pipeline.features import TaskData
from pipeline.leaks import in_words
from utils.evaluation.calibration import (
    Calibration,
    calibration_file,
    false_alarm_columns,
    false_alarm_notes,
    save_calibration,
)
from utils.evaluation.monitor import Outcome, State
from utils.evaluation.online import online_curve, save_online_curve
from utils.evaluation.scoring import part_maps, reconstructions, score_all
from utils.metrics.metrics import table_metrics
from utils.runs.files import file_stem
from utils.runs.run import Run
from utils.runs.scores import TestScores
from utils.seeding import seed_everything
from utils.tables.formats import to_text, write
from utils.tables.results import SELECT_LABELS, Benchmark, build_table, row_notes, undefined_reasons
from utils.tables.table import Table

RANDOM_WEIGHTS = "RANDOM BACKBONE WEIGHTS (--weights random): these numbers measure no method."
SUMMARY = ("image_auroc", "pixel_auroc", "aupro")
"""Metrics of the line that is printed when a head is finished."""


@dataclass(frozen=True)
class Fitted:
    """A fitted head and what came of it.

    Attributes:
        seed: of the fit.
        detector: the head, in the state of the last outcome.
        options: those that `--select synthetic` chose.
        outcomes: what the test set says, for each way of selecting that is reported.
        fit_seconds: what the fit took, without what was spent on the test set.
        learner: an unfitted head that learns online, for `--online`; else None.
        backbone_digest: short hash of the backbone's weights: on features of others it means
            nothing.
        peak_bytes: the most memory that fit and scoring took (`utils.memory.peak_memory`).
    """

    seed: int
    detector: Detector
    options: dict[str, Any]
    outcomes: list[Outcome]
    fit_seconds: float
    learner: Detector | None
    backbone_digest: str
    peak_bytes: int


def record(
    experiment: AnyExperiment, run: Run, data: Sequence[TaskData], fits: Sequence[Fitted]
) -> None:
    """Write pictures, scores, heads and calibration of a fitted head, and its rows last of all.

    Args:
        experiment: the settings.
        run: where it is written.
        data: of each task that the head is for.
        fits: what came of it on each; the head is the same.
    """
    _save_heads(run, data[0].task.category, fits[0])
    found = {
        (one.task.category, fitted.seed): _record_one(experiment, run, one, fitted)
        for one, fitted in zip(data, fits, strict=True)
    }
    run.finish(found)
    for (category, _), fitted in zip(found, fits, strict=True):
        tqdm.write(summary_line(category, fitted))


def _record_one(
    experiment: AnyExperiment, run: Run, data: TaskData, fitted: Fitted
) -> list[dict[str, Any]]:
    """Write all of a task but head and rows, and return these."""
    category, seed = data.task.category, fitted.seed
    if experiment.overlays and seed == experiment.seeds[0]:
        outcome = fitted.outcomes[-1]
        # A category recorded before may have left another state.
        fitted.detector.load_state_dict(next(iter(outcome.states.values())))
        draw(experiment, run.overlays_folder(category, seed), data, fitted.detector, outcome)
    if fitted.learner is not None:
        generator = seed_everything(seed)
        curve = online_curve(fitted.learner, data.train, data.test, generator=generator)
        path = run.folder / "online" / f"{file_stem(category, seed)}.csv"
        save_online_curve(path, curve, title=f"{category}, seed {seed}")
    keep_maps = isinstance(experiment, StructuredExperiment) and experiment.save_maps
    for outcome in fitted.outcomes:
        _save_scores(run, data, fitted, outcome, keep_maps=keep_maps)
    alarms = {}
    if data.calibration is not None:
        for outcome in fitted.outcomes:
            found = _calibrate(run, data, fitted, outcome)
            normals = outcome.scores.images[data.test.labels == 0].numpy()
            rate = experiment.false_alarm_rate
            alarms[outcome.select] = false_alarm_columns(found, normals, rate)
    facts = _facts(data, fitted)
    return [
        {
            "category": category,
            "seed": seed,
            "select": outcome.select,
            **outcome.measured.values,
            **outcome.steps,
            **facts,
            "score_seconds": round(outcome.score_seconds, 3),
            "peak_bytes": fitted.peak_bytes,
            "head_bytes": _num_bytes(next(iter(outcome.states.values()))),
            "undefined": "; ".join(f"{n}: {why}" for n, why in outcome.measured.undefined.items()),
            **alarms.get(outcome.select, {}),
        }
        for outcome in fitted.outcomes
    ]


def _save_heads(run: Run, category: str, fitted: Fitted) -> None:
    """Write the states of a head, once where it is for several categories."""
    for outcome in fitted.outcomes:
        for suffix, state in outcome.states.items():
            metadata = {
                "category": "" if run.is_joint else category,
                "seed": str(fitted.seed),
                "select": outcome.select,
                "options": json.dumps(fitted.options),
                "backbone_digest": fitted.backbone_digest,
            }
            run.save_head(category, fitted.seed, state, metadata, suffix=suffix)


def _save_scores(
    run: Run, data: TaskData, fitted: Fitted, outcome: Outcome, *, keep_maps: bool
) -> None:
    """Write the scores of an outcome."""
    test, scores = data.test, outcome.scores
    suffix, state = next(iter(outcome.states.items()))
    parts, rebuilt, detector = {}, None, fitted.detector
    if keep_maps and isinstance(detector, HasParts):
        detector.load_state_dict(state)
        found = part_maps(detector, test.bank, test.scoring)
        parts = dict(zip(detector.part_names, found, strict=True))
    if keep_maps and isinstance(detector, Reconstructs):
        detector.load_state_dict(state)
        rebuilt = reconstructions(detector, test.bank, test.scoring)
    recorded = TestScores(
        paths=test.names,
        labels=test.labels,
        scores=scores.images,
        defects=test.kinds,
        maps=scores.maps if keep_maps else None,
        masks=test.masks if keep_maps else None,
        norms=scores.norms,
        angles=scores.angles,
        reconstructions=rebuilt,
        parts=parts,
    )
    run.save_scores(data.task.category, fitted.seed, recorded, suffix=suffix)


def _calibrate(run: Run, data: TaskData, fitted: Fitted, outcome: Outcome) -> Calibration:
    """Score the calibration images with each saved state; the first is the image scores' own."""
    assert data.calibration is not None
    category, seed = data.task.category, fitted.seed
    names = data.task.train.names
    calibrations = []
    for suffix, state in outcome.states.items():
        fitted.detector.load_state_dict(state)
        scores = score_all(fitted.detector, data.calibration, data.test.scoring)
        calibrations.append(
            save_calibration(
                calibration_file(run.folder, category, seed, suffix),
                head=run.head_path(category, seed, suffix),
                source="training",
                names=[names[i] for i in data.calibration.indices],
                scores=scores.images.numpy(),
            )
        )
    return calibrations[0]


def _facts(data: TaskData, fitted: Fitted) -> dict[str, Any]:
    """Return the columns of results.csv that all outcomes of a fit share."""
    train, test = data.train, data.test.bank
    options = fitted.options
    return {
        "num_train": len(train),
        "num_test": len(test),
        "skipped": len(data.skipped),
        "empty_masks": len(data.test.empty_masks),
        "without_mask": data.test.num_without_mask,
        "trainable": fitted.detector.num_trainable,
        "extract_seconds": round(train.extract_seconds + test.extract_seconds, 3),
        "pass_test_seconds": round(test.pass_seconds, 3),
        "fit_seconds": round(fitted.fit_seconds, 3),
        "chosen": " ".join(f"{name}={_plain(value)}" for name, value in options.items()),
        "remarks": " ".join([*fitted.detector.remarks, *data.remarks]),
        "unused": unused_in_words(data.task),
        "twins": in_words(data.leaks),
    }


def unused_in_words(task: Task) -> str:
    """Say what lies beside a task's images, looks like an image, and is not used; or nothing."""
    return unused.in_words(task.unused, task.folder) if task.folder is not None else ""


def summary_line(category: str, fitted: Fitted) -> str:
    """Say in one line how a fit went, in percent."""
    parts = []
    for outcome in fitted.outcomes:
        found = [(name, outcome.measured.values[name]) for name in SUMMARY]
        shown = [f"{name} {100 * value:.2f}" for name, value in found if not math.isnan(value)]
        head = "" if outcome.select == "last" else f"{SELECT_LABELS[outcome.select]}: "
        parts.append(head + "  ".join(shown))
    return (
        f"{category}  seed {fitted.seed}:  {'  |  '.join(parts)}  (fit {fitted.fit_seconds:.1f} s)"
    )


def write_table(
    experiment: AnyExperiment, run: Run, tasks: Sequence[Task], extractor: Extractor
) -> Table:
    """Build the table from every row of the run, write it in all formats and print it.

    Raises:
        RunError: a (category, seed) of the table is missing.
    """
    rows = run.rows()
    has_maps = experiment.map_size is not None
    metrics = [m.name for m in table_metrics(rows[0], has_maps=has_maps)]
    # The papers' numbers are for one class against the rest.
    is_published = not leaves_one_out(experiment)
    reasons = undefined_reasons(rows)
    notes = [RANDOM_WEIGHTS] if extractor.random_weights else []
    shared = any(task.peers for task in tasks)
    notes += [*row_notes(rows, shared_images=shared), *false_alarm_notes(rows), *remarks_of(rows)]
    about = Benchmark(
        title=f"{experiment.title}; reported: {SELECT_LABELS[experiment.select]}",
        categories=run.categories,
        seeds=run.seeds,
        metrics=metrics,
        labels={task.category: task.label for task in tasks},
        groups=groups_of(experiment),
        dataset=experiment.dataset if is_published else None,
        num_categories=num_categories(experiment.dataset),
        published_as=published_name(experiment.method_name),
        is_joint=experiment.is_joint,
    )
    why = [f"{name}: {reason}" for name, reason in reasons.items() if name in metrics]
    table = build_table(rows, about, notes=notes, nan_reasons=why)
    write(table, run.folder / "table")
    tqdm.write(to_text(table))
    tqdm.write(f"run folder: {run.folder}")
    return table


def remarks_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the fits of a run remark; what is said of several categories is said once."""
    found: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        if row["remarks"]:
            found.setdefault((row["seed"], row["remarks"]), []).append(row["category"])
    return [
        f"{' and '.join(dict.fromkeys(names))}, seed {seed}: {text}"
        for (seed, text), names in found.items()
    ]


def _num_bytes(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _plain(value: Any) -> str:
    return f"{value[0]:g}" if isinstance(value, tuple) else str(value)
