import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.threads import torch_threads
from tests.utils.metrics.test_metrics import (
    evaluate_pixels,
    random_maps,
    sklearn_ranking,
    slow_aupro,
)
from utils.metrics import counting
from utils.metrics.counting import count_at_thresholds
from utils.metrics.evaluate import ranking_metrics


@pytest.fixture(params=[1, 2, 4])
def num_threads(request):
    with torch_threads(request.param):
        yield request.param


@pytest.fixture
def many_parts(monkeypatch, num_threads):
    """Small inputs take the way of large ones: a part per thread, blocks, queries in portions."""
    sizes = {"PART_SIZE": 3, "BLOCK": 4, "MANY_QUERIES": 2, "QUERIES_AT_ONCE": 5}
    for name, size in sizes.items():
        monkeypatch.setattr(counting, name, size)
    return num_threads


def assert_counts(scores, labels):
    """Each count is taken by looking at all scores."""
    curve = count_at_thresholds(scores, labels)
    normal, anomalous = scores[~labels], scores[labels]
    thresholds = torch.from_numpy(curve.thresholds)
    assert torch.equal(thresholds, anomalous.unique().flip(0))
    assert curve.normal_above.tolist() == [int((normal > t).sum()) for t in thresholds]
    assert curve.false_positives.tolist() == [int((normal >= t).sum()) for t in thresholds]
    assert curve.true_positives.tolist() == [int((anomalous >= t).sum()) for t in thresholds]
    ranked = anomalous[torch.from_numpy(curve.order.copy())]
    assert torch.equal(ranked, anomalous.sort(descending=True).values)
    assert (curve.num_normal, curve.num_anomalous) == (len(normal), len(anomalous))


LIMITS = [torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 1e-45, -1e-45, -0.0]
samples = st.lists(
    st.tuples(st.one_of(st.integers(-3, 3).map(float), st.sampled_from(LIMITS)), st.booleans()),
    min_size=2,
    max_size=60,
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_and_blocks_count_what_is_there(dtype):
    @settings(max_examples=60, deadline=None)
    @given(pairs=samples)
    def check(pairs):
        scores = torch.tensor([score for score, _ in pairs], dtype=dtype)
        assert_counts(scores, torch.tensor([label for _, label in pairs]))

    check()


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("levels", [None, 2, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_all_metrics_from_many_parts(seed, levels):
    maps, masks = random_maps(seed, levels)
    result = evaluate_pixels(maps, masks)
    expected = (*sklearn_ranking(maps, masks), slow_aupro(maps, masks))
    found = (*ranking_metrics(maps, masks), result.values["aupro"])
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[3] == result.pixel_f1_threshold


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("levels", [None, 300])
def test_more_scores_than_a_part_and_more_thresholds_than_a_portion(levels):
    generator = np.random.default_rng(0)
    scores = generator.normal(size=counting.PART_SIZE * 5 // 2).astype(np.float32)
    if levels is not None:
        scores = np.round(scores * levels) / np.float32(levels)
    labels = generator.random(len(scores)) < 0.04 + 0.04 * (scores > 1)
    curve = count_at_thresholds(torch.from_numpy(scores), torch.from_numpy(labels))
    normal = np.sort(scores[~labels])
    assert levels is not None or len(curve.thresholds) > 2 * counting.QUERIES_AT_ONCE
    thresholds = np.unique(scores[labels])[::-1]
    assert np.array_equal(curve.thresholds, thresholds)
    below, not_above = (np.searchsorted(normal, thresholds, side) for side in ("left", "right"))
    assert np.array_equal(curve.false_positives, len(normal) - below)
    assert np.array_equal(curve.normal_above, len(normal) - not_above)


def test_little_work_starts_no_thread(monkeypatch):
    def refuse(*_):
        raise AssertionError("a thread pool for small inputs")

    monkeypatch.setattr(counting, "ThreadPoolExecutor", refuse)
    maps, masks = random_maps(0, count=30, size=100)
    assert 0 < evaluate_pixels(maps, masks).values["aupro"] < 1


@pytest.mark.usefixtures("many_parts")
def test_regions_far_apart_in_a_mask_and_in_masks_that_are_views():
    generator = np.random.default_rng(1)
    whole = torch.from_numpy(generator.random((9, 16, 16)) < 0.05)
    maps = torch.from_numpy(generator.normal(size=(9, 16, 16)))
    whole[[0, 1, 2, 4, 5]] = False
    whole[5, 14] = True
    for masks, scores in ((whole, maps), (whole[:, ::2, ::2], maps[:, ::2, ::2])):
        result = evaluate_pixels(scores, masks)
        assert result.values["aupro"] == pytest.approx(slow_aupro(scores, masks), abs=1e-9)
        copied = evaluate_pixels(scores.contiguous(), masks.contiguous())
        assert result == copied
