"""Semantic anomaly detection on grey images: scikit-learn's digits, MNIST, Fashion-MNIST.

    python train_mnist.py                                                          # no download
    python train_mnist.py mnist --data-root /data/mnist --seeds 0 1 2              # last epoch
    python train_mnist.py fashion_mnist --data-root /data/fashion --select best_test # paper: 95.4

The paper's number (Table II of the NoCo paper, published training, method `noco`) is the mean image
AUROC in percent, the maximum over repeated evaluations on the test set; `--select best_test` does
the same and says so. The experiment is that of train_cifar10.py, read its `run_one_class_tasks`:
only the data sets and their presets differ (grey images become RGB, 20 epochs instead of 10).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from configs.command_line import parse
from configs.methods import SEMANTIC_METHODS
from configs.semantic import GREY, semantic_experiment
from datasets.samples import DataError
from models.errors import ModelError
from train_cifar10 import run_one_class_tasks
from utils.cli import exits_cleanly
from utils.runs.run import RunError


@exits_cleanly(DataError, ModelError, RunError, FloatingPointError)
def main(argv: Sequence[str] | None = None) -> Path:
    """Train and evaluate every normal class and seed, write the table, return the run folder."""
    experiment = parse(
        argv,
        compose=semantic_experiment,
        datasets=tuple(GREY),
        methods=SEMANTIC_METHODS,
        prog="train_mnist.py",
        description="Semantic anomaly detection on grey images.",
    )
    command = ["train_mnist.py", *(sys.argv[1:] if argv is None else argv)]
    return run_one_class_tasks(experiment, command)


if __name__ == "__main__":
    main()
