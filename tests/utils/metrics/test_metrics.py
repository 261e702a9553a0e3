import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label as label_regions
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from utils.metrics import metrics
from utils.metrics.evaluate import aupro, evaluate, ranking_metrics
from utils.metrics.metrics import Metric, heading_of, metric_names, table_metrics

EXACT = 1e-9


def sklearn_ranking(scores, labels):
    scores, labels = scores.flatten().double().numpy(), labels.flatten().numpy()
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):  # precision = recall = 0 at scikit-learn's low thresholds
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))[:-1]
    best = f1.max()
    return (
        roc_auc_score(labels, scores),
        average_precision_score(labels, scores),
        best,
        thresholds[f1 >= best - 1e-12].max(),
    )


def slow_aupro(maps, masks, fpr_limit=0.3):
    """Walks every distinct score, measures each region, integrates by trapezoids to the limit."""
    maps, masks = maps.double().numpy(), masks.numpy()
    regions = []
    for index, mask in enumerate(masks):
        components = label_regions(mask, connectivity=2)
        for number in range(1, components.max() + 1):
            regions.append((index, components == number))
    rates, overlaps = [0.0], [0.0]
    for threshold in sorted(set(maps.flatten().tolist()), reverse=True):
        found = maps >= threshold
        rates.append((found & ~masks).sum() / (~masks).sum())
        overlaps.append(np.mean([found[index][region].mean() for index, region in regions]))
    area = 0.0
    for i in range(1, len(rates)):
        left, right, low, high = rates[i - 1], rates[i], overlaps[i - 1], overlaps[i]
        if left >= fpr_limit:
            break
        if right > fpr_limit:
            high = low + (high - low) * (fpr_limit - left) / (right - left)
            right = fpr_limit
        area += (right - left) * (low + high) / 2
    return area / fpr_limit


def random_maps(seed, levels=None, count=6, size=12, dtype=torch.float32):
    """Draws maps a little higher on their random masks; `levels`: how many distinct scores."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, size, size, generator=generator) < 0.12
    masks[0] = False
    maps = torch.randn(count, size, size, generator=generator, dtype=dtype) + masks * 0.8
    if levels is not None:
        maps = ((maps + 3) / 7 * levels).floor().clamp(0, levels - 1)
    return maps, masks


def evaluate_pixels(maps, masks):
    labels = masks.flatten(1).any(1)
    return evaluate(maps.amax(dim=(1, 2)), labels, maps, masks)


def rankings(result, kind):
    return [result.values[f"{kind}_{name}"] for name in ("auroc", "ap", "f1_max")]


class TestHandWorked:
    @pytest.mark.parametrize(
        ("scores", "mask", "fpr_limit", "expected"),
        [
            # Regions {9} and {5}; normal pixels 7 and 1. Overlap 0.5 from rate 0, 1 from rate 0.5.
            ([9.0, 7.0, 5.0, 1.0], [True, False, True, False], 0.3, 0.5),
            ([9.0, 7.0, 5.0, 1.0], [True, False, True, False], 1.0, 0.75),
            # A region of one pixel that ties with one of two normal pixels: straight from (0, 0) to
            # (0.5, 1). At 0.3 the overlap is 0.6: area 0.3 * 0.6 / 2.
            ([4.0, 4.0, 0.0], [True, False, False], 0.3, 0.3),
        ],
    )
    @pytest.mark.parametrize("function", [aupro, slow_aupro])
    def test_aupro_stops_inside_a_piece_of_its_curve(
        self, function, scores, mask, fpr_limit, expected
    ):
        area = function(torch.tensor([[scores]]), torch.tensor([[mask]]), fpr_limit=fpr_limit)
        assert area == pytest.approx(expected, abs=1e-15)

    def test_pixels_of_a_defect_that_was_cropped_away_count_as_normal(self):
        maps = torch.tensor([[[3.0, 0.0]], [[2.0, 0.0]], [[1.0, 0.0]]])
        masks = torch.tensor([[[False, False]], [[True, False]], [[False, False]]])
        result = evaluate(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1, 1, 0]), maps, masks)
        assert result.values["image_auroc"] == 1.0
        assert result.values["pixel_auroc"] == 4 / 5


class TestAgainstReferences:
    @pytest.mark.parametrize("levels", [None, 2, 5, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("seed", range(4))
    def test_all_pixel_metrics(self, seed, dtype, levels):
        maps, masks = random_maps(seed, levels, dtype=dtype)
        result = evaluate_pixels(maps, masks)
        assert rankings(result, "pixel") == pytest.approx(
            sklearn_ranking(maps, masks)[:3], abs=EXACT
        )
        assert result.values["aupro"] == pytest.approx(slow_aupro(maps, masks), abs=EXACT)
        assert result.undefined == {}

    @pytest.mark.parametrize("fpr_limit", [0.01, 0.05, 0.3, 1.0])
    @pytest.mark.parametrize("levels", [None, 3, 12])
    def test_aupro_at_other_limits(self, fpr_limit, levels):
        maps, masks = random_maps(11, levels)
        expected = slow_aupro(maps, masks, fpr_limit)
        assert aupro(maps, masks, fpr_limit=fpr_limit) == pytest.approx(expected, abs=EXACT)

    @pytest.mark.parametrize("levels", [None, 3, 12])
    def test_image_metrics(self, levels):
        maps, _ = random_maps(5, levels, count=200, size=1)
        scores, labels = maps.flatten(), torch.arange(200) % 3 == 0
        result = evaluate(scores, labels, None, None)
        *expected, threshold = sklearn_ranking(scores, labels)
        assert rankings(result, "image") == pytest.approx(expected, abs=EXACT)
        assert ranking_metrics(scores, labels).f1_threshold == pytest.approx(threshold)


small_samples = st.lists(
    st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


class TestProperties:
    @settings(max_examples=60, deadline=None)
    @given(pairs=small_samples, random=st.randoms(use_true_random=False))
    def test_ranking(self, pairs, random):
        scores = torch.tensor([float(score) for score, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
        result = ranking_metrics(scores, labels)
        assert result == pytest.approx(sklearn_ranking(scores, labels), abs=EXACT)
        order = list(range(len(pairs)))
        random.shuffle(order)
        assert ranking_metrics(scores[order], labels[order]) == result
        monotone = scores.double() ** 3 * 1e3 + 17
        assert ranking_metrics(monotone, labels)[:3] == result[:3]

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 10_000), levels=st.integers(2, 6))
    def test_aupro(self, seed, levels):
        maps, masks = random_maps(seed, levels, count=3, size=6)
        masks[1, 0, 0] = True
        assert aupro(maps, masks) == pytest.approx(slow_aupro(maps, masks), abs=EXACT)


class TestScale:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_neighbouring_scores_are_told_apart(self, dtype):
        base = torch.tensor(1e6, dtype=dtype)
        scores = torch.stack([base, base.nextafter(2 * base)])
        assert ranking_metrics(scores, torch.tensor([0, 1])).auroc == 1.0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_ranked_as_it_is(self, dtype):
        maps, masks = random_maps(3)
        assert ranking_metrics(maps.to(dtype), masks) == ranking_metrics(
            maps.to(dtype).double(), masks
        )

    def test_the_input_is_left_as_it_is(self):
        maps, masks = random_maps(4)
        copies = maps.clone(), masks.clone()
        evaluate_pixels(maps, masks)
        assert torch.equal(maps, copies[0])
        assert torch.equal(masks, copies[1])


class TestUndefined:
    scores = torch.tensor([0.1, 0.4, 0.2])
    maps = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    no_masks = torch.zeros(3, 4, 4, dtype=torch.bool)

    @pytest.fixture(autouse=True)
    def no_warnings(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield

    @pytest.mark.parametrize(
        ("labels", "reason"), [([0, 0, 0], "no anomalous images"), ([1, 1, 1], "no normal images")]
    )
    def test_one_class_only(self, labels, reason):
        result = evaluate(self.scores, torch.tensor(labels), self.maps, self.no_masks)
        assert all(math.isnan(value) for value in result.values.values())
        assert result.undefined == {
            name: reason if name.startswith("image") else "no anomalous pixels in the masks"
            for name in metric_names()[:7]
        }

    def test_no_images(self):
        result = evaluate(torch.zeros(0), torch.zeros(0), torch.zeros(0, 4, 4), None)
        assert result.undefined["image_auroc"] == "no images"

    @pytest.mark.parametrize(
        ("maps", "masks", "reason"),
        [
            (maps, None, "no masks"),
            (None, None, "no masks"),
            (None, no_masks, "no anomaly maps"),
            (maps, no_masks, "no anomalous pixels in the masks"),
        ],
    )
    def test_pixel_metrics_alone_are_nan(self, maps, masks, reason):
        result = evaluate(self.scores, torch.tensor([0, 1, 0]), maps, masks)
        assert result.values["image_auroc"] == 1.0
        pixel_names = ["pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"]
        assert result.undefined == dict.fromkeys(pixel_names, reason)
        assert all(math.isnan(result.values[name]) for name in pixel_names)

    def test_no_normal_pixel(self):
        result = evaluate_pixels(self.maps, ~self.no_masks)
        assert result.undefined["aupro"] == "no normal pixels in the masks"

    def test_single_functions_return_nan(self):
        assert math.isnan(aupro(self.maps, self.no_masks))
        assert all(math.isnan(value) for value in ranking_metrics(self.scores, torch.zeros(3)))


class TestBadInput:
    def test_the_message_counts_nan_and_infinite_scores(self):
        scores = torch.tensor([0.1, math.nan, math.inf, -math.inf, 2.0])
        with pytest.raises(ValueError, match=r"3 of 5 .*1 nan, 2 infinite"):
            ranking_metrics(scores, torch.tensor([0, 1, 0, 1, 0]))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_one_bad_pixel_is_found(self, bad):
        maps, masks = random_maps(0)
        maps[3, 2, 1] = bad
        labels = masks.flatten(1).any(1)
        with pytest.raises(ValueError, match="1 of 864 values of the anomaly maps"):
            evaluate(torch.rand(len(labels)), labels, maps, masks)

    def test_a_mask_on_a_normal_image(self):
        maps, masks = random_maps(0)
        labels = masks.flatten(1).any(1)
        labels[2] = False
        with pytest.raises(ValueError, match=r"labelled normal, at \[2\]"):
            evaluate(torch.rand(len(labels)), labels, maps, masks)

    def test_shapes_that_disagree(self):
        maps, masks = random_maps(0)
        with pytest.raises(ValueError, match=r"\(6, 12, 11\).*\(6, 12, 12\)"):
            aupro(maps[..., :-1], masks)
        with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
            ranking_metrics(torch.rand(3), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="6 masks for 5 labels"):
            evaluate(torch.rand(5), torch.ones(5), maps, masks)

    def test_types_and_values(self):
        maps, masks = random_maps(0)
        with pytest.raises(TypeError, match="masks must be bool"):
            aupro(maps, masks.float())
        with pytest.raises(TypeError, match="floating point"):
            aupro(maps.long(), masks)
        with pytest.raises(ValueError, match="labels must be 0"):
            ranking_metrics(torch.rand(3), torch.tensor([0, 1, 2]))
        with pytest.raises(ValueError, match="fpr_limit is 30"):
            aupro(maps, masks, fpr_limit=30)


def test_names_are_in_order_with_their_headings():
    measured = tuple(evaluate_pixels(*random_maps(0)).values)
    assert measured == metric_names()[:7]
    assert (measured[0], measured[-1]) == ("image_auroc", "aupro")
    assert len(set(map(heading_of, metric_names()))) == len(metric_names()) == 14
    assert heading_of("pixel_f1_max") == "pixel F1-max"
    of_images = ["image_auroc", "image_ap", "image_f1_max"]
    assert [m.name for m in table_metrics(measured, has_maps=False)] == of_images
    of_pixels = ["pixel_auroc", "pixel_ap", "aupro"]
    assert [m.name for m in table_metrics(measured, has_maps=True)] == of_images + of_pixels
    of_kinds = ["image_auroc_logical", "image_auroc_structural", "image_auroc_mean"]
    every = [m.name for m in table_metrics(metric_names(), has_maps=True)]
    assert every == [*of_images, *of_pixels, *of_kinds, "spro"]
    without_maps = [m.name for m in table_metrics(metric_names(), has_maps=False)]
    assert without_maps == of_images + of_kinds


def test_a_metric_that_is_added_is_measured(monkeypatch):
    share = Metric("share", "share", "pixels", lambda c: c.num_anomalous / (6 * 12 * 12))
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, share))
    maps, masks = random_maps(0)
    assert evaluate_pixels(maps, masks).values["share"] == pytest.approx(masks.float().mean())
    without = evaluate(torch.rand(2), torch.tensor([0, 1]), None, None)
    assert math.isnan(without.values["share"])
    assert without.undefined["share"] == "no masks"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("levels", [None, 5])
def test_cuda_equals_cpu(levels):
    maps, masks = random_maps(0, levels)
    assert evaluate_pixels(maps.cuda(), masks.cuda()) == evaluate_pixels(maps, masks)
