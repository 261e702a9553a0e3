"""Evaluates the saved heads of a finished run again and compares with what the run recorded.

    python evaluate.py RUN                             # from the run's own data folder
    python evaluate.py RUN --data-root /other/place    # from where the images are now

Every head is loaded, the features of the test images are extracted as in training, and the table is
computed anew. On one machine's CPU the numbers are those of results.csv to the last digit. Exit
code: 0 where all are equal, 1 where one differs (by how much is printed), 2 where something went
wrong. The numbers go to RUN/evaluation.csv; no file of the run itself is changed.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tyro

import train_cifar10
import train_mvtec
from configs.prediction import EvaluateOptions
from configs.structured import StructuredExperiment
from datasets.sets.demo.demo import build_demo
from datasets.tasks.labelled import read_labelled_set
from datasets.tasks.one_class import one_class_tasks
from datasets.samples import DataError
from datasets.tasks.structured import read_category
from pipeline.finished import FinishedRun, load_run
from models.errors import ModelError
from utils.cli import exits_cleanly
from utils.evaluation.test_set import TestSet
from utils.runs.finished import finished_pairs
from utils.metrics.metrics import METRIC_NAMES
from utils.runs.files import write_rows
from utils.errors import RunError
from utils.tables.results import build_table


@exits_cleanly(
    *(DataError, ModelError, RunError, FloatingPointError),
    interrupted="interrupted; nothing was written",
)
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate every finished (category, seed), print the table, and return the exit code."""
    options = tyro.cli(EvaluateOptions, args=argv, prog="evaluate.py", description=__doc__)
    finished = load_run(options.run, device=options.device, weights=options.weights)
    experiment = dataclasses.replace(
        finished.experiment,
        data_root=options.data_root or finished.experiment.data_root,
        workers=options.workers,
        cache=options.cache,
    )
    finished = dataclasses.replace(finished, experiment=experiment)

    recorded = finished.run.rows()
    test_set_of = test_sets(finished)
    rows: list[dict[str, Any]] = []
    for category in dict.fromkeys(row["category"] for row in recorded):
        test = test_set_of(category)
        for row in recorded:
            if row["category"] == category:
                rows.append(evaluate_again(finished, test, row))
                sys.stdout.write(f"{verdict(rows[-1])}\n")

    path = options.out or options.run / "evaluation.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, list(rows[0]), rows)
    sys.stdout.write(f"\n{table_of(finished, rows)}\n{path}\n")
    return 0 if all(is_equal(row) for row in rows) else 1


def test_sets(finished: FinishedRun) -> Callable[[str], TestSet]:
    """Return what gives the test set of a category, as the training script builds it."""
    experiment, extractor = finished.experiment, finished.extractor
    if isinstance(experiment, StructuredExperiment):
        structured = experiment
        root = experiment.data_root
        root = build_demo(root) if experiment.dataset == "demo" else root

        def of_category(name: str) -> TestSet:
            category = read_category(
                structured.dataset, root, name, visa_split=structured.visa_split
            )
            return train_mvtec.build_test_set(structured, extractor, category)

        return of_category

    semantic = experiment
    labelled = read_labelled_set(experiment.dataset, experiment.data_root)
    images = labelled.test.dataset(finished.transform)
    bank = train_cifar10.extract(experiment, extractor, images, "test features")

    def of_class(name: str) -> TestSet:
        (task,) = one_class_tasks(labelled, semantic.protocol, [name])
        return train_cifar10.build_test_set(semantic, extractor, labelled, task, bank)

    return of_class


def evaluate_again(
    finished: FinishedRun, test: TestSet, recorded: Mapping[str, Any]
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
    values = test.metrics(scores).values()
    if select == "best_test":  # its pixel metrics are those of another state
        best_pixel = test.metrics(test.score(finished.detector(category, seed, "-pixel"))).values()
        values = {k: (values if k.startswith("image") else best_pixel)[k] for k in METRIC_NAMES}

    saved = finished.run.load_scores(category, seed, suffix)
    if saved["label"].tolist() != test.labels.tolist():
        raise RunError(
            f"{category}: the test set has {len(test.labels)} images and the run's scores are of "
            f"{len(saved['label'])}, or their labels differ: point --data-root to the run's data"
        )
    differences = {name: _difference(values[name], recorded[name]) for name in METRIC_NAMES}
    worst = max(differences, key=lambda name: differences[name])
    return {
        "category": category,
        "seed": seed,
        "select": select,
        **values,
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


def table_of(finished: FinishedRun, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the run's table from the new numbers."""
    experiment = finished.experiment
    pairs = finished_pairs(finished.run)
    categories = list(dict.fromkeys(category for category, _ in pairs))
    seeds = list(dict.fromkeys(seed for _, seed in pairs))
    if len(pairs) < len(categories) * len(seeds):
        return "The run is unfinished: its table has holes, and is not shown."
    is_structured = isinstance(experiment, StructuredExperiment)
    table = build_table(
        rows,
        title=f"{experiment.method_name} on {experiment.dataset}, {experiment.backbone}; "
        "evaluated again",
        categories=categories,
        seeds=seeds,
        metrics=(train_mvtec if is_structured else train_cifar10).METRICS,
        dataset=None,
        groups=train_mvtec.GROUPS.get(experiment.dataset) if is_structured else None,
    )
    return table.to_text()


def _difference(new: float, old: float) -> float:
    if math.isnan(new) or math.isnan(old):
        return 0.0 if math.isnan(new) and math.isnan(old) else math.inf
    return abs(new - old)


if __name__ == "__main__":
    raise SystemExit(main())
