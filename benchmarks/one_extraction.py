"""One extraction for all one-class tasks against extracting again in every epoch of every class.

    python -m benchmarks.one_extraction --data-root MY_CLASSES
    python -m benchmarks.one_extraction                          # scikit-learn's digits

The released semantic scripts run the backbone over a class's training images in each epoch, and
over the whole test set at each evaluation. Here both schemes are timed side by side in one run.
Ours runs in full. The other is timed for one class, one epoch with its backbone passes and one
evaluation, and projected to all classes and epochs (it is linear in both).
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.images import loader_of
from datasets.data_set import SemanticSet, find_data_sets
from datasets.reading.transforms import PairTransform
from datasets.tasks.labelled import LabelledSet
from datasets.tasks.one_class import one_class_tasks
from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.methods.noco import Noco, NocoOptions
from utils.device import pick_device
from utils.evaluation.scoring import Scoring
from utils.evaluation.test_set import TestSet
from utils.features.bank import FeatureBank

EPOCHS = 10  # of the released CIFAR script
OPTIONS = NocoOptions(loss="squared", nu=1.0, learning_rate=1e-3, batch_size=64)
SCORING = Scoring(batch_size=1024)


def main() -> None:
    """Time both schemes and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder of classes; digits without it")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=96)
    arguments = parser.parse_args()
    device = pick_device("auto")
    dataset = "digits" if arguments.data_root is None else "folder"
    labelled = find_data_sets(SemanticSet)[dataset].read(arguments.data_root or Path())
    extractor = FrozenExtractor(arguments.backbone, (4,), pooled=True).to(device)
    transform = PairTransform(arguments.image_size, None, "bilinear_shorter")
    extract(extractor, labelled, transform, "test", np.arange(min(64, len(labelled.test))))  # warm

    ours, num_tasks = time_ours(extractor, labelled, transform)
    epoch, evaluation = time_one_epoch(extractor, labelled, transform)
    theirs = num_tasks * EPOCHS * (epoch + evaluation)
    images = len(labelled.train), len(labelled.test)
    print(f"{dataset}: {images[0]} train and {images[1]} test images, {num_tasks} tasks\n")
    print("| scheme | relative time |\n| --- | ---: |")
    print("| one extraction, all heads (measured in full) | 1 |")
    print(f"| backbone in every epoch and evaluation (projected) | {theirs / ours:.1f} |")
    print(f"| backbone in every epoch only (projected) | {num_tasks * EPOCHS * epoch / ours:.1f} |")


def time_ours(
    extractor: FrozenExtractor, labelled: LabelledSet, transform: PairTransform
) -> tuple[float, int]:
    """Return the seconds of all tasks on shared features, and their number."""
    start = time.perf_counter()
    train = extract(extractor, labelled, transform, "train", np.arange(len(labelled.train)))
    test_bank = extract(extractor, labelled, transform, "test", np.arange(len(labelled.test)))
    tasks = one_class_tasks(labelled, "one-vs-rest")
    for task in tasks:
        test = test_set(test_bank, task.test_labels)
        head = new_head(extractor, EPOCHS).to(extractor.device)
        watch = Watch(head, test)
        generator = torch.Generator().manual_seed(0)
        head.fit(train.subset(task.train_indices), generator=generator, monitor=watch)
    return time.perf_counter() - start, len(tasks)


def new_head(extractor: FrozenExtractor, epochs: int) -> Noco:
    """Return an untrained head."""
    shape = FeatureShape(extractor.stage_channels)
    return Noco(shape, dataclasses.replace(OPTIONS, epochs=epochs)).to(extractor.device)


@dataclasses.dataclass(frozen=True)
class Watch:
    """Evaluates a head on the test set after each epoch, as the released scripts do."""

    head: Noco
    test: TestSet
    scores_steps: bool = True

    def __call__(self, _step: int, _values: dict[str, float], /) -> None:
        """Take the end of an epoch."""
        self.test.measure(self.test.score(self.head))


def time_one_epoch(
    extractor: FrozenExtractor, labelled: LabelledSet, transform: PairTransform
) -> tuple[float, float]:
    """Return the seconds of one epoch and of one evaluation, each with its backbone passes."""
    task = one_class_tasks(labelled, "one-vs-rest")[0]
    head = new_head(extractor, 1).to(extractor.device)
    start = time.perf_counter()
    bank = extract(extractor, labelled, transform, "train", task.train_indices)
    head.fit(bank, generator=torch.Generator().manual_seed(0))
    middle = time.perf_counter()
    test = extract(extractor, labelled, transform, "test", np.arange(len(labelled.test)))
    scored = test_set(test, task.test_labels)
    scored.measure(scored.score(head))
    return middle - start, time.perf_counter() - middle


def extract(
    extractor: FrozenExtractor,
    labelled: LabelledSet,
    transform: PairTransform,
    split: str,
    indices: np.ndarray,
) -> FeatureBank:
    """Decode some images of a split and run the backbone over them."""
    whole = labelled.train if split == "train" else labelled.test
    part = dataclasses.replace(
        whole,
        labels=whole.labels[indices],
        images=None if whole.images is None else whole.images[indices],
        paths=None if whole.paths is None else tuple(whole.paths[i] for i in indices),
    )
    loader = loader_of(part, transform, workers=0)
    return FeatureBank.extract(extractor, loader, description=split)


def test_set(bank: FeatureBank, labels: np.ndarray) -> TestSet:
    """Wrap features and labels for scoring."""
    names = [str(i) for i in range(len(bank))]
    return TestSet(bank, torch.from_numpy(labels), names=names, kinds=names, scoring=SCORING)


if __name__ == "__main__":
    main()
