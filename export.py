"""Exports a head of a finished run, with its backbone, as one file that needs no part of the suite.

    python export.py RUN                         # RUN/export/<category>-seed<k>.onnx
    python export.py RUN --format torchscript    # RUN/export/<category>-seed<k>.pt
    python export.py RUN --category tile --seed 0 --out tile-seed0.onnx

In: RGB images (B, 3, S, S), uint8, any number B, resized as in training. Out: scores (B,), higher =
more anomalous, and for structured runs maps (B, S, S). Normalisation, backbone, head, upsampling
and blur are inside, in float32. The file is checked on images of the run's test set against the
suite's own scoring; where they differ nothing is written and the exit code is 2. FILE.json, beside
the file and inside of it, states the resize, the thresholds of a calibrated run, the differences
measured, and a program like this one, which scores an image (S = 224):

    import sys

    import cv2
    import numpy as np
    import onnxruntime
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(sys.argv[1]))
    if image.mode.startswith("I"):  # 16 bits: the highest eight of those in use
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    image = np.array(image)
    image = cv2.resize(image, (224, 224), interpolation=cv2.INTER_LINEAR)
    batch = np.ascontiguousarray(image.transpose(2, 0, 1))[None]  # (1, 3, 224, 224) uint8
    session = onnxruntime.InferenceSession("tile-seed0.onnx")
    scores, maps = session.run(None, {"images": batch})
    print(float(scores[0]))
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from configs.prediction import ExportOptions
from utils.cli import exits_cleanly
from utils.runs.files import atomic_path, write_text
from utils.runs.finished import choose_pair


@exits_cleanly(interrupted="interrupted; nothing was written")
def main(argv: Sequence[str] | None = None) -> Path:
    """Export, check, write, say how large the differences are, and return the file's path."""
    options = tyro.cli(ExportOptions, args=argv, prog="export.py", description=__doc__)

    from models.deployment.formats import require_onnx  # only now: they import torch
    from pipeline.exporting import export_head
    from pipeline.finished import load_run

    if options.format == "onnx":
        require_onnx()
    finished = load_run(options.run, device="cpu", weights=options.weights)
    category, seed = choose_pair(finished.run, options.category, options.seed)
    head = finished.run.head_path(category, seed, options.suffix)
    ending = "onnx" if options.format == "onnx" else "pt"
    path = options.out or options.run / "export" / f"{head.stem}.{ending}"
    made = export_head(options, finished, category, seed, path.name)
    with atomic_path(path) as temporary:
        made.exported.write(temporary, made.about)
    write_text(path.with_name(f"{path.name}.json"), json.dumps(made.about, indent=2) + "\n")
    sys.stdout.write(f"{summary(made.checked)}\n{path}\n")
    return path


def summary(checked: dict[str, Any]) -> str:
    """Say in words how well the file agrees."""
    parts = [
        f"{name} differ by at most {checked[name]['largest_difference']:.2g} "
        f"(range {checked[name]['range']:.3g})"
        for name in ("scores", "maps")
        if name in checked
    ]
    sizes = ", ".join(map(str, checked["batch_sizes"]))
    return f"{checked['images']} images in batches of {sizes}: {'; '.join(parts)}"


if __name__ == "__main__":
    main()
