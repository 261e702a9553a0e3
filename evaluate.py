"""Evaluates the saved heads of a finished run again and compares with what the run recorded.

    python evaluate.py RUN                             # from the run's own data folder
    python evaluate.py RUN --data-root /other/place    # from where the images are now

Every head is loaded, the features of the test images are extracted as in training, and the table is
computed anew. On one machine's CPU the numbers are those of results.csv to the last digit. Exit
code: 0 where all are equal, 1 where one differs (by how much is printed), 2 where something went
wrong. The numbers go to RUN/evaluation.csv; no file of the run itself is changed.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from configs.prediction import EvaluateOptions
from pipeline.experiments import groups_of, read_tasks
from utils.cli import exits_cleanly
from utils.errors import RunError
from utils.metrics.metrics import metric_names, table_metrics
from utils.runs.finished import finished_pairs
from utils.runs.made_of import check_made_of
from utils.runs.rows import write_rows
from utils.tables.formats import to_text
from utils.tables.results import Benchmark, build_table, undefined_reasons

OTHER_DATA = "Point --data-root to the run's data, or train again (--restart)."

if TYPE_CHECKING:
    from pipeline.finished import FinishedRun
    from utils.evaluation.test_set import TestSet


@exits_cleanly(interrupted="interrupted; nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate every finished (category, seed), print the table, and return the exit code."""
    options = tyro.cli(EvaluateOptions, args=argv, prog="evaluate.py", description=__doc__)

    from pipeline.features import Extraction  # only now: they import torch
    from pipeline.finished import load_run
    from pipeline.made_of import made_of

    changes = {} if options.data_root is None else {"data_root": options.data_root}
    finished = load_run(
        options.run,
        device=options.device,
        weights=options.weights,
        workers=options.workers,
        cache=options.cache,
        **changes,
    )
    extraction = Extraction(finished.experiment, finished.extractor)
    recorded = finished.run.rows()
    names = list(dict.fromkeys(row["category"] for row in recorded))
    rows: list[dict[str, Any]] = []
    tasks = read_tasks(finished.experiment, names)
    there = made_of(finished.experiment, tasks, finished.extractor.weights_digest)
    pairs = finished_pairs(finished.run)
    check_made_of(options.run, pairs, there, way_out=OTHER_DATA, test_only=True)
    for task in tasks:
        own = [row for row in recorded if row["category"] == task.category]
        rows += evaluate_task(finished, extraction.test_set_of(task), own)

    path = options.out or options.run / "evaluation.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, list(rows[0]), rows)
    sys.stdout.write(f"\n{table_of(finished, rows)}\n{path}\n")
    return 0 if all(is_equal(row) for row in rows) else 1


def evaluate_task(
    finished: "FinishedRun", test: "TestSet", recorded: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Compute the rows of a category anew, and say of each how it compares."""
    rows = []
    for row in recorded:
        rows.append(evaluate_again(finished, test, row))
        sys.stdout.write(f"{verdict(rows[-1])}\n")
    return rows


def evaluate_again(
    finished: "FinishedRun", test: "TestSet", recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """Compute a row of results.csv from its saved heads.

    Returns:
        category, seed, select, the metrics, `metric_difference`, the largest to the recorded row,
        `worst_metric`, which one that is, and `score_difference`, the largest to the recorded
        scores. An undefined metric differs from a defined one by infinity.

    Raises:
        RunError: the test set has other images than the run's.
    """
    category, seed, select = recorded["category"], recorded["seed"], recorded["select"]
    of_best_test = finished.experiment.select == "best_test"
    suffix = "-last" if of_best_test and select == "last" else ""
    scores = test.score(finished.detector(category, seed, suffix))
    measured = test.measure(scores)
    if select == "best_test":  # its pixel metrics are those of another state
        from utils.evaluation.monitor import merged

        best_pixel = test.score(finished.detector(category, seed, "-pixel"))
        measured = merged(measured, test.measure(best_pixel))
    values = measured.values

    saved = finished.run.load_scores(category, seed, suffix)
    if saved["label"].tolist() != test.labels.tolist():
        raise RunError(
            f"{category}: the test set has {len(test.labels)} images and the run's scores are of "
            f"{len(saved['label'])}, or their labels differ: point --data-root to the run's data"
        )
    # A metric that came after the run has nothing to be compared with.
    known = [name for name in metric_names() if name in recorded]
    differences = {name: _difference(values[name], recorded[name]) for name in known}
    worst = max(differences, key=lambda name: differences[name])
    return {
        "category": category,
        "seed": seed,
        "select": select,
        **values,
        "undefined": "; ".join(f"{n}: {why}" for n, why in measured.undefined.items()),
        "metric_difference": differences[worst],
        "worst_metric": worst if differences[worst] else "",
        "score_difference": float(np.abs(scores.images.numpy() - saved["score"]).max()),
    }


def is_equal(row: Mapping[str, Any]) -> bool:
    """Tell whether metrics and scores are the recorded ones to the last digit."""
    return row["metric_difference"] == 0 and row["score_difference"] == 0


def verdict(row: Mapping[str, Any]) -> str:
    """Say in one line how a row compares with the recorded one."""
    name = f"{row['category']}  seed {row['seed']}  {row['select']}"
    if is_equal(row):
        return f"{name}:  equal"
    largest = f"{row['metric_difference']:.3g}"
    which = f" ({row['worst_metric']})" if row["worst_metric"] else ""
    return (
        f"{name}:  DIFFERENT, metrics by up to {largest}{which}, "
        f"scores by up to {row['score_difference']:.3g}"
    )


def table_of(finished: "FinishedRun", rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the run's table from the new numbers."""
    experiment = finished.experiment
    pairs = finished_pairs(finished.run)
    categories = list(dict.fromkeys(category for category, _ in pairs))
    seeds = list(dict.fromkeys(seed for _, seed in pairs))
    if len(pairs) < len(categories) * len(seeds):
        return "The run is unfinished: its table has holes, and is not shown."
    about = Benchmark(
        title=f"{experiment.title}; evaluated again",
        categories=categories,
        seeds=seeds,
        metrics=[m.name for m in table_metrics(rows[0], has_maps=experiment.map_size is not None)],
        groups=groups_of(experiment),
    )
    why = [f"{name}: {reason}" for name, reason in undefined_reasons(rows).items()]
    return to_text(build_table(rows, about, nan_reasons=why))


def _difference(new: float, old: float) -> float:
    if math.isnan(new) or math.isnan(old):
        return 0.0 if math.isnan(new) and math.isnan(old) else math.inf
    return abs(new - old)


if __name__ == "__main__":
    raise SystemExit(main())
