"""A trained head into the run folder, and the finished run folder into its table."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from datasets.data_set import num_categories
from datasets.reading import unused
from datasets.reading.images import Reading, read_image
from datasets.reading.transforms import PairTransform
from datasets.samples import ImageSet, Task
from models.detector import Detector, Extractor, HasParts
from models.method import published_name
from pipeline.experiments import AnyExperiment, groups_of
from pipeline.features import TaskData, transform_of
from pipeline.leaks import in_words, pairs_to_show
from utils.evaluation.calibration import (
    Calibration,
    calibration_file,
    false_alarm_columns,
    false_alarm_notes,
    save_calibration,
)
from utils.evaluation.monitor import Outcome, State
from utils.evaluation.online import online_curve, save_online_curve
from utils.evaluation.scoring import part_maps, score_all
from utils.evaluation.test_set import TestSet
from utils.metrics.metrics import table_metrics
from utils.pictures.galleries import save_gallery
from utils.pictures.overlays import Shown, save_overlays
from utils.pictures.pairs import save_pairs
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
    """

    seed: int
    detector: Detector
    options: dict[str, Any]
    outcomes: list[Outcome]
    fit_seconds: float
    learner: Detector | None
    backbone_digest: str


def record(experiment: AnyExperiment, run: Run, data: TaskData, fitted: Fitted) -> None:
    """Write pictures, scores, heads and calibration of a fitted head, and its rows last of all."""
    category, seed = data.task.category, fitted.seed
    if experiment.overlays and seed == experiment.seeds[0]:
        draw(experiment, run, data, fitted)
    if fitted.learner is not None:
        generator = seed_everything(seed)
        curve = online_curve(fitted.learner, data.train, data.test, generator=generator)
        path = run.folder / "online" / f"{file_stem(category, seed)}.csv"
        save_online_curve(path, curve, title=f"{category}, seed {seed}")
    keep_maps = isinstance(experiment, StructuredExperiment) and experiment.save_maps
    for outcome in fitted.outcomes:
        _save(run, data, fitted, outcome, keep_maps=keep_maps)
    alarms = {}
    if data.calibration is not None:
        for outcome in fitted.outcomes:
            found = _calibrate(run, data, fitted, outcome)
            normals = outcome.scores.images[data.test.labels == 0].numpy()
            rate = experiment.false_alarm_rate
            alarms[outcome.select] = false_alarm_columns(found, normals, rate)
    facts = _facts(data, fitted)
    rows = [
        {
            "category": category,
            "seed": seed,
            "select": outcome.select,
            **outcome.measured.values,
            **outcome.steps,
            **facts,
            "score_seconds": round(outcome.score_seconds, 3),
            "head_bytes": _num_bytes(next(iter(outcome.states.values()))),
            "undefined": "; ".join(f"{n}: {why}" for n, why in outcome.measured.undefined.items()),
            **alarms.get(outcome.select, {}),
        }
        for outcome in fitted.outcomes
    ]
    run.finish(category, seed, rows)
    tqdm.write(summary_line(category, fitted))


def draw(experiment: AnyExperiment, run: Run, data: TaskData, fitted: Fitted) -> None:
    """Draw the reported outcome: sheets of maps, or a gallery where nothing is localised."""
    task, test, outcome = data.task, data.test, fitted.outcomes[-1]
    folder = run.overlays_folder(task.category, fitted.seed)
    transform: PairTransform = transform_of(experiment)
    if data.leaks:
        draw_leaks(folder / "twins.png", data, transform, count=experiment.overlays)
    if experiment.map_size is None:
        is_anomaly = _leaves_one_out(experiment)
        save_gallery(
            folder / "gallery.png",
            images=lambda i: stored_image(task.test, test.bank.indices[i], transform.reading),
            scores=outcome.scores.images.numpy(),
            labels=test.labels.numpy(),
            class_names_of_images=test.kinds,
            title=f"{experiment.dataset}, {'anomalous' if is_anomaly else 'normal'}: "
            f"{task.category}",
            auroc=outcome.measured.values["image_auroc"],
            count=experiment.overlays,
        )
        return
    part_names, parts = parts_of(fitted.detector, test)
    shown = Shown(
        images=lambda i: transform.image(
            stored_image(task.test, test.bank.indices[i], transform.reading)
        ),
        masks=test.masks,
        anomaly_maps=outcome.scores.maps.cpu(),
        scores=outcome.scores.images.numpy(),
        labels=test.labels.numpy(),
        defects=test.kinds,
        names=[Path(name).name for name in test.names],
        threshold=outcome.measured.pixel_f1_threshold,
        part_names=part_names,
        parts=parts,
    )
    save_overlays(folder, shown, num_worst=experiment.overlays, title=task.category)


def parts_of(
    detector: Detector, test: TestSet
) -> tuple[tuple[str, ...], Callable[[int], Sequence[np.ndarray]]]:
    """Return the names of the maps that a detector's is the mean of, and what gives an image's."""
    if not isinstance(detector, HasParts) or len(detector.part_names) < 2:
        return (), lambda _: ()
    of_parts: HasParts = detector

    def parts(place: int) -> Sequence[np.ndarray]:
        maps = part_maps(of_parts, test.bank.subset([place]), test.scoring)  # (L, 1, S, S)
        return list(maps[:, 0].numpy())

    return of_parts.part_names, parts


def draw_leaks(path: Path, data: TaskData, transform: PairTransform, *, count: int) -> None:
    """Draw some near-duplicates of each kind, those looked at on the left."""
    pairs = []
    for leak, twin in pairs_to_show(data.leaks, count):
        sides = ((leak.images, twin.place), (leak.among, twin.other))
        left, right = (
            transform.image(stored_image(s.images, s.features.indices[row], transform.reading))
            for s, row in sides
        )
        names = " | ".join(Path(side.name(row)).name for side, row in sides)
        pairs.append((left, right, f"{names}  {twin.correlation:.3f}"))
    save_pairs(path, pairs, title=f"{data.task.category}: {in_words(data.leaks)}")


def stored_image(images: ImageSet, index: int, reading: Reading) -> np.ndarray:
    """Return an image as it is stored, (H, W, 3) uint8."""
    if images.paths is not None:
        return read_image(images.paths[index], reading)
    assert images.images is not None
    image = images.images[index]
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)  # (H, W, 3)


def _save(run: Run, data: TaskData, fitted: Fitted, outcome: Outcome, *, keep_maps: bool) -> None:
    """Write the scores and heads of an outcome."""
    test, scores = data.test, outcome.scores
    category, seed = data.task.category, fitted.seed
    suffixes = list(outcome.states)
    parts = {}
    if keep_maps and isinstance(fitted.detector, HasParts):
        fitted.detector.load_state_dict(outcome.states[suffixes[0]])
        found = part_maps(fitted.detector, test.bank, test.scoring)
        parts = dict(zip(fitted.detector.part_names, found, strict=True))
    recorded = TestScores(
        paths=test.names,
        labels=test.labels,
        scores=scores.images,
        defects=test.kinds,
        maps=scores.maps if keep_maps else None,
        masks=test.masks if keep_maps else None,
        norms=scores.norms,
        angles=scores.angles,
        parts=parts,
    )
    run.save_scores(category, seed, recorded, suffix=suffixes[0])
    for suffix in suffixes:
        metadata = {
            "category": category,
            "seed": str(seed),
            "select": outcome.select,
            "options": json.dumps(fitted.options),
            "backbone_digest": fitted.backbone_digest,
        }
        run.save_head(category, seed, outcome.states[suffix], metadata, suffix=suffix)


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
    is_published = not _leaves_one_out(experiment)
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
    )
    why = [f"{name}: {reason}" for name, reason in reasons.items() if name in metrics]
    table = build_table(rows, about, notes=notes, nan_reasons=why)
    write(table, run.folder / "table")
    tqdm.write(to_text(table))
    tqdm.write(f"run folder: {run.folder}")
    return table


def remarks_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the fits of a run remark."""
    found = [(row["category"], row["seed"], row["remarks"]) for row in rows if row["remarks"]]
    return [f"{category}, seed {seed}: {text}" for category, seed, text in found]


def _leaves_one_out(experiment: AnyExperiment) -> bool:
    """Whether the class that a task is named after is its anomaly."""
    return isinstance(experiment, SemanticExperiment) and experiment.protocol == "leave-one-out"


def _num_bytes(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _plain(value: Any) -> str:
    return f"{value[0]:g}" if isinstance(value, tuple) else str(value)
