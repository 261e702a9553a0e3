"""Exact image and pixel metrics of anomaly scores: AUROC, average precision, F1-max and AUPRO.

All four numbers are sums over the distinct anomalous scores, from the counts of `utils.metrics.counting`:
there is no threshold grid, and scores are never squashed, normalised or rounded on the way: float32
is ranked as float32, float64 as float64, and half precision is widened, which is exact.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from utils.metrics.counting import Curve, count_at_thresholds, threaded_map, threads_for

# The limit of Bergmann et al., "Uninformed Students" (CVPR 2020), and of MVTec's evaluation code.
FPR_LIMIT = 0.3

# Pixels that touch at a corner are one region, as in MVTec's official evaluation code
# (pro_curve_util.py labels the ground truth with a 3 x 3 structure of ones).
EIGHT_NEIGHBOURS = 8


@dataclass(frozen=True)
class Metrics:
    """The metrics of one category, each in [0, 1] or nan, and the reason for every nan.

    The names are those of `METRIC_NAMES`; `undefined` maps the name of each nan to why it is one.
    `pixel_f1_threshold`, a score, is where `pixel_f1_max` is reached; None where that is nan.
    """

    image_auroc: float
    image_ap: float
    image_f1_max: float
    pixel_auroc: float
    pixel_ap: float
    pixel_f1_max: float
    aupro: float
    undefined: dict[str, str]
    pixel_f1_threshold: float | None = None

    def values(self) -> dict[str, float]:
        """Returns the metrics by name, in the order of `METRIC_NAMES`."""
        return {name: getattr(self, name) for name in METRIC_NAMES}


METRIC_NAMES: tuple[str, ...] = tuple(
    field.name for field in fields(Metrics) if field.name not in {"undefined", "pixel_f1_threshold"}
)


class Ranking(NamedTuple):
    """How well scores separate two classes; all nan when one class is missing.

    `auroc` is the Mann-Whitney statistic, ties counting half. `average_precision` is the sum of
    precision times the step in recall (scikit-learn's definition, without interpolation). `f1_max`
    is reached by calling anomalous every score >= `f1_threshold`, the highest such threshold.
    """

    auroc: float
    average_precision: float
    f1_max: float
    f1_threshold: float


UNDEFINED_RANKING = Ranking(math.nan, math.nan, math.nan, math.nan)


def evaluate(
    image_scores: Tensor,
    labels: Tensor,
    anomaly_maps: Tensor | None,
    masks: Tensor | None,
) -> Metrics:
    """Computes every metric of one category's test set.

    Pixels are labelled by the masks alone, the usual protocol: an anomalous image whose mask is
    empty (its defect was cropped away, say) counts as anomalous in the image metrics, and its
    pixels count as normal in the pixel metrics. Whoever calls this should report such images.

    The four pixel metrics share one sort. Beside the input it takes 4 bytes per pixel for float32
    maps on the CPU (8 for float64) and about 100 per anomalous pixel; nothing is cast to float64.

    Args:
        image_scores: (N,), any finite float, higher = more anomalous.
        labels: (N,), bool or 0 / 1, 1 = anomalous.
        anomaly_maps: (N, H, W), any finite float, higher = more anomalous; None without maps.
        masks: (N, H, W) bool, True on defects; None without masks.

    Raises:
        TypeError: Scores that are not floating point, masks that are not bool.
        ValueError: Shapes that disagree, labels other than 0 and 1, scores that are not finite, a
            mask that marks a defect in an image labelled normal.
    """
    labels = _binary_labels(labels)
    image_scores = _checked_scores(image_scores, labels, "image scores")
    image, image_reason = _ranked(image_scores, labels, "images")

    pixel, area, pixel_reason = UNDEFINED_RANKING, math.nan, "no masks"
    if masks is not None:
        _check_masks(masks, labels)
        pixel_reason = "no anomaly maps"
        if anomaly_maps is not None:
            pixel, area, pixel_reason = _pixel_metrics(anomaly_maps, masks, FPR_LIMIT)

    values = (*image[:3], *pixel[:3], area)
    reasons = (image_reason,) * 3 + (pixel_reason,) * 4
    undefined = {
        name: reason
        for name, value, reason in zip(METRIC_NAMES, values, reasons, strict=True)
        if math.isnan(value)
    }
    threshold = None if math.isnan(pixel.f1_threshold) else pixel.f1_threshold
    return Metrics(*values, undefined=undefined, pixel_f1_threshold=threshold)


def ranking_metrics(scores: Tensor, labels: Tensor) -> Ranking:
    """Computes AUROC, average precision and F1-max of scores of any one shape.

    Args:
        scores: (...), any finite float, higher = more anomalous.
        labels: (...), bool or 0 / 1, 1 = anomalous.

    Raises:
        TypeError: Scores that are not floating point.
        ValueError: Shapes that disagree, labels other than 0 and 1, scores that are not finite.
    """
    labels = _binary_labels(labels)
    return _ranked(_checked_scores(scores, labels, "scores"), labels, "scores")[0]


def aupro(anomaly_maps: Tensor, masks: Tensor, *, fpr_limit: float = FPR_LIMIT) -> float:
    """Computes the area under the per-region overlap curve up to a false positive rate, in [0, 1].

    Bergmann et al., "Uninformed Students" (CVPR 2020): the overlap is the part of a defect region
    that is found, averaged over the 8-connected regions of all masks, so a small defect weighs as
    much as a large one; the rate is over the normal pixels of all images. The curve is linear
    between successive distinct scores, and also at the limit; its area is divided by the limit.

    Args:
        anomaly_maps: (N, H, W), any finite float, higher = more anomalous.
        masks: (N, H, W) bool, True on defects.
        fpr_limit: Upper end of the integration, in (0, 1].

    Returns:
        The area, or nan where there is no anomalous or no normal pixel.

    Raises:
        TypeError: Scores that are not floating point, masks that are not bool.
        ValueError: Shapes that disagree, scores that are not finite, a limit outside (0, 1].
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit is {fpr_limit}; it must lie in (0, 1]")
    _check_masks(masks, None)
    return _pixel_metrics(anomaly_maps, masks, fpr_limit)[1]


def _ranking(curve: Curve) -> Ranking:
    tp, fp, above = curve.true_positives, curve.false_positives, curve.normal_above
    found = np.diff(tp, prepend=0)  # anomalous scores at each threshold
    # Twice the number of (anomalous, normal) pairs in the right order, ties half: int64, exact.
    twice_pairs = int((found * (2 * curve.num_normal - fp - above)).sum())
    f1 = 2 * tp / (tp + fp + curve.num_anomalous)
    best = int(f1.argmax())
    return Ranking(
        auroc=twice_pairs / (2 * curve.num_normal * curve.num_anomalous),
        average_precision=float((tp / (tp + fp) * found).sum() / curve.num_anomalous),
        f1_max=float(f1[best]),
        f1_threshold=float(curve.thresholds[best]),
    )


def _ranked(scores: Tensor, labels: Tensor, what: str) -> tuple[Ranking, str]:
    reason = _missing_class(labels, what)
    if reason:
        return UNDEFINED_RANKING, reason
    return _ranking(count_at_thresholds(scores, labels.to(scores.device))), ""


def _pixel_metrics(
    anomaly_maps: Tensor, masks: Tensor, fpr_limit: float
) -> tuple[Ranking, float, str]:
    """Returns the ranking of the pixels, AUPRO, and why they are nan (empty where they are not)."""
    anomaly_maps = _checked_scores(anomaly_maps, masks, "anomaly maps")
    masks = masks.to(anomaly_maps.device)
    reason = _missing_class(masks, "pixels in the masks")
    if reason:
        return UNDEFINED_RANKING, math.nan, reason
    # The labelling of the regions fills what time the sort leaves a thread.
    with threaded_map(threads_for(masks.numel())) as run:
        weights_to_be = run(_region_weights, [masks.cpu().numpy()])
        curve = count_at_thresholds(anomaly_maps, masks)
        (weights,) = weights_to_be
    return _ranking(curve), _pro_area(curve, weights, fpr_limit), ""


def _region_weights(masks: np.ndarray) -> np.ndarray:
    """Returns 1 / area of its region for each anomalous pixel, (P,), ordered as `masks[masks]`."""
    weights = []
    for mask in masks:
        rows = np.flatnonzero(mask.any(axis=1))
        if not len(rows):
            continue
        defect = np.ascontiguousarray(mask[rows[0] : rows[-1] + 1])  # (h, W): no empty ends
        _, regions = cv2.connectedComponents(
            defect.view(np.uint8), connectivity=EIGHT_NEIGHBOURS
        )  # (h, W), 0 = normal
        region_of_pixel = regions[defect]
        areas = np.maximum(np.bincount(region_of_pixel), 1)  # no pixel is of region 0
        weights.append((1.0 / areas)[region_of_pixel])
    return np.concatenate(weights)


def _pro_area(curve: Curve, weights: np.ndarray, fpr_limit: float) -> float:
    """Integrates the per-region overlap over false positives, exactly.

    From one threshold to the next the curve first runs flat (normal pixels scored in between), then
    straight to the next point (normal pixels that tie with anomalous ones; vertical without any).
    """
    overlap = np.cumsum(weights[curve.order])[curve.true_positives - 1]  # (K,)
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


def _missing_class(labels: Tensor, what: str) -> str:
    num_anomalous = int(labels.count_nonzero())
    if labels.numel() == 0:
        return f"no {what}"
    if num_anomalous == 0:
        return f"no anomalous {what}"
    return f"no normal {what}" if num_anomalous == labels.numel() else ""


def _binary_labels(labels: Tensor) -> Tensor:
    binary = labels == 1
    if not (binary | (labels == 0)).all():
        raise ValueError(f"labels must be 0 (normal) or 1 (anomalous), got {labels.unique()}")
    return binary


def _check_masks(masks: Tensor, labels: Tensor | None) -> None:
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool, got {masks.dtype}; pass `masks > 0`")
    if masks.ndim != 3:
        raise ValueError(f"masks must be (N, H, W), got {tuple(masks.shape)}")
    if labels is None:
        return
    if len(masks) != len(labels):
        raise ValueError(f"{len(masks)} masks for {len(labels)} labels")
    # NumPy stops at the first True of each mask.
    marked = torch.from_numpy(masks.cpu().numpy().any(axis=(1, 2)))  # (N,)
    contradicting = marked & ~labels.cpu()  # (N,)
    if contradicting.any():
        indices = contradicting.nonzero().flatten().tolist()
        raise ValueError(f"masks mark a defect in images labelled normal, at {indices[:10]}")


def _checked_scores(scores: Tensor, labels: Tensor, what: str) -> Tensor:
    """Returns the scores ready to rank: same shape as the labels, finite, float32 or float64."""
    if not scores.is_floating_point():
        raise TypeError(f"{what} must be floating point, got {scores.dtype}")
    if scores.shape != labels.shape:
        raise ValueError(
            f"{what} are {tuple(scores.shape)}, their labels or masks {tuple(labels.shape)}"
        )
    scores = scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    # The extremes carry any nan or infinity, and finding them takes no memory.
    if scores.numel() and not all(extreme.isfinite() for extreme in scores.aminmax()):
        num_nan, num_inf = int(scores.isnan().sum()), int(scores.isinf().sum())
        raise ValueError(
            f"{num_nan + num_inf} of {scores.numel()} values of the {what} are not finite "
            f"({num_nan} nan, {num_inf} infinite); look at the features and at the training loss"
        )
    return scores
