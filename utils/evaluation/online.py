"""Learning from one image at a time: how good a detector is after n normal images."""

import csv
import io
from pathlib import Path

import torch
from matplotlib.figure import Figure

from models.detector import Detector, LearnsOnline
from utils.evaluation.test_set import TestSet
from utils.features.features import Features
from utils.features.tiled import of_windows
from utils.pictures.words import without_formulas
from utils.runs.files import atomic_path, write_text

COLUMNS = ("num_images", "image_auroc", "image_ap", "pixel_auroc", "aupro")


def checkpoints(num_images: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... up to `num_images`, which is the last."""
    steps = [m * 10**e for e in range(len(str(num_images))) for m in (1, 2, 5)]
    return [n for n in steps if n < num_images] + [num_images]


def online_curve(
    detector: Detector, train: Features, test: TestSet, *, generator: torch.Generator
) -> list[dict[str, float]]:
    """Feed normal images in random order and evaluate after 1, 2, 5, 10, ... of them.

    Args:
        detector: one that learns online.
        train: normal features.
        test: what to evaluate on.
        generator: draws the order of arrival.

    Returns:
        One row per checkpoint, with the keys of `COLUMNS`.
    """
    assert isinstance(detector, LearnsOnline)
    order = torch.randperm(len(train), generator=generator)
    detector.start(generator)
    rows, seen = [], 0
    for num_images in checkpoints(len(train)):
        arrived = of_windows(train.subset(order[seen:num_images]), test.scoring.tiles)
        for stages in arrived.stage_batches(1):
            detector.partial_fit(stages)
        seen = num_images
        detector.solve()
        values = test.measure(test.score(detector)).values
        rows.append({"num_images": num_images} | {name: values[name] for name in COLUMNS[1:]})
    return rows


def save_online_curve(path: Path, rows: list[dict[str, float]], *, title: str) -> None:
    """Write the curve as `path` (csv) and as a picture beside it (png)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())

    figure = Figure(figsize=(5.5, 3.6), layout="constrained", dpi=120)
    axes = figure.subplots()
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        values = [100 * row[name] for row in rows]
        if not any(value != value for value in values):
            axes.plot([r["num_images"] for r in rows], values, "o-", label=name.replace("_", " "))
    axes.set_xscale("log")
    axes.set_xlabel("normal images seen")
    axes.set_ylabel("percent (test set)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path.with_suffix(".png")) as temporary:
        without_formulas(figure).savefig(temporary, format="png")
