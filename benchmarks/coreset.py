"""Times the lazy coreset selection against loops that pass over all features for each choice.

    python -m benchmarks.coreset                                          # the embedded demo
    python -m benchmarks.coreset --data-root ROOT --category screws       # a category of your own

Run it from the root of the checkout. It extracts EfficientNet-Lite0 features (28 x 28 positions at
224 pixels, 152 channels), projects them to 128 dimensions as PatchCore does, and times every way
side by side. Ours runs in full. A loop's steps all cost the same, so it is timed for a few choices
and projected; that these choices are the same is checked.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor

from benchmarks.images import loader_of, read_tasks
from models.backbone.extractor import FrozenExtractor
from models.features.coreset import draw_projection, greedy_k_centre, read_projected
from models.features.nearest import direct_distances
from utils.device import keep_freed_memory, pick_device
from utils.features.bank import FeatureBank

DIM = 128
NUM_STARTS = 10
SEED = 0
Loop = Callable[[Tensor, Tensor, int], Iterator[Tensor]]
"""Points (N, C), distances (N,) to begin with and number of choices; yields the choices."""


def one_kernel(points: Tensor, distances: Tensor, count: int) -> Iterator[Tensor]:
    """Computes all distances by subtraction in one kernel: the plain loop ours is exact to."""
    for _ in range(count):
        farthest = distances.argmax()
        yield farthest
        new = direct_distances(points, points[farthest].unsqueeze(0)).squeeze(1)  # (N,)
        distances = torch.minimum(distances, new)


def norm_of_differences(points: Tensor, distances: Tensor, count: int) -> Iterator[Tensor]:
    """Writes the differences out, then their norms, as anomalib 2 does."""
    for _ in range(count):
        farthest = distances.argmax()
        yield farthest
        new = torch.linalg.norm(points - points[farthest], dim=1)  # (N,)
        distances = torch.minimum(distances, new)


def expanded_squares(points: Tensor, distances: Tensor, count: int) -> Iterator[Tensor]:
    """Expands the square, all norms anew for each choice, as PatchCore's released code does."""
    for _ in range(count):
        farthest = distances.argmax()
        yield farthest
        chosen = points[farthest].unsqueeze(0)  # (1, C)
        squares = torch.bmm(points.unsqueeze(1), points.unsqueeze(2)).flatten()  # (N,)
        product = (points @ chosen.T).squeeze(1)  # (N,)
        new = (-2 * product + squares + chosen.square().sum()).clamp(min=0).sqrt()
        distances = torch.stack([distances, new], dim=1).amin(dim=1)


LOOPS: dict[str, Loop] = {
    "plain loop, one kernel per choice": one_kernel,
    "norms of differences (as anomalib 2)": norm_of_differences,
    "expanded squares (as released)": expanded_squares,
}


def read_points(root: Path | None, categories: Sequence[str], device: torch.device) -> Tensor:
    """Returns the projected training features (N, 128) of some categories."""
    extractor = FrozenExtractor("tf_efficientnet_lite0", (2, 3)).to(device)
    projection = draw_projection(extractor.channels, DIM, torch.Generator().manual_seed(SEED))
    points = []
    for task in read_tasks(root, *categories):
        bank = FeatureBank.extract(extractor, loader_of(task.train, workers=0))
        points.append(read_projected(bank, projection))
    return torch.cat(points)


def seconds_of(way: Callable[[], Tensor], device: torch.device) -> tuple[float, list[int]]:
    """Returns the time a selection takes, its last kernel included, and the choices."""
    start = time.perf_counter()
    chosen = way().tolist()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, chosen


def compare(points: Tensor, ratio: float, repeats: int, steps: int) -> list[str]:
    """Times all ways at one ratio; returns the rows of the table.

    Raises:
        AssertionError: the plain loop chooses otherwise than we.
    """
    count = int(ratio * len(points))
    steps = min(steps, count)
    starts = torch.randperm(len(points), generator=torch.Generator().manual_seed(SEED))
    distances = direct_distances(points, points[starts[:NUM_STARTS]]).mean(dim=1)
    ours: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in LOOPS}
    for _ in range(repeats):
        generator = torch.Generator().manual_seed(SEED)
        seconds, chosen = seconds_of(
            lambda: greedy_k_centre(points, count, generator=generator),  # noqa: B023 called here
            points.device,
        )
        ours.append(seconds)
        for name, loop in LOOPS.items():
            taken, first = seconds_of(
                lambda: torch.stack(list(loop(points, distances, steps))),  # noqa: B023
                points.device,
            )
            if loop is one_kernel:
                assert first == chosen[:steps]
            ratios[name].append(taken / steps * count / seconds)
    rows = [f"| {ratio:.0%} | **lazy (ours)** | 1 | | {median(ours):.3g} s |"]
    for name, values in ratios.items():
        spread = f"{min(values):.3g} to {max(values):.3g}"
        projected = median(values) * median(ours)
        rows.append(
            f"| {ratio:.0%} | {name} | {median(values):.3g} | {spread} | {projected:.3g} s |"
        )
    return rows


def main(
    data_root: Path | None = None,
    category: str | None = None,
    ratios: tuple[float, ...] = (0.01, 0.1),
    repeats: int = 3,
    steps: int = 30,
    device: str = "auto",
) -> None:
    """Extracts, times and prints.

    Args:
        data_root: Folder above the category, in the layout of MVTec AD; the demo without it.
        category: Name of its folder.
        ratios: Shares of the features to choose.
        repeats: How often each way is timed.
        steps: Choices that a loop is timed for.
        device: As the training scripts take it.
    """
    if (data_root is None) != (category is None):
        raise SystemExit("--data-root and --category go together")
    keep_freed_memory()
    place = pick_device(device)
    points = read_points(data_root, (category,) if category else (), place)
    print(f"{len(points):,} features of {points.shape[1]} dimensions\n")
    print("| ratio | selection | time / ours | over the repeats | median or projection |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for ratio in ratios:
        print("\n".join(compare(points, ratio, repeats, steps)), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
