"""sPRO against a slow reference, and AUROC of logical and structural anomalies."""

import math

import numpy as np
import pytest
import torch

from datasets.samples import Region
from utils.metrics.evaluate import evaluate, ranking_metrics

LIMITS = {"spro": 0.05, "spro_0.01": 0.01, "spro_0.1": 0.1, "spro_0.3": 0.3}
N, SIDE = 5, 12


def drawn(seed, levels=None):
    """Maps, masks and overlapping regions of random saturations; the first image is normal."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(N, SIDE, SIDE))
    regions = []
    masks = np.zeros((N, SIDE, SIDE), dtype=bool)
    for image in range(1, N):
        for _ in range(3):
            top, left = rng.integers(0, SIDE - 4, 2)
            here = np.zeros((SIDE, SIDE), dtype=bool)
            here[top : top + rng.integers(1, 5), left : left + rng.integers(1, 5)] = True
            pixels = np.flatnonzero(here)
            saturation = rng.uniform(0.2, 1) * len(pixels)
            regions.append(Region(image, pixels, max(0.5, saturation)))
            masks[image] |= here
    maps[masks] += 1
    if levels:
        maps = np.round(maps * levels) / levels
    return torch.from_numpy(maps).float(), torch.from_numpy(masks), regions


def slow_spro(maps, masks, regions, limit):
    """Area under the curve of points, one for each distinct score, cut at the limit."""
    flat = maps.flatten(1).numpy()
    normal = maps[~masks].numpy()
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        rates.append((normal >= threshold).mean())
        found = [(flat[r.image, r.pixels] >= threshold).sum() for r in regions]
        shares = [min(f / r.saturation, 1) for f, r in zip(found, regions, strict=True)]
        overlaps.append(np.mean(shares))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(zip(rates, overlaps), zip(rates[1:], overlaps[1:])):  # noqa: B905
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def measured(maps, masks, regions, **options):
    labels = masks.flatten(1).any(dim=1).long()
    return evaluate(maps.amax(dim=(1, 2)), labels, maps, masks, regions=regions, **options).values


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "ties"])
def test_spro_is_that_of_a_threshold_for_each_score(seed, levels):
    drawn_ones = drawn(seed, levels)
    values = measured(*drawn_ones)
    for name, limit in LIMITS.items():
        assert values[name] == pytest.approx(slow_spro(*drawn_ones, limit), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_where_the_saturation_is_the_regions_area_it_is_aupro(seed):
    rng = np.random.default_rng(seed)
    masks = np.zeros((3, SIDE, SIDE), dtype=bool)
    regions = []
    for image, (top, left) in enumerate([(1, 1), (5, 6), (0, 8)]):
        for corner in ((top, left), (top + 4, 0)):
            here = np.zeros((SIDE, SIDE), dtype=bool)
            here[corner[0] : corner[0] + 3, corner[1] : corner[1] + 2] = True
            if (here & masks[image]).any():
                continue
            masks[image] |= here
            regions.append(Region(image, np.flatnonzero(here), float(here.sum())))
    maps = torch.from_numpy(rng.normal(size=masks.shape) + masks).float()
    values = measured(maps, torch.from_numpy(masks), regions)
    assert values["spro_0.3"] == pytest.approx(values["aupro"], abs=1e-12)


def test_a_saturated_defect_is_found_sooner():
    maps, masks, regions = drawn(1)
    half = [Region(r.image, r.pixels, len(r.pixels) / 2) for r in regions]
    full = [Region(r.image, r.pixels, float(len(r.pixels))) for r in regions]
    assert measured(maps, masks, half)["spro_0.3"] > measured(maps, masks, full)["spro_0.3"]


def test_images_without_a_known_mask_take_their_regions_along():
    maps, masks, regions = drawn(2)
    known = torch.tensor([0, 2, 4])
    values = measured(maps, masks, regions, known=known)
    kept = [Region([0, 2, 4].index(r.image), r.pixels, r.saturation)
            for r in regions if r.image in (0, 2, 4)]  # fmt: skip
    alone = measured(maps[known], masks[known], kept)
    assert values["spro"] == alone["spro"]


def test_without_regions_or_groups_their_metrics_are_left_out():
    maps, masks, _ = drawn(3)
    assert not any(
        name.startswith(("spro", "image_auroc_")) for name in measured(maps, masks, None)
    )
    values = evaluate(torch.rand(3), torch.tensor([0, 1, 1]), None, None, regions=[])
    assert math.isnan(values.values["spro"])
    assert values.undefined["spro"] == "no masks"


def test_auroc_of_logical_and_structural_anomalies_and_their_mean():
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0))
    kinds = torch.arange(40) % 4  # 0 and 1 normal, 2 logical, 3 structural
    groups = {"logical": kinds == 2, "structural": kinds == 3}
    values = evaluate(scores, (kinds > 1).long(), None, None, groups=groups).values
    for name, kind in (("logical", 2), ("structural", 3)):
        ranked = (kinds < 2) | (kinds == kind)
        wanted = ranking_metrics(scores[ranked], (kinds[ranked] == kind).long()).auroc
        assert values[f"image_auroc_{name}"] == wanted
    both = values["image_auroc_logical"] + values["image_auroc_structural"]
    assert values["image_auroc_mean"] == pytest.approx(both / 2)


def test_a_group_without_images_has_no_auroc_and_neither_has_the_mean():
    kinds = torch.tensor([0, 0, 2, 2])
    groups = {"logical": kinds == 2, "structural": kinds == 3}
    found = evaluate(torch.rand(4), (kinds > 0).long(), None, None, groups=groups)
    assert not math.isnan(found.values["image_auroc_logical"])
    for name in ("image_auroc_structural", "image_auroc_mean"):
        assert math.isnan(found.values[name])
        assert found.undefined[name] == "no anomalous structural images"
