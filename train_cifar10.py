"""Semantic anomaly detection on colour images: CIFAR-10, CIFAR-100, cats against dogs, folders.

Reproduces the semantic columns of Table II of the NoCo paper (published training, method `noco`):

    python train_cifar10.py cifar10 --data-root /data/cifar10 --select best_test      # paper: 93.9
    python train_cifar10.py cifar100 --data-root /data/cifar100 --select best_test    # paper: 96.5
    python train_cifar10.py cats_vs_dogs --data-root /data/pets --select best_test    # paper: 97.5
    python train_cifar10.py cifar10 --data-root /data/cifar10 --seeds 0 1 2           # last epoch
    python train_cifar10.py folder --data-root my_classes --protocol leave-one-out    # your own

The paper's numbers are mean image AUROC in percent (figures/published.csv), each the maximum over
repeated evaluations on the test set; `--select best_test` evaluates after every epoch and says so.
The backbone sees every image once: all one-class tasks of a data set share its stored features
(unless `--cache none` stores none).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.experiments import SCRIPTS, read_tasks
from utils.cli import exits_cleanly, faults_named, require_device


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> Path:
    """Train and evaluate every normal class and seed, write the table, return the run folder."""
    words = list(sys.argv[1:] if argv is None else argv)
    experiment = SCRIPTS["train_cifar10"].parse(words)
    require_device(experiment.device)
    # Tasks share the images of the data set: the backbone sees each once.
    tasks = read_tasks(experiment)

    # Only now: torch takes seconds to import, and a mistyped option is told without it.
    from pipeline.features import Extraction, extractor_of
    from pipeline.recording import write_table
    from pipeline.training import open_run, train_together

    extractor = extractor_of(experiment)
    run = open_run(experiment, tasks, extractor, ["train_cifar10.py", *words])
    extraction = Extraction(experiment, extractor)
    for task in tasks:
        if run.pending(task.category):
            with faults_named(task.category):
                train_together(experiment, run, extraction, [task])
    write_table(experiment, run, tasks, extractor)
    return run.folder


if __name__ == "__main__":
    main()
