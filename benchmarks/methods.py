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
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import sklearn.cluster  # noqa: F401  models.features.kmeans imports it late: not to be timed
import torch
from configs.methods import STRUCTURED_METHODS

from configs.cache import cache_folder
from configs.structured import StructuredExperiment, structured_experiment
from datasets.reading.loading import BatchLoader, ImageDataset
from datasets.reading.transforms import PairTransform
from datasets.samples import Category, Sample
from datasets.sets.demo.demo import build_demo
from datasets.tasks.structured import read_category
from models import build_detector, build_extractor
from models.errors import ModelError
from utils.device import keep_freed_memory, pick_device
from utils.evaluation.test_set import TestSet
from utils.features.bank import FeatureBank


def main() -> None:
    """Time the methods and print their costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder of categories; the demo without it")
    parser.add_argument("--category", default="brick")
    parser.add_argument("--methods", nargs="+", default=list(STRUCTURED_METHODS))
    parser.add_argument("--measured", type=int, default=2, help="epochs that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    warnings.simplefilter("ignore")  # two epochs teach nothing, and some methods say so
    root = arguments.data_root or build_demo(cache_folder())
    category = read_category("folder", root, arguments.category)
    print(f"{len(category.train)} train and {len(category.test)} test images\n")
    print("| method | fit | scoring | head MB | |\n| --- | ---: | ---: | ---: | --- |")
    for method in arguments.methods:
        if method.endswith(":NAME"):
            continue  # a library's models are named one by one: --methods anomalib:padim
        try:
            experiment = structured_experiment("demo", method)
            print(_row(category, experiment, arguments.measured, arguments.repeats))
        except ModelError as error:
            print(f"| {method} | | | | {error} |")


def _row(category: Category, experiment: StructuredExperiment, measured: int, repeats: int) -> str:
    """Time one method; return its line of the table."""
    device = pick_device("auto")
    transform = PairTransform(experiment.image_size, experiment.crop_size, experiment.resize)
    options: dict[str, Any] = {
        "patch_size": experiment.patch_size,
        "feature_location": experiment.feature_location,
    }
    extractor = build_extractor(
        experiment.method_name, experiment.backbone, experiment.layers, **options
    ).to(device)
    passing = build_extractor("noco", experiment.backbone, experiment.layers, **options).to(device)

    def read(samples: tuple[Sample, ...], source: Any) -> tuple[FeatureBank, float]:
        loader = BatchLoader(
            ImageDataset(samples, transform),
            batch_size=32,
            workers=2,
            skip_unreadable=False,
            for_gpu=device.type == "cuda",
        )
        start = time.perf_counter()
        bank = FeatureBank.extract(source, loader)
        return bank, time.perf_counter() - start

    read(category.test[:8], passing)  # warm
    train, _ = read(category.train, extractor)
    bank, _ = read(category.test, extractor)
    labels = torch.tensor([sample.label for sample in category.test])
    names = [""] * len(bank)
    test = TestSet(
        bank, labels, names=names, kinds=names, map_size=experiment.map_size,
        blur_sigma=experiment.blur_sigma,
    )  # fmt: skip

    method: dict[str, Any] = experiment.method_options()
    projected = {
        name: method[name]
        for name in ("epochs", "pretrain_epochs")
        if (method.get(name) or 0) > measured and method.get("solver") != "closed_form"
    }
    share = sum(projected.values()) / (measured * len(projected)) if projected else 1
    fits, scorings = [], []
    for _ in range(repeats):
        _, train_pass = read(category.train, passing)
        _, test_pass = read(category.test, passing)
        head = build_detector(
            experiment.method_name, extractor, method | dict.fromkeys(projected, measured)
        ).to(device)
        start = time.perf_counter()
        head.fit(train, generator=torch.Generator().manual_seed(0))
        _wait(device)
        fits.append(share * (time.perf_counter() - start) / train_pass)
        start = time.perf_counter()
        test.score(head)
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
