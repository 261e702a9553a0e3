"""What every method costs beside one forward pass per image.

    python -m benchmarks.methods                                  # the embedded demo, brick
    python -m benchmarks.methods --data-root MY_IMAGES --category tile --methods noco_cf padim

Each method runs with its preset, on one category, in one process. The unit is what decoding and
one pass of the backbone over the training images take for the stages that method uses: a fit of 0.5
adds half of that, and a scoring of 0.05 adds 5 % to the pass over the test images. Methods that
train for many epochs are timed for `--measured` of them and projected, which the table says;
methods that train a network take images, so their own passes are in their fit and scoring. All
ratios are medians of `--repeats`, each beside its own passes.
"""

import argparse
import dataclasses
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import sklearn.cluster  # noqa: F401  models.features.kmeans imports it late: not to be timed
import torch

from benchmarks.images import loader_of, read_tasks
from configs.structured import StructuredExperiment
from datasets.samples import ImageSet, Task
from models.building import build_detector, build_extractor
from models.errors import ModelError
from models.method import find_method, find_methods
from pipeline.experiments import structured_catalogue
from pipeline.features import scoring_of, transform_of
from utils.device import keep_freed_memory, pick_device
from utils.evaluation.scoring import score_all
from utils.features.bank import FeatureBank


def main() -> None:
    """Time the methods and print their costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder of categories; the demo without it")
    parser.add_argument("--category", default="brick")
    parser.add_argument("--methods", nargs="+", default=list(find_methods("structured")))
    parser.add_argument("--measured", type=int, default=2, help="epochs that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    warnings.simplefilter("ignore")  # two epochs teach nothing, and some methods say so
    (task,) = read_tasks(arguments.data_root, arguments.category)
    print(f"{len(task.train)} train and {len(task.test)} test images\n")
    print("| method | fit | scoring | head MB | |\n| --- | ---: | ---: | ---: | --- |")
    for method in arguments.methods:
        if method.endswith(":NAME"):
            continue  # a library's models are named one by one: --methods anomalib:padim
        try:
            experiment = structured_catalogue().compose("demo", method)
            print(_row(task, experiment, arguments.measured, arguments.repeats))
        except ModelError as error:
            print(f"| {method} | | | | {error} |")


def _row(task: Task, experiment: StructuredExperiment, measured: int, repeats: int) -> str:
    """Time one method; return its line of the table."""
    device = pick_device("auto")
    transform = transform_of(experiment)
    options: dict[str, Any] = {
        "patch_size": experiment.patch_size,
        "feature_location": experiment.feature_location,
    }

    def extractor_for(method: str) -> Any:
        where = (experiment.backbone, experiment.layers)
        return build_extractor(find_method(method), *where, **options).to(device)

    extractor, passing = extractor_for(experiment.method_name), extractor_for("noco")

    def read(images: ImageSet, source: Any) -> tuple[FeatureBank, float]:
        start = time.perf_counter()
        bank = FeatureBank.extract(source, loader_of(images, transform, device=device))
        return bank, time.perf_counter() - start

    read(task.test, passing)  # warm
    train, _ = read(task.train, extractor)
    bank, _ = read(task.test, extractor)
    scoring = scoring_of(experiment, extractor)

    method = experiment.method
    projected = {
        name: getattr(method, name)
        for name in ("epochs", "pretrain_epochs")
        if (getattr(method, name, 0) or 0) > measured
    }
    share = sum(projected.values()) / (measured * len(projected)) if projected else 1
    fits, scorings = [], []
    for _ in range(repeats):
        _, train_pass = read(task.train, passing)
        _, test_pass = read(task.test, passing)
        changes: dict[str, Any] = dict.fromkeys(projected, measured)
        shortened = dataclasses.replace(method, **changes)
        head = build_detector(experiment.method_name, extractor, shortened).to(device)
        start = time.perf_counter()
        head.fit(train, generator=torch.Generator().manual_seed(0))
        _wait(device)
        fits.append(share * (time.perf_counter() - start) / train_pass)
        start = time.perf_counter()
        score_all(head, bank, scoring)
        scorings.append((time.perf_counter() - start) / test_pass)
    megabytes = sum(t.numel() * t.element_size() for t in head.state_dict().values()) / 1e6
    note = f"projected from {measured} of {sum(projected.values())} epochs" if projected else ""
    cells = [experiment.method_name, f"{median(fits):.2f}", f"{median(scorings):.2f}"]
    return f"| {' | '.join([*cells, f'{megabytes:.1f}', note])} |"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
