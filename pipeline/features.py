"""From images to features: an experiment's backbone, and what each task has of its features."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from configs.structured import StructuredExperiment
from datasets.reading.images import Reading, largest_of_16_bits, read_mask
from datasets.reading.loading import BatchLoader, Images, images_of
from datasets.reading.masks import read_masks, read_regions
from datasets.reading.mvtec_layout import mask_files
from datasets.reading.tiles import TiledImages
from datasets.reading.transforms import PairTransform
from datasets.samples import ImageSet, Region, Task
from datasets.synthetic import ImagesAt, SyntheticDataset, cutpaste, rotate
from models.backbone.raw_images import RawImages
from models.building import build_detector, build_extractor
from models.detector import Extractor
from models.features.matmul import set_fp32
from models.method import find_method
from pipeline.experiments import AnyExperiment
from pipeline.leaks import Leak, Leaks
from utils.device import pick_device, set_deterministic
from utils.errors import UsageError
from utils.evaluation.calibration import held_out_for_calibration
from utils.evaluation.scoring import Scoring
from utils.evaluation.selection import Validation, hold_out, num_copies, validation_set
from utils.evaluation.test_set import TestSet
from utils.features.extraction import extract_features
from utils.features.features import Features
from utils.features.joined import join_features
from utils.features.store import default_folder

LOOKED_AT = 32
"""Training images of which the values of 16-bit files are looked at."""


def extractor_of(experiment: AnyExperiment, *, weights: str | None = None) -> Extractor:
    """Build, on its device, what turns an experiment's images into what its method takes.

    Args:
        experiment: names backbone, stages, weights and device.
        weights: other weights than the experiment's, as `--weights` takes them.

    Raises:
        ModelError: the backbone or its weights cannot be had, or the method cannot be built.
        UsageError: the device cannot be had.
    """
    extractor = build_extractor(
        find_method(experiment.method_name),
        experiment.backbone,
        experiment.layers,
        weights=weights or experiment.weights,
        patch_size=experiment.patch_size if isinstance(experiment, StructuredExperiment) else 1,
        feature_location=experiment.feature_location,
        pool=None if isinstance(experiment, StructuredExperiment) else experiment.pool,
        precision=experiment.precision,
        compile_backbone=experiment.compile,
        image_size=experiment.input_size,
    )
    # A method that cannot be built says so now, not after the images are read.
    build_detector(experiment.method_name, extractor, experiment.method)
    device = pick_device(experiment.device)
    set_fp32("tf32" if experiment.precision == "tf32" else "ieee")
    set_deterministic(experiment.deterministic)
    return extractor.to(device)


def transform_of(experiment: AnyExperiment) -> PairTransform:
    """Return what turns images and masks into what the backbone sees."""
    reading = Reading(experiment.bit_depth, experiment.max_pixels)
    return PairTransform(*experiment.resized, experiment.resize, reading)


def in_windows(images: Images, experiment: AnyExperiment) -> Images:
    """Return images cut into the windows that an experiment asks for."""
    return images if experiment.tiling is None else TiledImages(images, experiment.tiling)


def boxes_of(images: Images, indices: Sequence[int]) -> torch.Tensor | None:
    """Return where images lie in the squares they become, (N, 4); None where they fill them."""
    boxes = [images.box(index) for index in indices]
    known = [box for box in boxes if box is not None]
    return torch.tensor(known) if known else None


def scoring_of(experiment: AnyExperiment, extractor: Extractor) -> Scoring:
    """Return how an experiment's anomaly maps become scores."""
    if isinstance(experiment, StructuredExperiment):
        size, sigma = experiment.map_size, experiment.blur_sigma
        return Scoring(size, sigma, experiment.extract_batch_size, tiling=experiment.tiling)
    # A pooled feature takes a few kilobytes, an image on its way through a backbone megabytes.
    takes_images = isinstance(extractor, RawImages)
    return Scoring(batch_size=experiment.extract_batch_size if takes_images else 1024)


@dataclass(frozen=True)
class TaskData:
    """The features of a task, each part with its job.

    Attributes:
        task: what they are of.
        train: normals that a head is fitted on.
        test: what it is evaluated on.
        validation: what `--select synthetic` chooses by; None for other ways.
        calibration: normals that neither fit nor selection sees; None without
            `--calibration-share`.
        skipped: images left out as unreadable, with the reason.
        remarks: what the table should say of the images.
        leaks: near-duplicates across training, calibration and test.
    """

    task: Task
    train: Features
    test: TestSet
    validation: Validation | None
    calibration: Features | None
    skipped: Sequence[str]
    remarks: Sequence[str] = ()
    leaks: Sequence[Leak] = ()


class Extraction:
    """Runs the backbone over images that a task needs, once, and lets go what no task needs more.

    Args:
        experiment: what is measured.
        extractor: its backbone.
    """

    def __init__(self, experiment: AnyExperiment, extractor: Extractor) -> None:
        self.experiment = experiment
        self.extractor = extractor
        self.transform = transform_of(experiment)
        self.scoring = scoring_of(experiment, extractor)
        self._held: dict[ImageSet, Features] = {}
        self._leaks = Leaks()
        self._turned: tuple[ImageSet, Features] | None = None

    def data_of(self, task: Task) -> TaskData:
        """Return the features of a task; those that it shares with the task before are kept.

        Raises:
            DataError: an image or a mask cannot be read.
            UsageError: too few images for what is asked.
        """
        experiment = self.experiment
        self._keep(task)
        train = self.features_of(task, task.train)
        test = self.test_set_of(task)
        fitted, calibration = self.normals_of(task)
        fitted.held_out = self._held_out(task, test)
        validation = None
        if experiment.select == "synthetic":
            validation = self._validation_of(task, fitted, train)
        skipped = [*train.skipped, *test.bank.skipped]
        remarks = [*self._remarks_on_bits(task), *self._remarks_on_masks(task, test)]
        if test.bank.thumbnails is None:
            remarks.append("Leaks were not looked for: --cache none keeps no thumbnails.")
        leaks = self._leaks.of(task, train, fitted, calibration, test.bank)
        return TaskData(task, fitted, test, validation, calibration, skipped, remarks, leaks)

    def data_together(self, tasks: Sequence[Task]) -> list[TaskData]:
        """Return the features of tasks that one head is for: each has the normals of all to fit on.

        Raises:
            DataError: an image or a mask cannot be read.
            UsageError: too few images for what is asked.
        """
        data = [self.data_of(task) for task in tasks]
        train = join_features([one.train for one in data])
        return [replace(one, train=train) for one in data]

    def normals_of(self, task: Task) -> tuple[Features, Features | None]:
        """Return the normal images that heads are fitted on, and those that set thresholds."""
        normals = _rows_at(self.features_of(task, task.train), task.train_indices)
        if not self.experiment.calibration_share:
            return normals, None
        kept, held = calibration_split(self.experiment, task, len(normals))
        return normals.subset(kept), normals.subset(held)

    def features_of(self, task: Task, images: ImageSet) -> Features:
        """Return the features of all images of one of a task's sets."""
        if images not in self._held:
            dataset = images_of(images, self.transform)
            self._held[images] = self._extract(dataset, task, f"{images.split} features")
        return self._held[images]

    def test_set_of(self, task: Task) -> TestSet:
        """Return a task's test set, with its masks."""
        self._keep(task)
        bank = self.features_of(task, task.test)
        names = task.test.names
        masks, lacking = None, [False] * len(bank)
        if task.masks is not None:
            assert task.test.paths is not None
            # After the images: the mask of one that was left out as unreadable cannot be checked.
            masks = read_masks(
                [task.test.paths[i] for i in bank.indices],
                [task.masks[i] for i in bank.indices],
                self.transform,
            )  # (N, S, S)
            lacking = [task.masks[i] is None and task.test_labels[i] == 1 for i in bank.indices]
        return TestSet(
            bank,
            torch.from_numpy(task.test_labels[bank.indices]),
            names=[names[i] for i in bank.indices],
            kinds=[task.kinds[i] for i in bank.indices],
            masks=masks,
            regions=self._regions_of(task, bank),
            groups=task.groups,
            without_mask=torch.tensor(lacking),
            scoring=self.scoring,
        )

    def _regions_of(self, task: Task, bank: Features) -> list[Region] | None:
        """Return the defects of the test images, of data sets that say when one is found."""
        if task.masks is None or not task.saturations:
            return None
        masks = [task.masks[i] for i in bank.indices]
        return read_regions(masks, task.saturations, self.transform)

    def _held_out(self, task: Task, test: TestSet) -> Features | None:
        """Return the normal images that `--scale-on` names, for a method that wants some."""
        experiment = self.experiment
        if not find_method(experiment.method_name).scales_on_held_out:
            return None
        assert isinstance(experiment, StructuredExperiment)
        if experiment.scale_on == "test":
            return test.bank.subset((test.labels == 0).nonzero().flatten())
        return None if task.validation is None else self.features_of(task, task.validation)

    def _remarks_on_masks(self, task: Task, test: TestSet) -> list[str]:
        """Tell masks that mark nothing in their files from those that are lost in the resize."""
        if task.masks is None:
            return []
        masks = [task.masks[test.bank.indices[i]] for i in test.empty_masks]
        reading = self.transform.reading
        blank = [
            mask
            for mask in masks
            if mask is not None
            and not any(read_mask(file, reading).any() for file in mask_files(mask))
        ]
        if not blank:
            return []
        return [f"{len(blank)} of the empty masks mark no pixel in their files, as {blank[0]}."]

    def _remarks_on_bits(self, task: Task) -> list[str]:
        """Remark on 16-bit files whose values stay low: their highest bits say nothing."""
        paths = task.train.paths
        if paths is None or self.experiment.bit_depth < 16:
            return []
        some = [paths[i] for i in task.train_indices[:: -(-len(task.train_indices) // LOOKED_AT)]]
        largest = largest_of_16_bits(some)
        if largest is None or largest >= 1 << 15:
            return []
        bits = max(9, largest.bit_length())
        return [
            f"The 16-bit files of {len(some)} training images that were looked at hold no value "
            f"above {largest}, of which {largest >> 8} of 255 levels are left: --bit-depth {bits}."
        ]

    def _keep(self, task: Task) -> None:
        """Let go the features of images that are not a task's."""
        wanted = (task.train, task.validation, task.test)
        self._held = {s: f for s, f in self._held.items() if s in wanted}

    def _validation_of(self, task: Task, fitted: Features, train: Features) -> Validation:
        """Hold normals out and make anomalies of them: pasted defects, or turned images."""
        kept, held = hold_out(len(fitted))
        held_images = fitted.subset(held).indices
        if self.scoring.map_size is None:
            anomalies = _rows_at(self._turned_images(task, train), np.array(held_images))
            return validation_set(fitted, kept, held, anomalies, self.scoring)
        assert task.train.paths is not None
        originals = ImageSet("train", paths=tuple(task.train.paths[i] for i in held_images))
        pasted = SyntheticDataset(
            images_of(originals, self.transform), cutpaste, copies=num_copies(len(held_images))
        )
        anomalies = self._extract(pasted, task, "features of pasted defects")
        masks = pasted.masks(anomalies.indices)
        return validation_set(fitted, kept, held, anomalies, self.scoring, masks)

    def _turned_images(self, task: Task, train: Features) -> Features:
        """Return features of the images, rotated, that any task of the data set holds out.

        Tasks that were not asked for count too, so that a class alone reads the same batches of
        images, and gets the same bits, as among all.
        """
        if self._turned is None or self._turned[0] is not task.train:
            held: set[int] = set()
            for indices in task.peers:
                with contextlib.suppress(UsageError):  # too few; the task says so if it is run
                    normals = _rows_at(train, indices)
                    if self.experiment.calibration_share:
                        kept, _ = calibration_split(self.experiment, task, len(normals))
                        normals = normals.subset(kept)
                    held.update(normals.subset(hold_out(len(normals))[1]).indices)
            turned = SyntheticDataset(images_of(task.train, self.transform), rotate)
            features = self._extract(
                ImagesAt(turned, sorted(held)), task, "features of rotated images"
            )
            self._turned = task.train, features
        return self._turned[1]

    def _extract(self, images: Images, task: Task, what: str) -> Features:
        experiment, device = self.experiment, self.extractor.device
        loader = BatchLoader(
            in_windows(images, experiment),
            batch_size=experiment.extract_batch_size,
            workers=experiment.workers,
            skip_unreadable=experiment.skip_unreadable,
            for_gpu=device.type == "cuda",
        )
        # Images that tasks share are of no category.
        description = what if task.peers else f"{task.category}: {what}"
        features = extract_features(
            self.extractor,
            loader,
            cache=experiment.cache,
            description=description,
            folder=default_folder(),
        )
        features.boxes = boxes_of(images, features.indices)
        return features


def calibration_split(
    experiment: AnyExperiment, task: Task, num_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions of the normal images to fit on, and of those that set thresholds."""
    share, rate = experiment.calibration_share, experiment.false_alarm_rate
    return held_out_for_calibration(num_images, share, rate, what=task.category)


def _rows_at(features: Features, indices: np.ndarray) -> Features:
    """Return the features of the images at some positions of their data set."""
    return features.subset(np.isin(features.indices, indices).nonzero()[0])
