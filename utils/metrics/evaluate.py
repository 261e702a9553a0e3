"""Scores, labels and masks to the numbers of `METRICS`: checked, sorted once, float32 as float32.

float64 is ranked as float64, and half precision is widened, which is exact.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from datasets.samples import Region
from utils.metrics import metrics
from utils.metrics.counting import count_at_thresholds, threaded_map, threads_for
from utils.metrics.curve import Curve
from utils.metrics.metrics import FPR_LIMIT

# Pixels that touch at a corner are one region, as in MVTec's official evaluation code
# (pro_curve_util.py labels the ground truth with a 3 x 3 structure of ones).
EIGHT_NEIGHBOURS = 8


@dataclass(frozen=True)
class Measured:
    """The metrics of one category.

    Attributes:
        values: by name, in the order of `METRICS`, each in [0, 1] or nan.
        undefined: name of each nan -> why it is one.
        pixel_f1_threshold: a score, where the pixels' F1 is largest; None where that is nan.
    """

    values: dict[str, float]
    undefined: dict[str, str]
    pixel_f1_threshold: float | None = None


class Ranking(NamedTuple):
    """How well scores separate two classes; all nan when one class is missing."""

    auroc: float
    average_precision: float
    f1_max: float
    f1_threshold: float


def evaluate(
    image_scores: Tensor,
    labels: Tensor,
    anomaly_maps: Tensor | None,
    masks: Tensor | None,
    *,
    known: Tensor | None = None,
    regions: Sequence[Region] | None = None,
    groups: Mapping[str, Tensor] | None = None,
    inside: Tensor | None = None,
) -> Measured:
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
        known: (M,) positions of the images whose masks are known, the only ones whose pixels are
            measured; None for all.
        regions: The defects of all masks, each with its saturation: only then metrics of "regions"
            are measured.
        groups: "logical" and "structural" -> which images are such anomalies, (N,) bool: only then
            the metrics of these are measured.
        inside: (N, H, W) bool, the pixels that are measured, all defects among them; None for all.

    Raises:
        TypeError: Scores that are not floating point, masks that are not bool.
        ValueError: Shapes that disagree, labels other than 0 and 1, scores that are not finite, a
            mask that marks a defect in an image labelled normal.
    """
    labels = _binary_labels(labels)
    image_scores = _checked_scores(image_scores, labels, "image scores")
    curves: dict[str, tuple[Curve, ...]] = {}
    reasons: dict[str, str] = {}
    _add(curves, reasons, "images", *_ranked(image_scores, labels, "images"))
    for name, members in (groups or {}).items():
        ranked = ~labels | members  # (N,)
        found = _ranked(
            image_scores[ranked.to(image_scores.device)], labels[ranked], f"{name} images"
        )
        _add(curves, reasons, name, *found)
    if groups:
        missing = [name for name in groups if name not in curves]
        reasons["kinds"] = reasons[missing[0]] if missing else ""
        if not missing:
            curves["kinds"] = tuple(curves[name][0] for name in groups)
    pixels, pixel_reason = None, "no masks"
    if masks is not None:
        _check_masks(masks, labels)
        pixel_reason = "no anomaly maps"
        if anomaly_maps is not None and known is not None:
            anomaly_maps, masks = anomaly_maps[known.to(anomaly_maps.device)], masks[known]
            inside = None if inside is None else inside[known]
        if anomaly_maps is not None:
            pixels, pixel_reason = _ranked_pixels(anomaly_maps, masks, inside)
    _add(curves, reasons, "pixels", pixels, pixel_reason)
    if regions is not None:
        defects = None
        if pixels is not None and masks is not None:
            weights = saturated_weights(
                pixels.order, masks.cpu().numpy(), _of_known(regions, known)
            )
            defects = replace(pixels, region_weights=weights)
        _add(curves, reasons, "regions", defects, pixel_reason)
    values, undefined = {}, {}
    for metric in metrics.METRICS:
        if metric.of not in reasons:
            continue
        values[metric.name] = math.nan
        if metric.of in curves:
            values[metric.name] = metric.value(*curves[metric.of])
        else:
            undefined[metric.name] = reasons[metric.of]
    threshold = None if pixels is None else metrics.f1_threshold(pixels)
    return Measured(values, undefined, threshold)


def _add(
    curves: dict[str, tuple[Curve, ...]],
    reasons: dict[str, str],
    name: str,
    curve: Curve | None,
    reason: str,
) -> None:
    """Note a curve, or why there is none."""
    reasons[name] = reason
    if curve is not None:
        curves[name] = (curve,)


def saturated_weights(
    order: np.ndarray, masks: np.ndarray, regions: Sequence[Region]
) -> np.ndarray:
    """Return what each anomalous pixel adds to the overlap of the defects it belongs to.

    In the order of the scores each pixel of a defect counts 1 / saturation until as many are found;
    the one beyond counts for what is left, all others nothing. So sPRO (Bergmann et al., IJCV 2022)
    is `pro_area` with these weights, exact for any threshold.

    Args:
        order: (P,), ranks the anomalous pixels from the highest down.
        masks: (N, H, W) bool.
        regions: the defects of these masks.

    Returns:
        (P,), in the order of the masks.
    """
    rank_of = np.empty_like(order)
    rank_of[order] = np.arange(len(order))
    anomalous = np.flatnonzero(masks)  # (P,)
    size = masks[0].size
    weights = np.zeros(len(order))
    for region in regions:
        places = np.searchsorted(anomalous, region.image * size + region.pixels)  # (A,)
        places = places[np.argsort(rank_of[places])]  # the first found comes first
        left = region.saturation - np.arange(len(places))
        weights[places] += left.clip(0, 1) / region.saturation
    return weights


def _of_known(regions: Sequence[Region], known: Tensor | None) -> Sequence[Region]:
    """Return the regions of the images whose masks are known, these counted anew."""
    if known is None:
        return regions
    place_of = {image: place for place, image in enumerate(known.tolist())}
    return [replace(r, image=place_of[r.image]) for r in regions if r.image in place_of]


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
    curve, _ = _ranked(_checked_scores(scores, labels, "scores"), labels, "scores")
    if curve is None:
        return Ranking(math.nan, math.nan, math.nan, math.nan)
    return Ranking(
        metrics.auroc(curve),
        metrics.average_precision(curve),
        metrics.f1_max(curve),
        metrics.f1_threshold(curve),
    )


def aupro(anomaly_maps: Tensor, masks: Tensor, *, fpr_limit: float = FPR_LIMIT) -> float:
    """Computes `metrics.pro_area` alone, in [0, 1].

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
    curve, _ = _ranked_pixels(anomaly_maps, masks)
    return math.nan if curve is None else metrics.pro_area(curve, fpr_limit)


def _ranked(scores: Tensor, labels: Tensor, what: str) -> tuple[Curve | None, str]:
    """Returns the curve of scores, or None and the reason where a class is missing."""
    reason = _missing_class(labels, what)
    return (None if reason else count_at_thresholds(scores, labels.to(scores.device))), reason


def _ranked_pixels(
    anomaly_maps: Tensor, masks: Tensor, inside: Tensor | None = None
) -> tuple[Curve | None, str]:
    """Returns the curve of all pixels with region weights, or None and the reason."""
    anomaly_maps = _checked_scores(anomaly_maps, masks, "anomaly maps")
    labels = masks
    if inside is not None:
        anomaly_maps, labels = anomaly_maps[inside.to(anomaly_maps.device)], masks[inside]  # (P,)
    reason = _missing_class(labels, "pixels in the masks")
    if reason:
        return None, reason
    # The labelling of the regions fills what time the sort leaves a thread.
    with threaded_map(threads_for(masks.numel())) as run:
        weights_to_be = run(_region_weights, [masks.cpu().numpy()])
        curve = count_at_thresholds(anomaly_maps, labels.to(anomaly_maps.device))
        (weights,) = weights_to_be
    return replace(curve, region_weights=weights), ""


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
