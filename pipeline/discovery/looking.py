"""What is looked at: images with their features and maps, of a run or of other software."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.discovery import DiscoverOptions
from configs.structured import StructuredExperiment
from configs.tiles import Tiling
from datasets.reading.finding import find_images
from datasets.reading.transforms import PairTransform
from datasets.samples import ImageSet, Task
from models.backbone.raw_images import RawImages
from models.detector import Extractor
from pipeline.discovery.maps import Maps, MapsOfFolder, MapsOfRun
from pipeline.experiments import read_tasks, structured_catalogue
from pipeline.features import Extraction, extractor_of
from pipeline.finished import FinishedRun, load_run
from utils.discovery.contrast import Standard, standard_of
from utils.discovery.files import GOOD
from utils.discovery.levels import Levels, levels_of
from utils.errors import UsageError
from utils.evaluation.scoring import score_all
from utils.evaluation.selection import split_off
from utils.features.features import Features, boxes_at, windows_of
from utils.features.joined import join_features
from utils.features.tiled import of_windows, whole_stages
from utils.runs.finished import choose_pair, finished_pairs
from utils.seeding import seed_everything

HELD_OUT_SHARE = 0.2
"""Of the normal training images, on which a second head, fitted on the rest, is measured."""


@dataclass(frozen=True)
class Batch:
    """Some of the images that are looked at.

    Attributes:
        numbers: (B,) positions among all.
        stages: features of the backbone (B, C_l, H_l, W_l).
        maps: B maps (h, w).
        scores: B image scores.
    """

    numbers: Sequence[int]
    stages: list[Tensor]
    maps: list[np.ndarray]
    scores: list[float]


@dataclass(frozen=True)
class Looked:
    """The images of one category.

    Attributes:
        category: its name.
        paths: (N,) those that could be read.
        names: (N,) kinds that the folders say; None without labels.
        masks: (N,) the data set's masks; None without.
        features: of the images; read in batches, and on disk where they are many.
        normals: features of normal training images; None where there are none, so that what the
            images vary by stands for what normal ones do.
        maps: of the images.
        transform: what the backbone saw of an image.
        extractor: what made the features.
        batch_size: images at once.
        levels: what maps of held-out normal images reach; None where nothing asks for it.
        head: file of the head whose maps they are; None for maps of other software.
        tiling: windows that the images were cut into; None where they are whole.
    """

    category: str
    paths: Sequence[Path]
    names: Sequence[str] | None
    masks: Sequence[Path | None] | None
    features: Features
    normals: Features | None
    maps: Maps
    transform: PairTransform
    extractor: Extractor
    batch_size: int
    levels: Levels | None = None
    head: Path | None = None
    tiling: Tiling | None = None

    @torch.inference_mode()
    def batches(self) -> Iterator[Batch]:
        """Go through the images in order; nothing of a batch is kept."""
        done = 0
        for stages in self.features.stage_batches(self.batch_size):
            numbers = range(done, done + len(stages[0]))
            boxes = boxes_at(self.features, torch.tensor(numbers))
            maps, scores = self.maps.of(stages, [self.paths[i] for i in numbers], boxes)
            yield Batch(numbers, self._of_whole_images(stages), maps, scores)
            done += len(stages[0])

    def standard(self) -> Standard:
        """Measure the features of normal images; without any, those of the images themselves."""
        source = self.features if self.normals is None else self.normals
        with torch.inference_mode():
            return standard_of(
                self._of_whole_images(stages) for stages in source.stage_batches(self.batch_size)
            )

    def _of_whole_images(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the frozen backbone's features of what the method takes of images."""
        if self.tiling is None:
            return frozen_stages(self.extractor, stages)
        windows = windows_of(stages, self.tiling.count)
        return whole_stages(frozen_stages(self.extractor, windows), self.tiling)


def frozen_stages(extractor: Extractor, stages: Sequence[Tensor]) -> list[Tensor]:
    """Return the frozen backbone's features, whatever the method takes of images.

    Args:
        extractor: of the method.
        stages: what it made of B images.

    Raises:
        UsageError: the method has no frozen backbone.
    """
    if not isinstance(extractor, RawImages):
        return list(stages)
    if extractor.features is not None:
        return list(stages[:-1])
    return frozen_of(extractor).stage_maps(stages[-1].to(torch.uint8))


def frozen_of(extractor: Extractor) -> Extractor:
    """Return the frozen backbone alone.

    Raises:
        UsageError: the method has none.
    """
    if not isinstance(extractor, RawImages):
        return extractor
    if (frozen := extractor.features or extractor.network) is None:
        raise UsageError(
            "the run's method has a network of its own and no frozen backbone, whose features tell "
            "kinds apart; write its maps with predict.py and give them by --maps and --images"
        )
    return frozen


def look(options: DiscoverOptions, *, needs_levels: bool) -> Iterator[Looked]:
    """Return what is looked at, a category after the other.

    Args:
        options: name a run, or maps and images.
        needs_levels: whether masks are cut by what normal images reach: then a second head is
            fitted on four fifths of them, since a head knows the images it was fitted on too well.

    Raises:
        RunError, DataError, ModelError, UsageError: see `load_run`, `read_tasks`; the run has no
            maps; or there is no such head.
    """
    if options.run is None:
        yield _of_other_software(options)
        return
    changes: dict[str, Any] = {}
    if options.data_root is not None:
        changes["data_root"] = options.data_root
    if options.skip_unreadable:  # a run that did stays one that does
        changes["skip_unreadable"] = True
    finished = load_run(
        options.run,
        device=options.device,
        weights=options.weights,
        workers=options.workers,
        cache=options.cache,
        **changes,
    )
    if not isinstance(finished.experiment, StructuredExperiment):
        raise UsageError(
            f"{options.run}: its images are of whole objects and have no maps; kinds of defects "
            "are looked for in runs of train_mvtec.py"
        )
    for category, seed in chosen_pairs(finished, options):
        yield _of_run(options, finished, category, seed, needs_levels)


def chosen_pairs(finished: FinishedRun, options: DiscoverOptions) -> list[tuple[str, int]]:
    """Return the finished categories that are meant, each with its seed.

    Raises:
        UsageError: there is none, or several seeds are finished and none is named.
    """
    if options.category is not None:
        return [choose_pair(finished.run, options.category, options.seed)]
    names = dict.fromkeys(category for category, _ in finished_pairs(finished.run))
    return [choose_pair(finished.run, name, options.seed) for name in names]


def _of_run(
    options: DiscoverOptions, finished: FinishedRun, category: str, seed: int, needs_levels: bool
) -> Looked:
    (task,) = read_tasks(finished.experiment, [category])
    extraction = Extraction(finished.experiment, finished.extractor)
    detector = finished.detector(category, seed)
    normals, _ = extraction.normals_of(task)
    levels = None
    if needs_levels:
        others = []
        if finished.experiment.is_joint:
            names = dict.fromkeys(name for name, _ in finished_pairs(finished.run))
            others = read_tasks(finished.experiment, [name for name in names if name != category])
        beside = [extraction.normals_of(other)[0] for other in others]
        levels = _levels(finished, normals, beside, (category, seed), options.false_alarm_rate)
    words = options.assign or options.images
    test = ImageSet("test", paths=tuple(find_images(words))) if words else task.test
    features = _images_of(extraction, task, test)
    assert test.paths is not None
    if options.leave_out:
        features = features.subset(_others(task, features.indices, options.leave_out))
    rows = [int(i) for i in features.indices]
    paths = [test.paths[i] for i in rows]
    maps: Maps = MapsOfRun(detector, finished)
    if options.maps is not None:
        maps = MapsOfFolder(options.maps, paths)
    return Looked(
        category,
        paths,
        None if words else [GOOD if task.test_labels[i] == 0 else task.kinds[i] for i in rows],
        None if words or task.masks is None else [task.masks[i] for i in rows],
        features,
        normals,
        maps,
        finished.transform,
        finished.extractor,
        finished.scoring.images_at_once(),
        levels,
        None if options.maps is not None else finished.run.head_path(category, seed),
        finished.experiment.tiling,
    )


def _images_of(extraction: Extraction, task: Task, images: ImageSet) -> Features:
    """Return the features of images; those that cannot be read are named."""
    features = extraction.features_of(task, images)
    for reason in features.skipped:
        sys.stderr.write(f"not looked at: {reason}\n")
    return features


def _others(task: Task, indices: Sequence[int], names: Sequence[str]) -> list[int]:
    """Return the rows of images whose folder has none of some names.

    Raises:
        UsageError: no image is left.
    """
    rows = [row for row, i in enumerate(indices) if task.kinds[i] not in names]
    if not rows:
        raise UsageError(f"{task.category}: --leave-out {' '.join(names)} leaves no image")
    return rows


def _levels(
    finished: FinishedRun,
    normals: Features,
    others: Sequence[Features],
    pair: tuple[str, int],
    rate: float,
) -> Levels:
    """Fit the head again without some of the images, and measure these.

    Args:
        finished: the run.
        normals: of the category.
        others: those of the other categories that the head is for.
        pair: category and seed.
        rate: of false alarms.

    Raises:
        UsageError: fewer normal images than five.
    """
    category, seed = pair
    num_held = round(HELD_OUT_SHARE * len(normals))
    if num_held == 0:
        raise UsageError(
            f"{category}: of {len(normals)} normal images none can be held out; use --masks mebin"
        )
    kept, held = split_off(len(normals), num_held)
    generator = seed_everything(seed)
    detector = finished.unfitted(category, seed).to(finished.device)
    fitted = of_windows(join_features([normals.subset(kept), *others]), finished.scoring.tiles)
    detector.fit(fitted, generator=generator)
    scores = score_all(detector.eval(), normals.subset(held), finished.scoring)
    return levels_of(scores.maps.cpu().numpy(), scores.images.numpy(), rate)


def _of_other_software(options: DiscoverOptions) -> Looked:
    """Look at images with maps of other software, with the features of a backbone alone."""
    assert options.maps is not None
    default = structured_catalogue().compose("folder", "noco_cf")
    experiment = replace(
        default,
        backbone=options.backbone,
        device=options.device,
        workers=options.workers,
        cache=options.cache,
        weights=options.weights or default.weights,
        skip_unreadable=options.skip_unreadable,
    )
    paths = tuple(find_images(options.images))
    extraction = Extraction(experiment, extractor_of(experiment))
    images = ImageSet("test", paths=paths)
    features = _images_of(extraction, _task_of(images), images)
    found = [paths[int(i)] for i in features.indices]
    return Looked(
        options.maps.name,
        found,
        None,
        None,
        features,
        None,
        MapsOfFolder(options.maps, found),
        extraction.transform,
        extraction.extractor,
        experiment.extract_batch_size,
    )


def _task_of(images: ImageSet) -> Task:
    """Return a task that has images and nothing else, which extraction wants a name of."""
    nothing = np.zeros(0, dtype=np.int64)
    return Task(
        category="images",
        label="images",
        train=images,
        train_indices=nothing,
        test=images,
        test_labels=nothing,
        kinds=(),
    )
