"""Semantic anomaly detection on grey images: scikit-learn's digits, MNIST, Fashion-MNIST.

    python train_mnist.py                                                          # no download
    python train_mnist.py mnist --data-root /data/mnist --seeds 0 1 2              # last epoch
    python train_mnist.py fashion_mnist --data-root /data/fashion --select best_test # paper: 95.4

The paper's number (Table II of the NoCo paper, published training, method `noco`) is the mean image
AUROC in percent, the maximum over repeated evaluations on the test set; `--select best_test` does
the same and says so. The experiment is that of train_cifar10.py: only the data sets and their
presets differ (grey images become RGB, 20 epochs instead of 10).
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
    experiment = SCRIPTS["train_mnist"].parse(words)
    require_device(experiment.device)
    # Tasks share the images of the data set: the backbone sees each once.
    tasks = read_tasks(experiment)

    # Only now: torch takes seconds to import, and a mistyped option is told without it.
    from pipeline.features import Extraction, extractor_of
    from pipeline.recording import write_table
    from pipeline.training import open_run, train_together

    extractor = extractor_of(experiment)
    run = open_run(experiment, tasks, extractor, ["train_mnist.py", *words])
    extraction = Extraction(experiment, extractor)
    for task in tasks:
        if run.pending(task.category):
            with faults_named(task.category):
                train_together(experiment, run, extraction, [task])
    write_table(experiment, run, tasks, extractor)
    return run.folder


if __name__ == "__main__":
    main()
