"""Times the exact metrics against scikit-learn, torchmetrics and a loop over 200 thresholds.

    python -m benchmarks.metrics

Run it from the root of the checkout. It draws 100 maps of 224 x 224 with irregular defects, times
every way side by side on one thread (each repeat runs all of them, the median counts), and prints
the Markdown tables of README.md: times and values. About two minutes.
"""

import importlib.util
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.integrate import trapezoid
from scipy.ndimage import gaussian_filter
from skimage.measure import label, regionprops
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from utils.evaluation.smoothing import image_scores, upsample_and_blur
from utils.metrics.evaluate import evaluate
from utils.metrics.metrics import FPR_LIMIT

NUM_MAPS = 100
NUM_NORMAL = 30
GRID = 56
SIZE = 224
SIGMA = 4.0
NUM_THRESHOLDS = 200


def draw_maps() -> tuple[Tensor, Tensor]:
    """Returns grids of scores (N, 56, 56), float32, and masks (N, 224, 224), bool.

    The defects are level sets of smooth noise, one to a few per anomalous image and of very
    different sizes. Defects differ in strength, and a fifth of the images have a weak one.
    """
    random = np.random.default_rng(0)
    masks = np.zeros((NUM_MAPS, SIZE, SIZE), dtype=bool)
    for mask in masks[NUM_NORMAL:]:
        field = gaussian_filter(random.normal(size=(SIZE, SIZE)), random.uniform(6, 20))
        mask[:] = field > np.quantile(field, random.uniform(0.95, 0.995))
    strength = np.where(random.random(NUM_MAPS) < 0.2, 0.3, random.uniform(1, 4, NUM_MAPS))
    share = F.adaptive_avg_pool2d(torch.from_numpy(masks).float(), GRID)  # (N, 56, 56)
    noise = torch.from_numpy(random.normal(size=share.shape)).float()
    return noise + share * torch.from_numpy(strength).float()[:, None, None], torch.from_numpy(
        masks
    )


def threshold_loop_aupro(maps: np.ndarray, masks: np.ndarray, *, label_once: bool) -> float:
    """AUPRO as it is widely computed: 200 evenly spaced thresholds, each region measured at each.

    Points above the limit are dropped and the area is divided by the largest rate that is kept.
    The usual code finds the regions again at each threshold; `label_once` spares it that.
    """
    regions = [regionprops(label(mask)) for mask in masks] if label_once else None
    normal = ~masks
    rates, overlaps = [], []
    for threshold in np.linspace(maps.min(), maps.max(), NUM_THRESHOLDS):
        found = maps >= threshold
        overlap = []
        for index, mask in enumerate(masks):
            for region in regions[index] if regions else regionprops(label(mask)):
                rows, columns = region.coords.T
                overlap.append(found[index, rows, columns].mean())
        overlaps.append(np.mean(overlap))
        rates.append((found & normal).sum() / normal.sum())
    rate, mean_overlap = np.array(rates[::-1]), np.array(overlaps[::-1])
    kept = rate <= FPR_LIMIT
    return float(trapezoid(mean_overlap[kept], rate[kept]) / rate[kept].max())


def sklearn_f1_max(labels: np.ndarray, scores: np.ndarray) -> float:
    """Returns the best F1 over scikit-learn's precision-recall curve."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-300)).max())


def torchmetrics_auroc(maps: Tensor, masks: Tensor) -> Callable[[], object]:
    """Returns torchmetrics' exact AUROC of pixels; an extra that anomalib brings."""
    from torchmetrics.functional.classification import binary_auroc

    # It squashes scores outside [0, 1] by a sigmoid, which ties the large ones: they are scaled.
    scaled = (maps - maps.min()) / (maps.max() - maps.min())
    return lambda: binary_auroc(scaled.flatten(), masks.flatten().long())


def interpolate_then_filter(grids: Tensor) -> Tensor:
    """Upsamples and blurs (N, 56, 56) as the published pipelines do, SciPy's filter map by map."""
    upsampled = F.interpolate(grids[:, None], size=SIZE, mode="bilinear")[:, 0]  # (N, 224, 224)
    return torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), SIGMA)) for m in upsampled])


def time_side_by_side(
    ways: dict[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Runs every way in each repeat, short ones for half a second, so that noise averages out.

    Returns:
        The median seconds of each way, and the range over the repeats of its time divided by that
        of the first way.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start, runs = time.perf_counter(), 0
            while time.perf_counter() - start < 0.5:
                way()
                runs += 1
            seconds[name].append((time.perf_counter() - start) / runs)
    first = next(iter(seconds.values()))
    spread = {}
    for name, taken in seconds.items():
        ratios = sorted(t / t0 for t, t0 in zip(taken, first, strict=True))
        spread[name] = f"{ratios[0]:.3g} to {ratios[-1]:.3g}"
    return {name: median(taken) for name, taken in seconds.items()}, spread


def print_times(medians: dict[str, float], spread: dict[str, str]) -> None:
    """Prints a Markdown table of the times as ratios to the first one."""
    ours = next(iter(medians.values()))
    print("| computed | time / ours | over the repeats | median |\n| --- | ---: | ---: | ---: |")
    for name, taken in medians.items():
        print(f"| {name} | {taken / ours:.3g} | {spread[name]} | {taken:.3g} s |")
    print()


def print_agreement(maps: Tensor, masks: Tensor, exact: dict[str, float]) -> None:
    """Prints the exact values beside the others', also for the same ranking on another scale."""
    scores, pixels = maps.numpy().ravel(), masks.numpy().ravel()
    # Strictly increasing, so the ranking and every exact metric stay; only the tail gets longer.
    stretched = maps.double().exp()
    exact_stretched = evaluate(
        image_scores(stretched), masks.flatten(1).any(1), stretched, masks
    ).values
    loop = threshold_loop_aupro(maps.numpy(), masks.numpy(), label_once=True)
    loop_stretched = threshold_loop_aupro(stretched.numpy(), masks.numpy(), label_once=True)
    rows = [
        ("pixel AUROC", exact["pixel_auroc"], "scikit-learn", roc_auc_score(pixels, scores)),
        ("pixel AP", exact["pixel_ap"], "scikit-learn", average_precision_score(pixels, scores)),
        ("pixel F1-max", exact["pixel_f1_max"], "scikit-learn", sklearn_f1_max(pixels, scores)),
        ("AUPRO", exact["aupro"], "200 thresholds", loop),
        ("AUPRO of exp(scores)", exact_stretched["aupro"], "200 thresholds", loop_stretched),
    ]
    print("| metric | exact | by | value | difference |\n| --- | ---: | --- | ---: | ---: |")
    for name, ours, other_name, other in rows:
        print(f"| {name} | {ours:.6f} | {other_name} | {other:.6f} | {other - ours:+.1e} |")


def main(repeats: int = 3) -> None:
    """Times, compares and prints.

    Args:
        repeats: How often each way is timed.
    """
    torch.set_num_threads(1)  # the others use one thread whatever is there
    grids, masks = draw_maps()
    maps = upsample_and_blur(grids, SIZE, SIGMA)
    labels = masks.flatten(1).any(1)  # (N,)
    scores, pixels = maps.numpy().ravel(), masks.numpy().ravel()
    maps_array, masks_array = maps.numpy(), masks.numpy()
    num_regions = sum(int(label(mask).max()) for mask in masks_array)
    print(f"{NUM_MAPS} maps, {num_regions} regions, {masks.float().mean():.2%} anomalous pixels\n")

    ways: dict[str, Callable[[], object]] = {
        "**ours: all seven metrics**": lambda: evaluate(image_scores(maps), labels, maps, masks),
        "scikit-learn: pixel AUROC alone": lambda: roc_auc_score(pixels, scores),
        "scikit-learn: pixel AUROC, AP, F1-max": lambda: (
            roc_auc_score(pixels, scores),
            average_precision_score(pixels, scores),
            sklearn_f1_max(pixels, scores),
        ),
        "200-threshold loop: AUPRO alone": lambda: threshold_loop_aupro(
            maps_array, masks_array, label_once=False
        ),
        "the same, regions found only once": lambda: threshold_loop_aupro(
            maps_array, masks_array, label_once=True
        ),
    }
    if importlib.util.find_spec("torchmetrics") is not None:
        ways["torchmetrics: pixel AUROC alone"] = torchmetrics_auroc(maps, masks)
    print_times(*time_side_by_side(ways, repeats))
    smoothing: dict[str, Callable[[], object]] = {
        "**ours: two products**": lambda: upsample_and_blur(grids, SIZE, SIGMA),
        "`F.interpolate`, then `gaussian_filter`": lambda: interpolate_then_filter(grids),
    }
    print_times(*time_side_by_side(smoothing, repeats))
    print_agreement(maps, masks, evaluate(image_scores(maps), labels, maps, masks).values)


if __name__ == "__main__":
    tyro.cli(main)
