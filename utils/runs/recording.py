"""One (category, seed) from fit to run folder, and the whole run to its table."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from utils.evaluation.calibration import (
    Calibration,
    calibration_file,
    false_alarm_columns,
    false_alarm_notes,
    save_calibration,
)
from utils.cli import UsageError
from utils.evaluation.test_set import Head, Monitor, Outcome, State, TestSet
from utils.features.features import Features
from utils.metrics.metrics import METRIC_NAMES
from utils.evaluation.online import online_curve, save_online_curve
from utils.runs.run import Run, file_stem
from utils.seeding import seed_everything
from utils.evaluation.selection import Validation, choose
from utils.tables.table import Table
from utils.tables.results import SELECT_LABELS, build_table

RANDOM_WEIGHTS = "RANDOM BACKBONE WEIGHTS (--weights random): these numbers measure no method."


def fit_and_record(
    run: Run,
    category: str,
    seed: int,
    build: Callable[[dict[str, Any]], Any],
    train: Features,
    test: TestSet,
    *,
    select: str,
    candidates: Sequence[dict[str, Any]] = ({},),
    validation: Validation | None = None,
    monitor_test: bool = False,
    online: bool = False,
    skipped: Sequence[str] = (),
    draw: Callable[[Outcome], None] | None = None,
    save_maps: bool = False,
    calibration: TestSet | None = None,
    false_alarm_rate: float = 0.05,
    backbone_digest: str = "",
) -> None:
    """Fit a head on normal features with one seed, evaluate it, and write all of it down.

    Everything random follows from the seed alone, so a category gives the same bits whether it runs
    alone or among others. The rows of results.csv come last: a pair interrupted before that is run
    again.

    Args:
        run: the open run.
        category: category or normal class.
        seed: of this fit.
        build: makes the unfitted detector from changed options, on its device.
        train: normal training features.
        test: the test set of the category.
        select: "last", "synthetic" or "best_test".
        candidates: changed options that `synthetic` chooses from.
        validation: what `synthetic` judges them by.
        monitor_test: log the test metrics of every step or candidate; chooses nothing.
        online: also write the curve over the number of images seen.
        skipped: images left out as unreadable, with the reason.
        draw: makes the pictures of the reported outcome.
        save_maps: keep the anomaly maps too, and the masks beside them.
        calibration: normal images that neither fit nor selection sees; their scores are kept
            beside each head, and the rows say which false-alarm rate the test normals have.
        false_alarm_rate: asked for, with `calibration`.
        backbone_digest: short hash of the backbone's weights, kept with each head: on features of
            other weights it means nothing.

    Raises:
        FloatingPointError: the fit left the finite numbers; category, seed, epoch and step are
            named.
        UsageError: `best_test` without normal and anomalous test images.
    """
    log = functools.partial(run.log, category, seed)
    empty = [test.names[i] for i in test.empty_masks]
    log(event="data", skipped=list(skipped), empty_masks=empty)
    try:
        options: dict[str, Any] = {}
        if validation is not None:
            watched = test if monitor_test else None
            choice = choose(build, candidates, validation, seed=seed, log=log, watched=watched)
            options = choice.options
            log(event="chosen", options=options, synthetic_auroc=choice.auroc)
        generator = seed_everything(seed)
        detector = build(options)
        monitor = Monitor(detector, test, select, log, monitor_test=monitor_test)
        detector.fit(train, generator=generator, monitor=monitor)
        fit_seconds = round(monitor.fit_seconds, 3)
        outcomes = monitor.outcomes()
    except (FloatingPointError, UsageError) as error:
        raise type(error)(f"{category}, seed {seed}: {error}") from error
    if diagnostics := detector.diagnostics():
        log(event="diagnostics", **diagnostics)
    facts: dict[str, Any] = {
        "num_train": len(train),
        "num_test": len(test.bank),
        "skipped": len(skipped),
        "empty_masks": len(empty),
        "trainable": sum(p.numel() for p in detector.parameters() if p.requires_grad),
        "extract_seconds": round(train.extract_seconds + test.bank.extract_seconds, 3),
        "pass_test_seconds": round(test.bank.pass_seconds, 3),
        "fit_seconds": fit_seconds,
        "chosen": " ".join(f"{name}={_plain(value)}" for name, value in options.items()),
        "remarks": " ".join(detector.remarks),
    }
    if draw is not None:
        draw(outcomes[-1])
    if online:
        learner = build(options)
        curve = online_curve(learner, train, test, generator=seed_everything(seed))
        path = run.folder / "online" / f"{file_stem(category, seed)}.csv"
        save_online_curve(path, curve, title=f"{category}, seed {seed}")
    for outcome in outcomes:
        about = {"options": json.dumps(options), "backbone_digest": backbone_digest}
        _save(run, category, seed, outcome, about, test, save_maps)
    calibrated = {}
    if calibration is not None:
        for outcome in outcomes:
            found = _calibrate(run, category, seed, detector, outcome, calibration)
            normals = outcome.scores.images[test.labels == 0].numpy()
            calibrated[outcome.select] = false_alarm_columns(found, normals, false_alarm_rate)
    rows = [
        {
            "category": category,
            "seed": seed,
            "select": outcome.select,
            **outcome.metrics,
            **outcome.steps,
            **facts,
            "score_seconds": round(outcome.score_seconds, 3),
            "head_bytes": _num_bytes(next(iter(outcome.states.values()))),
            "undefined": "; ".join(f"{n}: {why}" for n, why in outcome.undefined.items()),
            **calibrated.get(outcome.select, {}),
        }
        for outcome in outcomes
    ]
    run.finish(category, seed, rows)
    tqdm.write(summary_line(category, seed, outcomes, fit_seconds))


def _save(
    run: Run,
    category: str,
    seed: int,
    outcome: Outcome,
    about: dict[str, str],
    test: TestSet,
    save_maps: bool,
) -> None:
    """Write the scores and heads of an outcome; `about` joins the heads' metadata."""
    suffixes = list(outcome.states)
    run.save_scores(
        category,
        seed,
        paths=test.names,
        labels=test.labels,
        scores=outcome.scores.images,
        defects=test.kinds,
        maps=outcome.scores.maps if save_maps else None,
        masks=test.masks if save_maps else None,
        norms=outcome.scores.norms,
        angles=outcome.scores.angles,
        suffix=suffixes[0],
    )
    for suffix in suffixes:
        metadata = {
            "category": category,
            "seed": str(seed),
            "select": outcome.select,
            **about,
        }
        run.save_head(category, seed, outcome.states[suffix], metadata, suffix=suffix)


def _calibrate(
    run: Run, category: str, seed: int, detector: Head, outcome: Outcome, calibration: TestSet
) -> Calibration:
    """Score the calibration images with each saved state; the first is the image scores' own."""
    calibrations = []
    for suffix, state in outcome.states.items():
        detector.load_state_dict(state)
        calibrations.append(
            save_calibration(
                calibration_file(run.folder, category, seed, suffix),
                head=run.head_path(category, seed, suffix),
                source="training",
                names=calibration.names,
                scores=calibration.score(detector).images.numpy(),
            )
        )
    return calibrations[0]


def summary_line(category: str, seed: int, outcomes: Sequence[Outcome], fit_seconds: float) -> str:
    """Say in one line how a fit went, in percent."""
    shown = ("image_auroc", "pixel_auroc", "aupro")
    parts = []
    for outcome in outcomes:
        values = [(n, outcome.metrics[n]) for n in shown if not math.isnan(outcome.metrics[n])]
        head = "" if outcome.select == "last" else f"{SELECT_LABELS[outcome.select]}: "
        parts.append(head + "  ".join(f"{name} {100 * value:.2f}" for name, value in values))
    return f"{category}  seed {seed}:  {'  |  '.join(parts)}  (fit {fit_seconds:.1f} s)"


def finish_tables(
    run: Run,
    *,
    title: str,
    dataset: str | None,
    metrics: Sequence[str],
    select: str,
    method: str = "",
    groups: Mapping[str, Sequence[str]] | None = None,
    display: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    shared_images: bool = False,
) -> Table:
    """Build the table from every row of the run, write it in all formats and print it.

    Args:
        run: with every requested pair finished.
        title: of the caption.
        dataset: whose published values stand beside ours; None for none.
        metrics: columns, in order.
        select: what `--select` was.
        method: on the command line; its published values stand beside ours too.
        groups: mean lines over some of the categories.
        display: printed names of categories.
        notes: printed below the table, before what the rows themselves have to say.
        shared_images: the tasks share one set of images, so an unreadable one is in every row.

    Raises:
        RunError: a (category, seed) of the table is missing.
    """
    rows = run.rows()
    table = build_table(
        rows,
        title=f"{title}; reported: {SELECT_LABELS[select]}",
        categories=run.categories,
        seeds=run.seeds,
        metrics=metrics,
        dataset=dataset,
        groups=groups,
        display=display,
        notes=[*notes, *row_notes(rows, shared_images=shared_images)],
        method=method,
        nan_reasons=[f"{n}: {why}" for n, why in undefined_reasons(rows).items() if n in metrics],
    )
    table.write(run.folder)
    tqdm.write(table.to_text())
    tqdm.write(f"run folder: {run.folder}")
    return table


def row_notes(rows: Sequence[Mapping[str, Any]], *, shared_images: bool = False) -> list[str]:
    """Say what the numbers leave out: unreadable images, and defects no map can find."""
    count = max if shared_images else sum
    notes = []
    per_category = {row["category"]: row for row in rows}
    if skipped := count(row["skipped"] for row in per_category.values()):
        notes.append(
            f"{skipped} unreadable images were left out (--skip-unreadable); metrics.jsonl names "
            "them."
        )
    if empty := sum(row["empty_masks"] for row in per_category.values()):
        notes.append(
            f"{empty} anomalous test images have an empty mask at this size (defect cropped away "
            "or thinner than a pixel): they count as anomalous, but no map can find them; "
            "metrics.jsonl names them."
        )
    notes += false_alarm_notes(rows)
    remarks = [(row["category"], row["seed"], row["remarks"]) for row in rows if row["remarks"]]
    return notes + [f"{category}, seed {seed}: {text}" for category, seed, text in remarks]


def _num_bytes(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _plain(value: Any) -> str:
    return f"{value[0]:g}" if isinstance(value, tuple) else str(value)


def undefined_reasons(rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Collect why metrics of a table are nan, from the rows' `undefined` column."""
    reasons: dict[str, str] = {}
    for row in rows:
        for item in str(row.get("undefined", "")).split("; "):
            name, _, reason = item.partition(": ")
            if name in METRIC_NAMES and reason:
                reasons[name] = reason
    return reasons
