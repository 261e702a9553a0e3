"""Structured anomaly detection: MVTec AD, MPDD, VisA, your own folders, or the embedded demo.

Reproduces Tables II and III of the NoCo paper (published training, method `noco`):

    python train_mvtec.py mvtec --data-root /data/mvtec --select best_test     # paper: 99.2
    python train_mvtec.py mpdd --data-root /data/mpdd --select best_test       # paper: 92.3
    python train_mvtec.py visa --data-root /data/visa --select best_test       # paper: 93.7
    python train_mvtec.py mvtec --data-root /data/mvtec --seeds 0 1 2          # honest: last epoch
    python train_mvtec.py folder --data-root my_images --categories screws     # your own images
    python train_mvtec.py demo                                                 # no download
    python train_mvtec.py demo noco_cf --protocol multi-class                  # one head for all

The paper's numbers are mean image AUROC in percent (figures/published.csv), each the maximum over
test-set evaluations after every epoch; `--select best_test` does the same and says so.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.experiments import SCRIPTS, read_tasks
from utils.cli import exits_cleanly, faults_named, require_device


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> Path:
    """Train and evaluate every category and seed, write the table, return the run folder."""
    words = list(sys.argv[1:] if argv is None else argv)
    experiment = SCRIPTS["train_mvtec"].parse(words)
    require_device(experiment.device)
    # Every category is read before any is trained: a broken one is found at once, not after hours.
    tasks = read_tasks(experiment)

    # Only now: torch takes seconds to import, and a mistyped option is told without it.
    from pipeline.features import Extraction, extractor_of
    from pipeline.recording import write_table
    from pipeline.training import open_run, train_together

    extractor = extractor_of(experiment)
    run = open_run(experiment, tasks, extractor, ["train_mvtec.py", *words])
    extraction = Extraction(experiment, extractor)
    for together in [tasks] if experiment.is_joint else [[task] for task in tasks]:
        if run.pending(together[0].category):
            with faults_named(" and ".join(task.category for task in together)):
                train_together(experiment, run, extraction, together)
    write_table(experiment, run, tasks, extractor)
    return run.folder


if __name__ == "__main__":
    main()
