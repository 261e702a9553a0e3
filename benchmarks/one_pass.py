"""A whole run of `noco_cf` against the passes that no method on a frozen backbone can do without.

    python -m benchmarks.one_pass --data-root MY_IMAGES --repeats 3
    python -m benchmarks.one_pass                                    # the demo textures

The bare passes decode every training and test image and run the backbone as timm builds it over
them, with the same loader, and keep nothing. Beside them in one run: `noco_cf` with an empty disk
cache and again with the one it left: its preset, and with fewer and more centres. All are timed
after the imports, which each process pays once. A second table has the scoring of the test set and
its metrics over the pass of the backbone over it, with decoding.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sklearn.cluster  # noqa: F401  models.features.kmeans imports it late: not to be timed
import torch

import train_mvtec
from benchmarks.images import WHOLE_224, loader_of, read_tasks
from models.backbone.extractor import FrozenExtractor
from utils.device import keep_freed_memory
from utils.evaluation.scoring import Scores
from utils.evaluation.test_set import TestSet
from utils.metrics.evaluate import Measured
from utils.runs.rows import read_rows

BACKBONE = "tf_efficientnet_lite0"
LAYERS = (1, 2, 3, 4)  # the preset of noco_cf
RUNS: dict[str, tuple[str, ...]] = {
    "preset": (),
    "32 centres": ("--method.prototypes", "32"),
    "512 centres": ("--method.prototypes", "512"),
}
"""What is run, and its options beside the preset."""
SHARE = ", share"


def main() -> None:
    """Time bare passes, cold and warm runs, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder of categories; demo without it")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are printed")
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        dataset = "demo" if arguments.data_root is None else "folder"
        root = arguments.data_root
        words = [dataset, "noco_cf", *(["--data-root", str(root)] if root else [])]
        rounds = [measure(root, words, scratch) for _ in range(arguments.repeats)]
    middle = {what: statistics.median(r[what] for r in rounds) for what in rounds[0]}
    bare = middle["bare passes"]
    print(f"{dataset}, {torch.get_num_threads()} threads, median of {arguments.repeats} rounds\n")
    print("| timed after the imports | time / bare passes |\n| --- | ---: |")
    for what, seconds in middle.items():
        if not what.endswith(SHARE):
            print(f"| {what} | {seconds / bare:.2f} |")
    print("\n| test set | scoring and metrics / its pass |\n| --- | ---: |")
    for what in RUNS:
        print(f"| {what} | {middle[what + SHARE]:.2f} |")


def measure(root: Path | None, words: list[str], scratch: Path) -> dict[str, float]:
    """Return the seconds of each thing that is compared, and the shares, measured once."""
    seconds = {"bare passes": clocked(lambda: bare_passes(root))}
    for what, options in RUNS.items():
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            os.environ["NOCO_CACHE"] = cache
            for state in ("cold", "warm"):
                rows: list[dict] = []

                def run(options: tuple[str, ...] = options, rows: list[dict] = rows) -> None:
                    rows += whole_run([*words, *options], scratch / "results")

                with clocked_metrics() as metrics:
                    total = clocked(run)
                seconds[f"{what}, {state} cache: whole run"] = total
                fit_and_score = sum(row["fit_seconds"] + row["score_seconds"] for row in rows)
                seconds[f"{what}, {state} cache: its fit and scoring alone"] = fit_and_score
                scored = sum(row["score_seconds"] for row in rows) + sum(metrics)
                # Of the warm run, whose first allocations are behind it.
                seconds[what + SHARE] = scored / sum(row["pass_test_seconds"] for row in rows)
    return seconds


@contextlib.contextmanager
def clocked_metrics() -> Iterator[list[float]]:
    """Give the seconds of each computation of all metrics within the block."""
    seconds: list[float] = []
    compute = TestSet.measure

    def timed(self: TestSet, scores: Scores) -> Measured:
        start = time.perf_counter()
        measured = compute(self, scores)
        seconds.append(time.perf_counter() - start)
        return measured

    TestSet.measure = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        TestSet.measure = compute  # type: ignore[method-assign]


def clocked(run: Callable[[], None]) -> float:
    """Return the seconds `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bare_passes(root: Path | None) -> None:
    """Decode every image and run the backbone over it."""
    net = FrozenExtractor(BACKBONE, LAYERS)
    for task in read_tasks(root):
        for images in (task.train, task.test):
            for batch in loader_of(images, WHOLE_224):
                with torch.inference_mode():
                    net.net(net.pixels(batch.images))


def whole_run(words: list[str], output: Path) -> list[dict]:
    """Run the training script from images to table; return its rows."""
    options = ["--backbone", BACKBONE, "--cache", "disk", "--overlays", "0", "--restart"]
    with contextlib.redirect_stdout(io.StringIO()):
        folder = train_mvtec.main([*words, *options, "--output", str(output)])
    sys.stdout.flush()
    return read_rows(folder / "results.csv")


if __name__ == "__main__":
    main()
