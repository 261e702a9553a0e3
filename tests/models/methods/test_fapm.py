import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from models.errors import ModelError
from models.features.coreset import greedy_k_centre
from models.methods.fapm import fapm as module
from models.methods.fapm import regions as searching
from models.methods.fapm.fapm import Fapm, FapmOptions
from models.methods.fapm.regions import sources
from tests.models.banks import (
    Bank,
    StagedBank,
    Stages,
    as_positions,
    draw_bank,
    fitted,
    seeded,
    told,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
fapm = functools.partial(fitted, "fapm", regions=2)
ALL = {"near_ratio": 1.0, "far_ratio": 1.0}
CHANNELS, SIDES = (5, 3), ((10, 7), (5, 4))


def draw_stages(count, seed=1, channels=CHANNELS, sides=SIDES):
    generator = seeded(seed)
    return [
        torch.randn(count, C, H, W, generator=generator)
        for C, (H, W) in zip(channels, sides, strict=True)
    ]


def staged(bank, channels=CHANNELS, **options):
    detector = Fapm(Stages(*channels), FapmOptions(**options))
    detector.fit(bank, generator=seeded())
    return detector.eval()


def reference(normal, queries, regions, count):
    """Map and score of each image by a loop over positions, with all normal features; float64."""
    B, (H, W) = len(queries[0]), queries[0].shape[2:]
    total = np.zeros((B, H, W, count))
    for train, test in zip(normal, queries, strict=True):
        train, test = train.double().numpy(), test.double().numpy()
        _, _, h, w = test.shape
        rows = np.array_split(np.arange(h), min(regions, h))
        cols = np.array_split(np.arange(w), min(regions, w))
        found = np.zeros((B, h, w, count))
        for b, y, x in np.ndindex(B, h, w):
            (row,) = [part for part in rows if y in part]
            (col,) = [part for part in cols if x in part]
            memory = train[:, :, row][:, :, :, col]  # (N, C, rows, cols)
            offsets = memory - test[b, :, y, x][None, :, None, None]
            found[b, y, x] = np.sort(np.sqrt((offsets**2).sum(axis=1)).ravel())[:count]
        for y, x in np.ndindex(H, W):
            total[:, y, x] += found[:, y * h // H, x * w // W]
    scores = []
    for one in total:
        neighbours = one.reshape(-1, count)[one[..., 0].argmax()]
        weight = 1 - softmax(neighbours).max() if count > 1 else 1
        scores.append(weight * neighbours[0])
    return total[..., 0], scores


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("regions", [1, 3, 7])
def test_equals_a_loop_over_positions(regions, count):
    """On grids that do not split evenly, and where one has fewer positions than regions."""
    normal, queries = draw_stages(5), [2 * m for m in draw_stages(3, seed=2)]
    detector = staged(StagedBank(normal), regions=regions, num_neighbors=count, **ALL)
    maps, scores = detector.score_stages(queries)
    wanted_maps, wanted = reference(normal, queries, regions, count)
    np.testing.assert_allclose(maps, wanted_maps, rtol=1e-5)
    np.testing.assert_allclose(scores, wanted, rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_normal_feature_in_its_region_is_no_anomaly_and_beyond_it_is_one(offset):
    bank = draw_bank(count=6, side=6)
    bank.features += offset
    detector = fapm(bank, **ALL)
    assert detector(bank.features).max() == 0
    assert detector(bank.features.flip(3)).min() > 0.01


def test_the_memory_is_the_beginning_of_a_greedy_choice():
    bank = draw_bank(count=9, channels=4)
    detector = fapm(bank, regions=1, near_ratio=0.1)
    positions = as_positions(bank.features)
    chosen = greedy_k_centre(positions, 45, generator=seeded())[:22]
    (part,) = detector.memories
    torch.testing.assert_close(part.memory + part.shift, positions[chosen])


def radii(features, ratio):
    """Largest distance to the nearest of the small coreset in each of 2 x 2 regions, by hand."""
    found = []
    generator = seeded()
    for rows in (slice(0, 3), slice(3, 6)):
        for cols in (slice(0, 3), slice(3, 6)):
            points = as_positions(features[:, :, rows, cols])
            order = greedy_k_centre(points, int(2 * ratio * len(points)), generator=generator)
            near = points[order[: int(ratio * len(points))]]
            found.append(float(torch.cdist(points, near).amin(dim=1).max()))
    return found


def test_regions_whose_radius_is_above_the_mean_get_the_large_memory():
    bank = draw_bank(count=20, side=6)
    bank.features[:, :, :3, 3:] *= 4  # the second region varies most
    detector = fapm(bank)
    (part,) = detector.memories
    sizes = part.squares.view(4, -1).isfinite().sum(dim=1)
    found = radii(bank.features, 0.1)
    assert [r > np.mean(found) for r in found] == [False, True, False, False]
    assert sizes.tolist() == [18, 36, 18, 18]
    assert part.count == 90
    assert detector.remarks[0].endswith("stage by stage: 1 of 4.")
    assert told(detector, bank) == [{"memory": 90}]


def test_equal_regions_are_all_near():
    features = draw_bank(count=20, side=3).features
    detector = fapm(Bank(features.repeat(1, 1, 2, 2)), near_ratio=1.0, far_ratio=1.0)
    assert "0 of 4" in detector.remarks[0]


def test_coarse_positions_are_repeated_where_they_lie_or_as_released():
    """One region of 4 x 4 positions over 2 x 2: quarters, or rows."""
    where_they_lie = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert sources((2, 2), (4, 4), (1, 1), released=False) == where_they_lie
    rows = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert sources((2, 2), (4, 4), (1, 1), released=True) == rows
    # In two regions beside each other the rows end where a region does.
    found = np.reshape(sources((2, 4), (4, 8), (1, 2), released=True), (4, 8))
    assert found[1].tolist() == [1] * 4 + [3] * 4
    assert found[2].tolist() == [4] * 4 + [6] * 4


def test_the_released_order_moves_what_the_coarse_stage_finds():
    sides = ((8, 8), (4, 4))
    normal, queries = draw_stages(6, sides=sides), draw_stages(1, seed=2, sides=sides)
    queries[1][:, :, 0, 1] += 50  # upper right quarter of the first region
    plain, released = (
        staged(StagedBank(normal), regions=2, released=released) for released in (False, True)
    )
    where = [(d.score_stages(queries)[0][0] > 40).nonzero().tolist() for d in (plain, released)]
    assert where[0] == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert where[1] == [[1, 0], [1, 1], [1, 2], [1, 3]]


def test_large_distances_do_not_overflow():
    bank, queries = draw_bank(count=9, side=4), 1e4 * draw_bank(count=5, side=4, seed=2).features
    maps, scores = fapm(bank, **ALL).score(queries)
    wanted_maps, wanted = reference([bank.features], [queries], 2, 4)
    np.testing.assert_allclose(maps, wanted_maps, rtol=1e-5)
    np.testing.assert_allclose(scores, wanted, rtol=0.05, atol=1e-6)  # float32 of differences
    assert scores.isfinite().all()
    assert (scores > 0).any()


def test_weights_that_outweigh_the_distances_are_remarked():
    bank = draw_bank(count=9, side=4)
    assert len(fapm(Bank(bank.features / 10)).remarks) == 1
    _, weights = fapm(Bank(20 * bank.features)).remarks
    assert "are large for a softmax" in weights
    assert "and 0.75 where" in weights
    assert len(fapm(Bank(20 * bank.features), num_neighbors=1).remarks) == 1


def test_a_fit_in_many_readings_is_the_same(monkeypatch):
    bank = StagedBank(draw_stages(9))
    whole = staged(bank, regions=3)
    readings = []
    read = module.Fapm._read
    monkeypatch.setattr(module, "HELD", 1)
    monkeypatch.setattr(module, "READ", 2)
    monkeypatch.setattr(module.Fapm, "_read", lambda *a: readings.append(len(a[2])) or read(*a))
    parts = staged(bank, regions=3)
    assert readings == [1] * 6  # three rows of regions in each of two stages
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name])


@pytest.mark.parametrize(("product", "rows"), [(1, 1), (10**9, 200), (200, 10**9)])
def test_scores_do_not_depend_on_the_size_of_products(monkeypatch, product, rows):
    detector, queries = staged(StagedBank(draw_stages(9)), regions=3), draw_stages(3, seed=2)
    wanted = detector.score_stages(queries)
    monkeypatch.setattr(searching, "PRODUCT", product)
    monkeypatch.setattr(searching, "ROWS", rows)
    for one, other in zip(detector.score_stages(queries), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_fill_a_memory_up():
    """Where fewer features differ than neighbours are wanted, copies are as near."""
    features = draw_bank(count=1, side=2).features.repeat(6, 1, 1, 1)
    detector = fapm(Bank(features))
    maps, scores = detector.score(features[:1] + 2)
    torch.testing.assert_close(maps, torch.full((1, 2, 2), 2 * 6**0.5))
    torch.testing.assert_close(scores, 0.75 * maps.amax(dim=(1, 2)))  # four equal distances


def test_what_is_normal_elsewhere_is_found():
    """Left and right differ; PatchCore finds the right features on the left normal."""
    bank, test = draw_bank(count=20, side=6), draw_bank(count=16, side=6, seed=2)
    for features in (bank.features, test.features):
        features[:, :, :, 3:] += 4
    test.features[8:, :, 1, 1] = draw_bank(count=8, side=6, seed=3).features[:, :, 1, 4] + 4
    labels = [0] * 8 + [1] * 8
    ours = roc_auc_score(labels, fapm(bank).score(test.features)[1])
    theirs = roc_auc_score(labels, fitted("patchcore", bank).score(test.features)[1])
    assert ours > 0.95
    assert theirs < 0.75


def test_pooled_features_are_one_region():
    bank, queries = draw_bank(count=30, side=1), draw_bank(count=5, side=1, seed=2).features
    detector = fapm(bank, **ALL)
    maps, scores = detector.score(queries)
    wanted_maps, wanted = reference([bank.features], [queries], 1, 4)
    np.testing.assert_allclose(maps, wanted_maps, rtol=1e-5)
    np.testing.assert_allclose(scores, wanted, rtol=1e-4)
    assert not any("Regions" in remark for remark in detector.remarks)


def test_a_graph_takes_any_batch():
    graph = staged(StagedBank(draw_stages(9)), regions=3).exported().eval()
    with torch.no_grad():
        traced = torch.jit.trace(graph, (draw_stages(2),), check_trace=False)
        for batch in (1, 5):
            queries = draw_stages(batch, seed=batch)
            for found, wanted in zip(traced(queries), graph(queries), strict=True):
                torch.testing.assert_close(found, wanted)


def test_too_few_features_in_a_region_are_refused():
    with pytest.raises(ModelError, match="the smallest has 3") as caught:
        fapm(draw_bank(count=3, side=2))
    assert caught.value.change == {"num_neighbors": "lower", "regions": "lower"}


def test_a_grid_with_fewer_positions_than_regions_is_refused():
    detector = fapm(draw_bank(side=5), regions=5)
    with pytest.raises(ModelError, match="5 x 5 regions, the features have 4 x 4"):
        detector(draw_bank(side=4).features)


def test_the_large_memory_is_no_smaller():
    with pytest.raises(ValueError, match=r"far-ratio 0\.05 must be at least --method\.near-ratio"):
        replace(FapmOptions(), far_ratio=0.05)
