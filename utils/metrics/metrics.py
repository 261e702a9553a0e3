"""The metrics: one entry each in `METRICS`, a function of the sorted curve.

Each is a sum over the distinct anomalous scores: there is no threshold grid, ties are one
threshold, and scores are never squashed, normalised or rounded on the way. A metric that is added
here is measured, recorded, shown in tables and compared by evaluate.py; nothing else names all.
"""

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from utils.metrics.curve import Curve

Ranked = Literal["images", "logical", "structural", "kinds", "pixels", "regions"]
"""What is ranked: all images; the normal ones with the logical or with the structural anomalies,
or these two one after the other; pixels, each weighing by its connected region; or by the defect it
belongs to, up to the defect's saturation. The last, and the kinds, only some data sets have."""
OF_PIXELS = ("pixels", "regions")
# The limit of Bergmann et al., "Uninformed Students" (CVPR 2020), and of MVTec's evaluation code.
FPR_LIMIT = 0.3


@dataclass(frozen=True)
class Metric:
    """One number of a category.

    Attributes:
        name: in results.csv and metrics.jsonl.
        heading: in tables.
        of: what is ranked.
        value: its value, in [0, 1], for curves on which both classes occur: of "kinds" two, else
            one.
        in_table: stands in a run's table; all are in results.csv.
    """

    name: str
    heading: str
    of: Ranked
    value: Callable[..., float]
    in_table: bool = True


def auroc(curve: Curve) -> float:
    """Return the Mann-Whitney statistic, ties counting half."""
    # Twice the number of (anomalous, normal) pairs in the right order, ties half: int64, exact.
    right = 2 * curve.num_normal - curve.false_positives - curve.normal_above
    return int((curve.found * right).sum()) / (2 * curve.num_normal * curve.num_anomalous)


def average_precision(curve: Curve) -> float:
    """Return the sum of precision times the step in recall, without interpolation."""
    tp, fp = curve.true_positives, curve.false_positives
    return float((tp / (tp + fp) * curve.found).sum() / curve.num_anomalous)


def f1_max(curve: Curve) -> float:
    """Return the largest F1 of calling anomalous every score at or above a threshold."""
    return float(curve.f1.max())


def f1_threshold(curve: Curve) -> float:
    """Return the highest threshold at which `f1_max` is reached."""
    return float(curve.thresholds[curve.f1.argmax()])


def pro_area(curve: Curve, fpr_limit: float = FPR_LIMIT) -> float:
    """Return the area under the per-region overlap curve up to a false positive rate.

    Bergmann et al., "Uninformed Students" (CVPR 2020): the overlap is the part of a defect region
    that is found, averaged over the 8-connected regions of all masks, so a small defect weighs as
    much as a large one; the rate is over the normal pixels of all images. The curve is linear
    between successive distinct scores, and also at the limit; its area is divided by the limit.

    From one threshold to the next the curve first runs flat (normal pixels scored in between), then
    straight to the next point (normal pixels that tie with anomalous ones; vertical without any).

    Args:
        curve: of pixels, with region weights; those of `saturated_weights` make it sPRO.
        fpr_limit: upper end of the integration, in (0, 1].
    """
    assert curve.region_weights is not None
    overlap = np.cumsum(curve.region_weights[curve.order])[curve.true_positives - 1]  # (K,)
    overlap /= overlap[-1]  # the sum is the number of regions, up to rounding
    before = np.append(0.0, overlap[:-1])
    limit = fpr_limit * curve.num_normal
    fp_before = np.append(0, curve.false_positives[:-1])
    flat = before * (np.minimum(curve.normal_above, limit) - np.minimum(fp_before, limit))
    tied = curve.false_positives - curve.normal_above
    tied_within = np.clip(limit - curve.normal_above, 0, tied)
    mean_overlap = before + (overlap - before) * tied_within / np.maximum(tied, 1) / 2
    all_found = limit - min(curve.false_positives[-1], limit)
    return float((flat.sum() + (tied_within * mean_overlap).sum() + all_found) / limit)


def mean_auroc(*curves: Curve) -> float:
    """Return the mean of the AUROC of each curve."""
    return statistics.fmean(map(auroc, curves))


METRICS = (
    Metric("image_auroc", "image AUROC", "images", auroc),
    Metric("image_ap", "image AP", "images", average_precision),
    Metric("image_f1_max", "image F1-max", "images", f1_max),
    Metric("pixel_auroc", "pixel AUROC", "pixels", auroc),
    Metric("pixel_ap", "pixel AP", "pixels", average_precision),
    Metric("pixel_f1_max", "pixel F1-max", "pixels", f1_max, in_table=False),
    Metric("aupro", "AUPRO", "pixels", pro_area),
    Metric("image_auroc_logical", "logical AUROC", "logical", auroc),
    Metric("image_auroc_structural", "structural AUROC", "structural", auroc),
    Metric("image_auroc_mean", "mean of both", "kinds", mean_auroc),
    # MVTec LOCO: a defect's overlap is the part of its saturation area that is found.
    Metric("spro", "sPRO 0.05", "regions", lambda curve: pro_area(curve, 0.05)),
    Metric(
        "spro_0.01", "sPRO 0.01", "regions", lambda curve: pro_area(curve, 0.01), in_table=False
    ),
    Metric("spro_0.1", "sPRO 0.1", "regions", lambda curve: pro_area(curve, 0.1), in_table=False),
    Metric("spro_0.3", "sPRO 0.3", "regions", lambda curve: pro_area(curve, 0.3), in_table=False),
)


def is_of_all_data(name: str) -> bool:
    """Tell whether every data set has a metric, if with nan for a value."""
    return next(metric.of in ("images", "pixels") for metric in METRICS if metric.name == name)


def metric_names() -> tuple[str, ...]:
    """Return the names of all metrics, in order."""
    return tuple(metric.name for metric in METRICS)


def table_metrics(measured: Collection[str], *, has_maps: bool) -> tuple[Metric, ...]:
    """Return the metrics of a run's table, of those measured: of pixels only where maps are."""
    shown = (m for m in METRICS if m.in_table and m.name in measured)
    return tuple(m for m in shown if has_maps or m.of not in OF_PIXELS)


def heading_of(name: str) -> str:
    """Return how tables call a metric."""
    return next(metric.heading for metric in METRICS if metric.name == name)
