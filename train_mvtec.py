"""Structured anomaly detection: MVTec AD, MPDD, VisA, your own folders, or the embedded demo.

Reproduces Tables II and III of the NoCo paper (published training, method `noco`):

    python train_mvtec.py mvtec --data-root /data/mvtec --select best_test     # paper: 99.2
    python train_mvtec.py mpdd --data-root /data/mpdd --select best_test       # paper: 92.3
    python train_mvtec.py visa --data-root /data/visa --select best_test       # paper: 93.7
    python train_mvtec.py mvtec --data-root /data/mvtec --seeds 0 1 2          # honest: last epoch
    python train_mvtec.py folder --data-root my_images --categories screws     # your own images
    python train_mvtec.py demo                                                 # no download

The paper's numbers are mean image AUROC in percent (figures/published.csv), each the maximum over
test-set evaluations after every epoch; `--select best_test` does the same and says so.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.command_line import parse
from configs.methods import STRUCTURED_METHODS
from configs.structured import DATASETS, StructuredExperiment, structured_experiment
from datasets.sets.demo.demo import build_demo
from datasets.reading.images import read_image
from datasets.reading.loading import BatchLoader, ImageDataset, Images, read_masks
from datasets.samples import Category, DataError
from datasets.tasks.structured import MVTEC_OBJECTS, MVTEC_TEXTURES, list_categories, read_category
from datasets.synthetic import SyntheticDataset, cutpaste
from datasets.reading.transforms import PairTransform
from models import Extractor
from models import build_detector
from models import build_extractor
from models.detector import Detector
from models.errors import ModelError
from utils.evaluation.calibration import held_out_for_calibration
from utils.cli import exits_cleanly, faults_named, pick_device
from utils.evaluation.test_set import Outcome, TestSet
from utils.features.extraction import extract_features
from utils.features.store import default_folder
from utils.features.features import Features
from utils.pictures.overlays import save_overlays
from utils.runs.recording import RANDOM_WEIGHTS, finish_tables, fit_and_record
from utils.runs.run import Run, RunError
from utils.evaluation.selection import hold_out, num_copies, validation_set

METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro")
GROUPS = {"mvtec": {"mean_textures": MVTEC_TEXTURES, "mean_objects": MVTEC_OBJECTS}}


@exits_cleanly(DataError, ModelError, RunError, FloatingPointError)
def main(argv: Sequence[str] | None = None) -> Path:
    """Train and evaluate every category and seed, write the table, return the run folder."""
    experiment = parse(
        argv,
        compose=structured_experiment,
        datasets=tuple(DATASETS),
        methods=STRUCTURED_METHODS,
        prog="train_mvtec.py",
        description="Structured anomaly detection.",
    )
    device = pick_device(experiment.device)

    # Every category is read before any is trained: a broken one is found at once, not after hours.
    dataset, root = experiment.dataset, experiment.data_root
    root = build_demo(root) if dataset == "demo" else root
    categories = list_categories(dataset, root, experiment.categories or None)
    data = [read_category(dataset, root, c, visa_split=experiment.visa_split) for c in categories]
    if experiment.calibration_share:
        for category in data:
            calibration_split(experiment, category.name, len(category.train))

    extractor = build_extractor(
        experiment.method_name,
        experiment.backbone,
        experiment.layers,
        weights=experiment.weights,
        patch_size=experiment.patch_size,
        feature_location=experiment.feature_location,
        precision=experiment.precision,
        compile_backbone=experiment.compile,
    ).to(device)
    # A method that cannot be built says so now, not after the images are read.
    build_detector(experiment.method_name, extractor, experiment.method_options())
    run = Run.open(
        experiment.run_folder,
        experiment.to_json(),
        categories=categories,
        seeds=experiment.seeds,
        command=["train_mvtec.py", *(sys.argv[1:] if argv is None else argv)],
        device=str(device),
        restart=experiment.restart,
    )
    for category in data:
        if run.pending(category.name):
            with faults_named(category.name):
                train_category(experiment, run, extractor, category)
    finish_tables(
        run,
        title=f"{experiment.method_name} on {dataset}, {experiment.backbone}",
        dataset=dataset,
        metrics=METRICS,
        select=experiment.select,
        method=experiment.method_name,
        groups=GROUPS.get(dataset),
        notes=[RANDOM_WEIGHTS] if extractor.random_weights else [],
    )
    return run.folder


def train_category(
    experiment: StructuredExperiment, run: Run, extractor: Extractor, category: Category
) -> None:
    """Extract the features of a category once, then fit and evaluate a head for each seed."""
    transform = transform_of(experiment)
    train_images = ImageDataset(category.train, transform)
    train_bank = extract(experiment, extractor, train_images, f"{category.name}: train features")
    test = build_test_set(experiment, extractor, category)

    calibration = None
    if experiment.calibration_share:
        fitted, held = calibration_split(experiment, category.name, len(train_bank))
        held_bank = train_bank.subset(held)
        calibration = TestSet(
            held_bank,
            torch.zeros(len(held_bank)),
            names=[category.train[i].path for i in held_bank.indices],
            kinds=["good"] * len(held_bank),
            **scoring_of(experiment),
        )
        train_bank = train_bank.subset(fitted)

    validation = None
    if experiment.select == "synthetic":
        kept, held = hold_out(len(train_bank))
        originals = [category.train[i] for i in train_bank.subset(held).indices]
        pasted = SyntheticDataset(
            ImageDataset(originals, transform), cutpaste, copies=num_copies(len(originals))
        )
        what = f"{category.name}: features of pasted defects"
        pasted_bank = extract(experiment, extractor, pasted, what)
        pasted_masks = pasted.masks(pasted_bank.indices)
        validation = validation_set(
            train_bank, kept, held, pasted_bank, pasted_masks, **scoring_of(experiment)
        )

    def build(changes: dict[str, Any]) -> Detector:
        options = experiment.method_options() | changes
        head = build_detector(experiment.method_name, extractor, options)
        return head.to(extractor.device)

    def draw(outcome: Outcome) -> None:
        save_overlays(
            run.overlays_folder(category.name, experiment.seeds[0]),
            images=lambda i: transform.image(read_image(Path(test.names[i]))),
            masks=test.masks,
            anomaly_maps=outcome.scores.maps.cpu(),
            scores=outcome.scores.images,
            labels=test.labels,
            defects=test.kinds,
            names=[Path(name).name for name in test.names],
            num_worst=experiment.overlays,
            threshold=outcome.contour_threshold,
            title=category.name,
        )

    for seed in run.pending(category.name):
        with_pictures = experiment.overlays and seed == experiment.seeds[0]
        fit_and_record(
            run,
            category.name,
            seed,
            build,
            train_bank,
            test,
            select=experiment.select,
            candidates=experiment.candidates(),
            validation=validation,
            monitor_test=experiment.monitor_test,
            online=experiment.online,
            skipped=train_bank.skipped + test.bank.skipped,
            draw=draw if with_pictures else None,
            save_maps=experiment.save_maps,
            calibration=calibration,
            false_alarm_rate=experiment.false_alarm_rate,
            backbone_digest=extractor.weights_digest,
        )


def transform_of(experiment: StructuredExperiment) -> PairTransform:
    """Return what turns images and masks into what the backbone sees."""
    return PairTransform(experiment.image_size, experiment.crop_size, experiment.resize)


def scoring_of(experiment: StructuredExperiment) -> dict[str, Any]:
    """Return how a `TestSet` scores."""
    return {
        "map_size": experiment.map_size,
        "blur_sigma": experiment.blur_sigma,
        "batch_size": experiment.extract_batch_size,
    }


def extract(
    experiment: StructuredExperiment, extractor: Extractor, images: Images, what: str
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


def build_test_set(
    experiment: StructuredExperiment, extractor: Extractor, category: Category
) -> TestSet:
    """Extract the features of a category's test images and read their masks."""
    transform = transform_of(experiment)
    images = ImageDataset(category.test, transform)
    bank = extract(experiment, extractor, images, f"{category.name}: test features")
    samples = [category.test[i] for i in bank.indices]
    # After the images: the mask of one that was left out as unreadable cannot be checked.
    masks = read_masks(samples, transform) if category.has_masks else None  # (N, S, S)
    return TestSet(
        bank,
        torch.tensor([sample.label for sample in samples]),
        names=[sample.path for sample in samples],
        kinds=[sample.defect for sample in samples],
        masks=masks,
        **scoring_of(experiment),
    )


def calibration_split(
    experiment: StructuredExperiment, category: str, num_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions of the normal images to fit on, and of those that set thresholds."""
    share, rate = experiment.calibration_share, experiment.false_alarm_rate
    return held_out_for_calibration(num_images, share, rate, what=category)


if __name__ == "__main__":
    main()
