"""Structured anomaly detection: MVTec AD, MPDD, VisA, your own folders, or the embedded demo.

Reproduces Tables II and III of the NoCo paper (published training, `noco`):

    python train_mvtec.py mvtec --data-root /data/mvtec --select best_test     # paper: 99.2
    python train_mvtec.py mpdd  --data-root /data/mpdd  --select best_test     # paper: 92.3
    python train_mvtec.py visa  --data-root /data/visa  --select best_test     # paper: 93.7
    python train_mvtec.py mvtec --data-root /data/mvtec --seeds 0 1 2          # honest: last epoch
    python train_mvtec.py folder --data-root my_images --categories screws     # your own
    python train_mvtec.py demo                                                 # no download

The paper's numbers are mean image AUROC in percent (figures/published.csv), each the maximum over
test-set evaluations after every epoch; `--select best_test` does the same and says so.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from configs.command_line import parse
from configs.methods import METHODS
from configs.structured import DATASETS, StructuredExperiment, structured_experiment
from datasets.demo import build_demo
from datasets.images import read_image
from datasets.loading import BatchLoader, ImageDataset, read_masks
from datasets.samples import Category, DataError, Sample
from datasets.structured import MVTEC_OBJECTS, MVTEC_TEXTURES, list_categories, read_category
from datasets.transforms import PairTransform
from models import build_detector
from models.errors import ModelError
from models.extractor import FrozenExtractor, assemble
from utils.cli import exits_cleanly, naming, pick_device
from utils.evaluation import Monitor, TestSet
from utils.feature_bank import FeatureBank
from utils.overlays import save_overlays
from utils.recording import RANDOM_WEIGHTS, finish_tables, record_pair
from utils.runs import Run, RunError
from utils.seeding import seed_everything

METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro")
GROUPS = {"mvtec": {"mean_textures": MVTEC_TEXTURES, "mean_objects": MVTEC_OBJECTS}}


@exits_cleanly(DataError, ModelError, RunError, FloatingPointError)
def main(argv: Sequence[str] | None = None) -> Path:
    """Train and evaluate every category and seed, write the table, return the run folder."""
    experiment = parse(
        argv,
        compose=structured_experiment,
        datasets=tuple(DATASETS),
        methods=tuple(METHODS),
        prog="train_mvtec.py",
        description="Structured anomaly detection.",
    )
    device = pick_device(experiment.device)
    is_demo = experiment.dataset == "demo"
    root = build_demo(experiment.data_root) if is_demo else experiment.data_root
    categories = list_categories(experiment.dataset, root, experiment.categories or None)
    # Every category is read before any is trained: a broken one is found at once, not after hours.
    data = {
        category: read_category(
            experiment.dataset, root, category, visa_split=experiment.visa_split
        )
        for category in categories
    }
    extractor = FrozenExtractor(
        experiment.backbone,
        experiment.layers,
        weights=experiment.weights,
        patch_size=experiment.patch_size,
        feature_location=experiment.feature_location,
        precision=experiment.precision,
    ).to(device)
    run = Run.open(
        experiment.run_folder,
        experiment.to_json(),
        categories=categories,
        seeds=experiment.seeds,
        command=["train_mvtec.py", *(sys.argv[1:] if argv is None else argv)],
        device=str(device),
        restart=experiment.restart,
    )
    for category in categories:
        seeds = run.pending(category)
        if seeds:
            train_category(experiment, run, extractor, data[category], seeds)
    finish_tables(
        run,
        title=f"{experiment.method_name} on {experiment.dataset}, {experiment.backbone}",
        dataset=experiment.dataset,
        metrics=METRICS,
        select=experiment.select,
        groups=GROUPS.get(experiment.dataset),
        notes=[RANDOM_WEIGHTS] if extractor.random_weights else [],
    )
    return run.folder


def train_category(
    experiment: StructuredExperiment,
    run: Run,
    extractor: FrozenExtractor,
    data: Category,
    seeds: Sequence[int],
) -> None:
    """Extract the features of a category once, then fit and evaluate a head for each seed."""
    transform = PairTransform(experiment.image_size, experiment.crop_size, experiment.resize)
    masks = read_masks(data.test, transform) if data.has_masks else None  # (N, S, S)
    train_bank, skipped_train = extract(experiment, extractor, data.train, transform)
    test_bank, skipped_test = extract(experiment, extractor, data.test, transform)
    samples = [data.test[i] for i in test_bank.indices]
    test = TestSet(
        test_bank,
        torch.tensor([sample.label for sample in samples]),
        None if masks is None else masks[test_bank.indices],
        map_size=experiment.map_size,
        blur_sigma=experiment.blur_sigma,
        batch_size=experiment.extract_batch_size,
    )
    for seed in seeds:
        log = functools.partial(run.log, data.name, seed)
        log(
            event="data",
            skipped=skipped_train + skipped_test,
            empty_masks=[str(samples[i].path) for i in test.empty_masks],
        )
        generator = seed_everything(seed)
        detector = build_detector(
            experiment.method_name, extractor.channels, experiment.method_options()
        ).to(extractor.device)
        monitor = Monitor(detector, test, experiment.select, log)
        with naming(f"{data.name}, seed {seed}"):
            detector.fit(train_bank, generator=generator, monitor=monitor)
        fit_seconds = round(monitor.fit_seconds, 3)

        outcomes = monitor.outcomes()
        if experiment.overlays and seed == experiment.seeds[0]:
            save_overlays(
                run.overlays_folder(data.name, seed),
                images=lambda i: transform.image(read_image(samples[i].path)),
                masks=test.masks,
                anomaly_maps=outcomes[-1].scores.maps,
                scores=outcomes[-1].scores.images,
                labels=test.labels,
                defects=[sample.defect for sample in samples],
                names=[sample.path.name for sample in samples],
                num_worst=experiment.overlays,
                threshold=test.contour_threshold(outcomes[-1].scores),
            )
        summary = record_pair(
            run,
            data.name,
            seed,
            outcomes,
            paths=[sample.path for sample in samples],
            labels=test.labels,
            defects=[sample.defect for sample in samples],
            facts={
                "num_train": len(train_bank),
                "num_test": len(test_bank),
                "skipped": len(skipped_train) + len(skipped_test),
                "empty_masks": len(test.empty_masks),
                "trainable": detector.num_trainable,
                "fit_seconds": fit_seconds,
            },
            metadata={"method": experiment.method_name, "channels": str(extractor.channels)},
            save_maps=experiment.save_maps,
        )
        tqdm.write(summary)


def extract(
    experiment: StructuredExperiment,
    extractor: FrozenExtractor,
    samples: Sequence[Sample],
    transform: PairTransform,
) -> tuple[FeatureBank, list[str]]:
    """Run the backbone once over some images; also return what could not be read."""
    loader = BatchLoader(
        ImageDataset(samples, transform),
        batch_size=experiment.extract_batch_size,
        workers=experiment.workers,
        skip_unreadable=experiment.skip_unreadable,
        pin_memory=extractor.device.type == "cuda",
    )
    bank = FeatureBank.extract(
        extractor,
        loader,
        assemble=assemble,
        device=extractor.device,
        store=experiment.cache,
        description=f"features of {samples[0].path.parents[2].name}",
    )
    return bank, [f"{path}: {why}" for path, why in loader.skipped]


if __name__ == "__main__":
    main()
