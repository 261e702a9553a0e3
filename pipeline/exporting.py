"""A head with its backbone as one network in another format, checked against our scoring."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.prediction import ExportOptions
from datasets.reading.finding import find_images
from datasets.reading.loading import ArrayDataset, ImageDataset, images_of
from datasets.reading.tiles import cut
from datasets.samples import DataError
from models.backbone.extractor import FrozenExtractor
from models.backbone.raw_images import RawImages
from models.deployment.formats import (
    Exported,
    differences,
    example_program,
    to_onnx,
    to_torchscript,
)
from models.deployment.network import Deployed
from models.detector import Detector
from pipeline.experiments import read_tasks
from pipeline.finished import FinishedRun
from utils.errors import UsageError
from utils.evaluation.calibration import calibration_file, load_calibration
from utils.evaluation.smoothing import blending_matrix, smoothing_matrix

CHECKED = 16
"""Test images of the run that the file is checked on, evenly spread over the test set."""
BATCH_SIZES = (1, 3, 8)
CHECKED_IN_WINDOWS = 2
"""Such images of a run that cuts images: each is as many as it has windows."""
MAX_WINDOWS = 64
"""Of a batch that is checked, as far as one image has no more: a graph holds all at once."""
TOLERANCE = 1e-3
"""Largest difference accepted: of scores as a share of the range of the run's test scores, of maps
as a share of the range of theirs; or of the largest of them, where that is more."""
RATES = (0.1, 0.05, 0.01, 0.001)
"""False-alarm rates whose thresholds are stated, as far as the calibration can promise them."""


@dataclass(frozen=True)
class ExportedHead:
    """A head in its new format, not yet a file.

    Attributes:
        exported: what is written.
        about: what it is, goes in and comes out, decides by, and how it was checked; JSON values.
        checked: of `about`.
    """

    exported: Exported
    about: dict[str, Any]
    checked: dict[str, Any]


def export_head(
    options: ExportOptions, finished: FinishedRun, category: str, seed: int, file: str
) -> ExportedHead:
    """Turn a head with its backbone into another format, and check that on images.

    Args:
        options: the format, which of a pair's heads, and perhaps images.
        finished: the run, on the CPU.
        category: a finished category.
        seed: a finished seed.
        file: name of the file to come.

    Raises:
        DataError: images cannot be read.
        ModelError: the method cannot be exported.
        UsageError: a package is missing, or what came out scores differently.
    """
    if finished.transform.pads:
        raise UsageError(
            "--resize bilinear_padded: a file would not know which part of an image is margin; "
            "train with another --resize to export"
        )
    detector = finished.detector(category, seed, options.suffix)
    network = build_network(finished, detector)
    # The head that is best by pixel AUROC has no image scores of its own.
    of_scores = "" if options.head == "pixel" else options.suffix
    recorded = finished.run.load_scores(category, seed, of_scores)
    images, rows = images_to_check(options, finished, category, recorded["path"].tolist())
    expected = expected_outputs(finished, detector, images)
    example = torch.stack([images[0], images[-1]])  # (2, 3, S, S)
    if options.format == "onnx":
        exported = to_onnx(network, example, network.outputs, options.opset)
    else:
        exported = to_torchscript(network, example)
    checked = check(exported, images, expected, recorded["score"], batch_sizes(finished))
    if rows is not None and options.head != "pixel":
        difference = np.abs(exported.run(images)[0].numpy() - recorded["score"][rows]).max()
        checked["scores"]["largest_difference_to_scores_in_run_folder"] = float(difference)
    about = {
        **{"file": file, "format": options.format},
        **{"category": category, "seed": seed, "head": options.head},
        **description(finished, network),
        "decision": decision(finished, category, seed, options.suffix),
        **{"checked": checked, "versions": exported.versions},
        "example": program_for(finished, network, file, options.format),
    }
    return ExportedHead(exported, about, checked)


def build_network(finished: FinishedRun, detector: Detector) -> Deployed:
    """Return backbone and head as one network; from here on the run's own backbone is float32."""
    extractor, experiment = finished.extractor, finished.experiment
    frozen = extractor.features if isinstance(extractor, RawImages) else extractor
    if isinstance(frozen, FrozenExtractor) and frozen.precision != "fp32":
        frozen.precision = "fp32"
        sys.stderr.write(
            f"the run's backbone computed in {experiment.precision}; the file computes in float32\n"
        )
    scoring, tiling = finished.scoring, experiment.tiling
    if scoring.map_size is None:
        return Deployed(extractor, detector, image_size=experiment.input_size, smoothing=None)
    size, sigma = scoring.map_size, scoring.blur_sigma
    if tiling is None:
        smoothing = functools.partial(smoothing_matrix, size=size, sigma=sigma)
        return Deployed(extractor, detector, image_size=size, smoothing=smoothing)
    sigma = 0.0 if detector.final_maps else sigma

    def blending(grid: int) -> Tensor:
        return blending_matrix(grid // tiling.per_side, tiling, sigma)

    return Deployed(
        extractor, detector, image_size=size, smoothing=blending, windows=tiling.windows
    )


def images_to_check(
    options: ExportOptions, finished: FinishedRun, category: str, names: Sequence[str]
) -> tuple[Tensor, np.ndarray | None]:
    """Return images (N, 3, S, S), some of the run's test images unless others are given.

    Args:
        options: may give others.
        finished: the run.
        category: a finished category.
        names: of its test images, as recorded.

    Returns:
        The images, at least as many as the largest batch, and the positions of their names (N,);
        None for given images.

    Raises:
        DataError: they cannot be read.
    """
    if options.images:
        given = find_images(options.images)
        chosen = [given[i] for i in evenly_spread(len(given), finished)]
        dataset = ImageDataset(chosen, finished.transform)
        return read_all(dataset, range(len(chosen))), None
    rows = evenly_spread(len(names), finished)
    try:
        return read_all(*test_images(finished, category, [names[i] for i in rows])), rows
    except DataError as error:
        raise DataError(
            f"the run's test images cannot be read ({error}): pass others, --images FOLDER"
        ) from error


def test_images(
    finished: FinishedRun, category: str, names: Sequence[str]
) -> tuple[ImageDataset | ArrayDataset, Sequence[int]]:
    """Return a data set that has the named test images, and their positions in it."""
    paths = [finished.run.located(Path(name)) for name in names]
    if finished.experiment.map_size is not None or paths[0].is_file():
        return ImageDataset(paths, finished.transform), range(len(names))
    (task,) = read_tasks(finished.experiment, [category])
    places = {name: place for place, name in enumerate(task.test.names)}
    if unknown := set(names) - set(places):
        raise DataError(f"{finished.experiment.dataset} has no test image {sorted(unknown)[0]}")
    return images_of(task.test, finished.transform), [places[name] for name in names]


def evenly_spread(count: int, finished: FinishedRun) -> np.ndarray:
    """Return some of `count` positions to check; repeated where they are less than a batch."""
    wanted = CHECKED if finished.experiment.tiling is None else CHECKED_IN_WINDOWS
    chosen = np.unique(np.linspace(0, count - 1, wanted).round().astype(int))
    return np.resize(chosen, max(len(chosen), *batch_sizes(finished)))


def batch_sizes(finished: FinishedRun) -> tuple[int, ...]:
    """Return the sizes of batches that an exported head is checked with."""
    tiles = finished.scoring.tiles
    return tuple(size for size in BATCH_SIZES if size * tiles <= MAX_WINDOWS) or (1,)


def read_all(dataset: ImageDataset | ArrayDataset, positions: Sequence[int]) -> Tensor:
    """Return images (N, 3, S, S) uint8."""
    images = [dataset[place][1] for place in positions]
    for image in images:
        if isinstance(image, str):
            raise DataError(image)
    return torch.stack([image for image in images if isinstance(image, Tensor)])


def expected_outputs(
    finished: FinishedRun, detector: Detector, images: Tensor
) -> dict[str, Tensor]:
    """Return what the suite's scoring gives: "scores" (N,), and "maps" (N, S, S) if it has any."""
    tiling = finished.experiment.tiling
    given = images if tiling is None else cut(images, tiling)
    batches = [finished.score(detector, batch) for batch in given.split(max(batch_sizes(finished)))]
    expected = {"scores": torch.cat([scores.images for scores in batches])}  # (N,)
    if finished.scoring.map_size is not None:
        expected["maps"] = torch.cat([scores.maps for scores in batches])  # (N, S, S)
    return expected


def check(
    exported: Exported,
    images: Tensor,
    expected: dict[str, Tensor],
    run_scores: np.ndarray,
    sizes: Sequence[int],
) -> dict[str, Any]:
    """Compare what is exported with the suite's scoring and return what was found.

    Args:
        exported: not yet written.
        images: (N, 3, S, S).
        expected: of `expected_outputs`.
        run_scores: of all test images of the run; their range is the scale of scores.
        sizes: of batches; each scores all images.

    Raises:
        UsageError: a difference exceeds `TOLERANCE`.
    """
    ranges = {"scores": float(np.ptp(run_scores))}
    if "maps" in expected:
        ranges["maps"] = float(expected["maps"].max() - expected["maps"].min())
    # Scores that are all equal, as of one image, have no range.
    scales = {name: max(r, float(expected[name].abs().max())) for name, r in ranges.items()}
    largest = differences(exported, images, expected, sizes)
    found: dict[str, Any] = {
        "images": len(images.flatten(1).unique(dim=0)),
        "batch_sizes": list(sizes),
        "tolerance": TOLERANCE,
    }
    for name, difference in largest.items():
        found[name] = {
            "largest_difference": difference,
            "range": ranges[name],
            "share_of_range": difference / ranges[name] if ranges[name] else None,
        }
        if not difference <= TOLERANCE * scales[name]:
            raise UsageError(
                f"nothing was written: {name} differ from the suite's by up to {difference:.3g}, "
                f"more than {TOLERANCE:g} of {scales[name]:.3g}, their range or size; please "
                "report this with the run's config.json"
            )
    return found


def description(finished: FinishedRun, network: Deployed) -> dict[str, Any]:
    """Return how the head was made, and what goes in and comes out."""
    experiment, transform = finished.experiment, finished.transform
    size = transform.output_size
    outputs = {"scores": "(B,) float32, higher = more anomalous"}
    if "maps" in network.outputs:
        outputs["maps"] = f"(B, {size}, {size}) float32, in pixels of the input"
    return {
        **{"method": experiment.method_name, "dataset": experiment.dataset},
        **{"select": experiment.select, "backbone": experiment.backbone},
        **{"layers": list(experiment.layers), "precision": "fp32"},
        "precision_of_run": experiment.precision,
        "blur": {"sigma": finished.scoring.blur_sigma, "precision": "fp32"},
        "input": {
            "images": f"(B, 3, {size}, {size}) uint8, RGB; mean and deviation are applied inside",
            **{"resize": transform.resize, "image_size": transform.image_size},
            "crop_size": transform.crop_size,
        },
        "output": outputs,
    }


def decision(finished: FinishedRun, category: str, seed: int, suffix: str) -> dict[str, Any] | None:
    """Return the thresholds of a calibrated head by false-alarm rate; None for others."""
    calibration = load_calibration(
        calibration_file(finished.run.folder, category, seed, suffix),
        head=finished.run.head_path(category, seed, suffix),
    )
    if calibration is None:
        return None
    promised = [rate for rate in RATES if rate >= calibration.smallest_rate]
    return {
        "rule": "anomalous where score > threshold",
        "thresholds": {f"{rate:g}": calibration.threshold(rate) for rate in promised},
        "calibration_images": len(calibration.scores),
    }


def program_for(finished: FinishedRun, network: Deployed, file: str, file_format: str) -> str:
    """Return a program that scores an image with the file, resized as this run's images were."""
    return example_program(
        file,
        file_format,
        network.outputs,
        image_size=finished.transform.image_size,
        crop_size=finished.transform.crop_size,
        resize=finished.transform.resize,
        bit_depth=finished.transform.reading.bit_depth,
    )
