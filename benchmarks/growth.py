"""How the cost of a fit grows with the number of images, of channels, and the side of the grid.

    python -m benchmarks.growth
    python -m benchmarks.growth --methods noco_cf padim --repeats 3

Random features stand in for a backbone's, since only their number matters. Along each axis the
other two stay fixed; the exponent p of time ~ size^p is the slope of a straight line through the
logarithms (least squares), with the coefficient of determination beside it. A cost of a fixed part
and a growing one has a slope below that of the growing part: the ranges are chosen to show the end.
"""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
import torch

from models.detector import FeatureShape, FeatureSource
from models.method import find_method
from utils.device import keep_freed_memory, pick_device
from utils.features.bank import FeatureBank

METHODS = ("noco", "noco_cf", "simplenet", "patchcore", "padim", "mahalanobis")
AXES = {
    "images": (50, 100, 200, 400, 800),
    "channels": (32, 64, 128, 256, 512),
    "grid": (7, 14, 28, 56),
}
"""Axis -> its sizes; the grid's is its side, so that a cost per position has exponent 2."""
FIXED = {"images": 64, "channels": 64, "grid": 14}
"""What stays the same along the other axes."""


def main() -> None:
    """Time the fits and print the exponents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of them counts")
    arguments = parser.parse_args()
    keep_freed_memory()
    print("Time of a fit relative to the smallest size, and the exponent p of time ~ size^p.\n")
    print("| method | axis | sizes | relative time | p | R2 |")
    print("| --- | --- | --- | --- | ---: | ---: |")
    for method in arguments.methods:
        for axis, sizes in AXES.items():
            seconds = [_fastest(method, FIXED | {axis: size}, arguments.repeats) for size in sizes]
            exponent, determination = _slope(np.log(sizes), np.log(seconds))
            ratios = " ".join(f"{value / seconds[0]:.2g}" for value in seconds)
            words = [method, axis, " ".join(map(str, sizes)), ratios]
            print(f"| {' | '.join(words)} | {exponent:.2f} | {determination:.3f} |")


def _fastest(method: str, sizes: dict[str, int], repeats: int) -> float:
    """Return the seconds of the fastest of some fits."""
    device = pick_device("auto")
    channels = sizes["channels"]
    shape = (sizes["images"], sizes["grid"], sizes["grid"], channels)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().to(device)
    bank: FeatureSource = FeatureBank(
        [features],
        range(sizes["images"]),
        assemble=lambda maps: maps[0].float().contiguous(memory_format=torch.channels_last),
        device=device,
    )
    found = find_method(method)
    short: dict[str, Any] = {"epochs": 1} if hasattr(found.options, "epochs") else {}
    options = dataclasses.replace(found.options, **short)
    times = []
    for _ in range(repeats):
        head = found.detector_class()(FeatureShape((channels,)), options).to(device)
        start = time.perf_counter()
        head.fit(bank, generator=torch.Generator().manual_seed(0))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the slope of the least-squares line, and its coefficient of determination."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    return float(slope), float(1 - residual.var() / y.var())


if __name__ == "__main__":
    main()
