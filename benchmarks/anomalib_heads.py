"""Our PatchCore and PaDiM against anomalib's, on the same stored features.

    pip install -r requirements-anomalib.txt
    python -m benchmarks.anomalib_heads                                     # the embedded demo
    python -m benchmarks.anomalib_heads --data-root MY_IMAGES --category screws --ratio 0.01

Run it from the root of the checkout. Both get the same features of EfficientNet-Lite0's stages 2
and 3, so only the heads are timed: fit (coreset, Gaussians) and scoring without upsampling. Every
way runs in each repeat; the median counts. PaDiM's maps and PatchCore's, given the same memory, are
compared as well.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.images import loader_of, read_tasks
from datasets.samples import ImageSet
from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.methods.padim import Padim, PadimOptions
from models.methods.patchcore import PatchCore, PatchCoreOptions
from utils.device import keep_freed_memory
from utils.features.bank import FeatureBank


def main() -> None:
    """Time the heads and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder of categories; the demo without it")
    parser.add_argument("--category", default="brick")
    parser.add_argument("--ratio", type=float, default=0.1, help="share kept in the coreset")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    try:
        from anomalib.models.components import MultiVariateGaussian
        from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    except ImportError as error:
        raise SystemExit(f"error: {error}; pip install -r requirements-anomalib.txt") from None
    keep_freed_memory()
    (task,) = read_tasks(arguments.data_root, arguments.category)
    extractor = FrozenExtractor("tf_efficientnet_lite0", (2, 3))
    train, test = read(task.train, extractor), read(task.test, extractor)
    features = torch.cat(list(train.batches(32)))  # (N, C, H, W)
    queries = torch.cat(list(test.batches(32)))

    shape = FeatureShape(extractor.stage_channels)
    patchcore = PatchCore(shape, PatchCoreOptions(coreset_ratio=arguments.ratio))
    padim = Padim(shape, PadimOptions(dims=None))
    their_patchcore: Any = PatchcoreModel(["layer1"], "resnet18", False, 9).eval()
    their_padim: Any = MultiVariateGaussian()
    generator = AnomalyMapGenerator()

    def their_coreset() -> None:
        their_patchcore.embedding_store = [their_patchcore.reshape_embedding(features)]
        their_patchcore.subsample_embedding(arguments.ratio)

    def gaussians() -> list[Tensor]:
        return [their_padim.mean, their_padim.inv_covariance]

    def their_scores() -> Tensor:
        positions = their_patchcore.reshape_embedding(queries)
        distances, rows = their_patchcore.nearest_neighbors(positions, n_neighbors=1)
        shape = (len(queries), -1)
        their_patchcore.compute_anomaly_score(
            distances.reshape(shape), rows.reshape(shape), positions
        )
        return distances.reshape(len(queries), *queries.shape[2:])  # (B, H, W)

    def score(head: PatchCore | Padim) -> Tensor:
        return torch.cat([head.score(part)[0] for part in queries.split(32)])  # (B, H, W)

    with torch.inference_mode():
        ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            f"PatchCore, fit ({arguments.ratio:g})": (lambda: fit(patchcore, train), their_coreset),
            "PatchCore, scoring": (lambda: score(patchcore), their_scores),
            "PaDiM, fit": (lambda: fit(padim, train), lambda: their_padim.fit(features)),
            "PaDiM, scoring": (
                lambda: score(padim),
                lambda: generator.compute_distance(queries, gaussians()),
            ),
        }
        print(f"{len(train)} train and {len(test)} test images, {tuple(features.shape[1:])}\n")
        print("| head | anomalib / ours | over the repeats |\n| --- | ---: | --- |")
        for name, (ours, theirs) in ways.items():
            ratios = [seconds(theirs) / seconds(ours) for _ in range(arguments.repeats)]
            span = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"| {name} | {median(ratios):.2f} | {span} |")
        their_patchcore.memory_bank = patchcore.memory
        pairs = {
            "PatchCore, same memory": (score(patchcore), their_scores()),
            "PaDiM": (score(padim), generator.compute_distance(queries, gaussians())[:, 0]),
        }
        print("\n| maps | largest relative difference |\n| --- | ---: |")
        for name, (ours_map, theirs_map) in pairs.items():
            difference = ((ours_map - theirs_map).abs() / theirs_map).max()
            print(f"| {name} | {float(difference):.1e} |")


def read(images: ImageSet, extractor: FrozenExtractor) -> FeatureBank:
    """Extract the features of some images."""
    return FeatureBank.extract(extractor, loader_of(images))


def fit(head: PatchCore | Padim, bank: FeatureBank) -> None:
    """Fit a head with the seed 0."""
    head.fit(bank, generator=torch.Generator().manual_seed(0))


def seconds(way: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
