"""Pictures of an evaluated head: what it found, what it missed, and near-duplicate images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from datasets.reading.images import Reading, read_image
from datasets.reading.transforms import PairTransform
from datasets.samples import ImageSet
from models.detector import Detector, HasParts, Reconstructs
from pipeline.experiments import AnyExperiment, leaves_one_out
from pipeline.features import TaskData, transform_of
from pipeline.leaks import in_words, pairs_to_show
from utils.evaluation.monitor import Outcome
from utils.evaluation.scoring import part_maps, reconstructions
from utils.evaluation.test_set import TestSet
from utils.pictures.galleries import save_gallery
from utils.pictures.overlays import Shown, save_overlays
from utils.pictures.pairs import save_pairs


def draw(
    experiment: AnyExperiment, folder: Path, data: TaskData, detector: Detector, outcome: Outcome
) -> None:
    """Draw an outcome: sheets of maps, or a gallery where nothing is localised.

    Args:
        experiment: the settings.
        folder: for the pictures.
        data: of the task.
        detector: the head, in the state of the outcome.
        outcome: the one that is reported.
    """
    task, test = data.task, data.test
    transform: PairTransform = transform_of(experiment)
    if data.leaks:
        draw_leaks(folder / "twins.png", data, transform, count=experiment.overlays)
    if experiment.map_size is None:
        is_anomaly = leaves_one_out(experiment)
        save_gallery(
            folder / "gallery.png",
            images=lambda i: stored_image(task.test, test.bank.indices[i], transform.reading),
            scores=outcome.scores.images.numpy(),
            labels=test.labels.numpy(),
            class_names_of_images=test.kinds,
            title=f"{experiment.dataset}, {'anomalous' if is_anomaly else 'normal'}: "
            f"{task.category}",
            auroc=outcome.measured.values["image_auroc"],
            count=experiment.overlays,
        )
        return
    part_names, parts = parts_of(detector, test)
    shown = Shown(
        images=lambda i: transform.image(
            stored_image(task.test, test.bank.indices[i], transform.reading)
        ),
        masks=test.masks,
        anomaly_maps=outcome.scores.maps.cpu(),
        scores=outcome.scores.images.numpy(),
        labels=test.labels.numpy(),
        defects=test.kinds,
        names=[Path(name).name for name in test.names],
        threshold=outcome.measured.pixel_f1_threshold,
        part_names=part_names,
        parts=parts,
        reconstruction=reconstruction_of(detector, test),
    )
    save_overlays(folder, shown, num_worst=experiment.overlays, title=task.category)


def parts_of(
    detector: Detector, test: TestSet
) -> tuple[tuple[str, ...], Callable[[int], Sequence[np.ndarray]]]:
    """Return the names of the maps that a detector's is the mean of, and what gives an image's."""
    if not isinstance(detector, HasParts) or len(detector.part_names) < 2:
        return (), lambda _: ()
    of_parts: HasParts = detector

    def parts(place: int) -> Sequence[np.ndarray]:
        maps = part_maps(of_parts, test.bank.subset([place]), test.scoring)  # (L, 1, S, S)
        return list(maps[:, 0].numpy())

    return of_parts.part_names, parts


def reconstruction_of(detector: Detector, test: TestSet) -> Callable[[int], np.ndarray] | None:
    """Return what gives a detector's reconstruction of an image; None where it makes none."""
    if not isinstance(detector, Reconstructs):
        return None
    network: Reconstructs = detector

    def reconstruction(place: int) -> np.ndarray:
        return reconstructions(network, test.bank.subset([place]), test.scoring)[0].numpy()

    return reconstruction


def draw_leaks(path: Path, data: TaskData, transform: PairTransform, *, count: int) -> None:
    """Draw some near-duplicates of each kind, those looked at on the left."""
    pairs = []
    for leak, twin in pairs_to_show(data.leaks, count):
        sides = ((leak.images, twin.place), (leak.among, twin.other))
        left, right = (
            transform.image(stored_image(s.images, s.features.indices[row], transform.reading))
            for s, row in sides
        )
        names = " | ".join(Path(side.name(row)).name for side, row in sides)
        pairs.append((left, right, f"{names}  {twin.correlation:.3f}"))
    save_pairs(path, pairs, title=f"{data.task.category}: {in_words(data.leaks)}")


def stored_image(images: ImageSet, index: int, reading: Reading) -> np.ndarray:
    """Return an image as it is stored, (H, W, 3) uint8."""
    if images.paths is not None:
        return read_image(images.paths[index], reading)
    assert images.images is not None
    image = images.images[index]
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)  # (H, W, 3)
