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

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.command_line import parse
from configs.methods import SEMANTIC_METHODS
from configs.semantic import COLOUR, SemanticExperiment, semantic_experiment
from datasets.reading.images import read_image
from datasets.tasks.labelled import LabelledSet, LabelledSplit, read_labelled_set
from datasets.reading.loading import BatchLoader, Images
from datasets.tasks.one_class import OneClassTask, one_class_tasks
from datasets.samples import DataError
from datasets.synthetic import ImagesAt, SyntheticDataset, rotate
from datasets.reading.transforms import PairTransform
from models import Extractor
from models import build_detector
from models import build_extractor
from models.detector import Detector
from models.errors import ModelError
from models.backbone.raw_images import RawImages
from utils.evaluation.calibration import held_out_for_calibration
from utils.cli import UsageError, exits_cleanly, faults_named, pick_device
from utils.evaluation.test_set import Outcome, TestSet
from utils.features.extraction import extract_features
from utils.features.store import default_folder
from utils.features.features import Features
from utils.pictures.galleries import save_gallery
from utils.runs.recording import RANDOM_WEIGHTS, finish_tables, fit_and_record
from utils.runs.run import Run, RunError
from utils.evaluation.selection import hold_out, validation_set

METRICS = ("image_auroc", "image_ap", "image_f1_max")


@exits_cleanly(DataError, ModelError, RunError, FloatingPointError)
def main(argv: Sequence[str] | None = None) -> Path:
    """Train and evaluate every normal class and seed, write the table, return the run folder."""
    experiment = parse(
        argv,
        compose=semantic_experiment,
        datasets=tuple(COLOUR),
        methods=SEMANTIC_METHODS,
        prog="train_cifar10.py",
        description="Semantic anomaly detection on colour images.",
    )
    command = ["train_cifar10.py", *(sys.argv[1:] if argv is None else argv)]
    return run_one_class_tasks(experiment, command)


def run_one_class_tasks(experiment: SemanticExperiment, command: Sequence[str]) -> Path:
    """Extract a data set's features once, run all its one-class tasks on them, write the table."""
    device = pick_device(experiment.device)
    labelled = read_labelled_set(experiment.dataset, experiment.data_root)
    tasks = one_class_tasks(labelled, experiment.protocol, experiment.categories)
    if experiment.calibration_share:
        for task in tasks:
            calibration_split(experiment, task.category, len(task.train_indices))

    extractor = build_extractor(
        experiment.method_name,
        experiment.backbone,
        experiment.layers,
        weights=experiment.weights,
        feature_location=experiment.feature_location,
        pooled=True,
        precision=experiment.precision,
        compile_backbone=experiment.compile,
    ).to(device)
    # A method that cannot be built says so now, not after the images are read.
    build_detector(experiment.method_name, extractor, experiment.method_options())
    run = Run.open(
        experiment.run_folder,
        experiment.to_json(),
        categories=[task.category for task in tasks],
        seeds=experiment.seeds,
        command=command,
        device=str(device),
        restart=experiment.restart,
    )
    pending = [task for task in tasks if run.pending(task.category)]
    if pending:
        transform = PairTransform(experiment.image_size, experiment.crop_size, experiment.resize)
        train_images = labelled.train.dataset(transform)
        train = extract(experiment, extractor, train_images, "train features")
        test_images = labelled.test.dataset(transform)
        test = extract(experiment, extractor, test_images, "test features")
        turned = None
        if experiment.select == "synthetic":
            held_out = held_out_images(experiment, labelled, train)
            turned_images = ImagesAt(SyntheticDataset(train_images, rotate), held_out)
            turned = extract(experiment, extractor, turned_images, "features of rotated images")
        features = SharedFeatures(train, test, turned)
        for task in pending:
            with faults_named(task.category):
                train_task(experiment, run, extractor, labelled, task, features)
    # The papers' numbers are for one class against the rest.
    published = experiment.dataset if experiment.protocol == "one-vs-rest" else None
    finish_tables(
        run,
        title=f"{experiment.method_name} on {experiment.dataset} ({experiment.protocol}), "
        f"{experiment.backbone}",
        dataset=published,
        metrics=METRICS,
        select=experiment.select,
        method=experiment.method_name,
        display={t.category: f"{t.number} {t.category}" for t in tasks if not t.category.isdigit()},
        shared_images=True,
        notes=[RANDOM_WEIGHTS] if extractor.random_weights else [],
    )
    return run.folder


@dataclass(frozen=True)
class SharedFeatures:
    """Features of a whole data set, which all tasks share.

    `turned` are training images rotated, for `--select synthetic`: those that a task holds out.
    """

    train: Features
    test: Features
    turned: Features | None


def extract(
    experiment: SemanticExperiment, extractor: Extractor, images: Images, what: str
) -> Features:
    """Return the features of some images, stored where `--cache` says."""
    loader = BatchLoader(
        images,
        batch_size=experiment.extract_batch_size,
        workers=experiment.workers,
        skip_unreadable=experiment.skip_unreadable,
        for_gpu=extractor.device.type == "cuda",
    )
    return extract_features(
        extractor, loader, cache=experiment.cache, description=what, folder=default_folder()
    )


def train_task(
    experiment: SemanticExperiment,
    run: Run,
    extractor: Extractor,
    labelled: LabelledSet,
    task: OneClassTask,
    features: SharedFeatures,
) -> None:
    """Fit and evaluate a head for each seed on the shared features of one task."""
    normals, held_bank = normals_of(experiment, task, features.train)
    at_once = batch_size_of(experiment, extractor)
    test = build_test_set(experiment, extractor, labelled, task, features.test)

    calibration = None
    if held_bank is not None:
        calibration = TestSet(
            held_bank,
            torch.zeros(len(held_bank)),
            names=[labelled.train.names[i] for i in held_bank.indices],
            kinds=["good"] * len(held_bank),
            batch_size=at_once,
        )

    validation = None
    if features.turned is not None:
        kept, held = hold_out(len(normals))
        turned_rows = np.isin(features.turned.indices, normals.subset(held).indices).nonzero()[0]
        turned = features.turned.subset(turned_rows)
        validation = validation_set(normals, kept, held, turned, batch_size=at_once)

    def build(changes: dict[str, Any]) -> Detector:
        options = experiment.method_options() | changes
        head = build_detector(experiment.method_name, extractor, options)
        return head.to(extractor.device)

    def draw(outcome: Outcome) -> None:
        anomaly = "anomalous" if experiment.protocol == "leave-one-out" else "normal"
        save_gallery(
            run.overlays_folder(task.category, experiment.seeds[0]) / "gallery.png",
            images=lambda i: shown_image(labelled.test, test.bank.indices[i]),
            scores=outcome.scores.images.numpy(),
            labels=test.labels.numpy(),
            class_names_of_images=test.kinds,
            title=f"{experiment.dataset}, {anomaly}: {task.category}",
            auroc=outcome.metrics["image_auroc"],
            count=experiment.overlays,
        )

    for seed in run.pending(task.category):
        with_pictures = experiment.overlays and seed == experiment.seeds[0]
        fit_and_record(
            run,
            task.category,
            seed,
            build,
            normals,
            test,
            select=experiment.select,
            candidates=experiment.candidates(),
            validation=validation,
            monitor_test=experiment.monitor_test,
            online=experiment.online,
            skipped=features.train.skipped + features.test.skipped,
            draw=draw if with_pictures else None,
            calibration=calibration,
            false_alarm_rate=experiment.false_alarm_rate,
            backbone_digest=extractor.weights_digest,
        )


def normals_of(
    experiment: SemanticExperiment, task: OneClassTask, train: Features
) -> tuple[Features, Features | None]:
    """Return a task's normal features to fit and select on, and those that set thresholds."""
    normals = train.subset(np.isin(train.indices, task.train_indices).nonzero()[0])
    if not experiment.calibration_share:
        return normals, None
    fitted, held = calibration_split(experiment, task.category, len(normals))
    return normals.subset(fitted), normals.subset(held)


def held_out_images(
    experiment: SemanticExperiment, labelled: LabelledSet, train: Features
) -> list[int]:
    """Return which training images some task of the data set holds out to select on.

    Tasks that were not asked for count too, so that a class alone reads the same batches of images,
    and gets the same bits, as among all.
    """
    held: set[int] = set()
    for task in one_class_tasks(labelled, experiment.protocol, ()):
        with contextlib.suppress(UsageError):  # too few images; the task says so if it is run
            normals, _ = normals_of(experiment, task, train)
            held.update(normals.subset(hold_out(len(normals))[1]).indices)
    return sorted(held)


def batch_size_of(experiment: SemanticExperiment, extractor: Extractor) -> int:
    """Return how many images heads get at once."""
    # A pooled feature takes a few kilobytes, an image on its way through a backbone megabytes.
    return experiment.extract_batch_size if isinstance(extractor, RawImages) else 1024


def build_test_set(
    experiment: SemanticExperiment,
    extractor: Extractor,
    labelled: LabelledSet,
    task: OneClassTask,
    bank: Features,
) -> TestSet:
    """Give the data set's test features the labels of a task."""
    return TestSet(
        bank,
        torch.from_numpy(task.test_labels[bank.indices]),
        names=[labelled.test.names[i] for i in bank.indices],
        kinds=[labelled.class_names[labelled.test.labels[i]] for i in bank.indices],
        batch_size=batch_size_of(experiment, extractor),
    )


def calibration_split(
    experiment: SemanticExperiment, category: str, num_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions of the normal images to fit on, and of those that set thresholds."""
    share, rate = experiment.calibration_share, experiment.false_alarm_rate
    return held_out_for_calibration(num_images, share, rate, what=category)


def shown_image(split: LabelledSplit, index: int) -> np.ndarray:
    """Return an image of a split as it is stored, (H, W, 3) uint8."""
    if split.paths is not None:
        return read_image(split.paths[index])
    assert split.images is not None
    image = split.images[index]
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)  # (H, W, 3)


if __name__ == "__main__":
    main()
