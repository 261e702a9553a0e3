"""The local closed form against its formulas, awkward data, and its own promises."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from models.building import build_detector
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.noco_cf import mixture as module
from models.methods.noco_cf.mixture import Mixture, Shape, blocks, most_centres
from models.methods.noco_cf.noco_cf import NocoCf, NocoCfOptions
from tests.models.banks import Bank, StagedBank, Stages, seeded

D = 6
PLAIN = {"filter": "ridge", "ridge": 0.1, "shrinkage": 20.0, "parents": 0}
STAGES = (3, 5, 4, 7)
SIDES = (8, 4, 2, 1)


def shape(**changes):
    return Shape(**PLAIN | {"has_levels": True, "nearest": 3} | changes)


def groups(count, channels=D, seed=0):
    """Features around a few means, of unequal variances."""
    generator = seeded(seed)
    means = 4 * torch.randn(5, channels, generator=seeded(7))
    scales = torch.logspace(0, -1, channels)
    owner = torch.randint(5, (count,), generator=generator)
    return means[owner] + torch.randn(count, channels, generator=generator) * scales


def mixture_of(features, count=8, **changes):
    mixture = Mixture(features.shape[1], shape(**changes))
    mixture.start(features, count, seeded())
    mixture.add(features)
    mixture.solve()
    return mixture


def stages_of(count, seed=1):
    generator = seeded(seed)
    return [
        torch.randn(count, channels, side, side, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        for channels, side in zip(STAGES, SIDES, strict=True)
    ]


def fitted(stages, **options):
    detector = NocoCf(FeatureShape(STAGES), NocoCfOptions(**{"prototypes": 4} | options))
    detector.fit(StagedBank(stages), generator=seeded())
    return detector


def by_hand(mixture, features, probe):
    """The energies of one feature at all centres, in float64, from the definition."""
    options = mixture.shape
    centres = mixture.centres.double()
    owner = torch.cdist(features.double(), centres).argmin(dim=1)
    sums = torch.stack(
        [(x := features[owner == k].double() - centres[k]).T @ x for k in range(len(centres))]
    )
    counts = torch.bincount(owner, minlength=len(centres)).double()
    pool = sums.sum(dim=0) / len(features)
    ridge = options.ridge * pool.trace() / len(pool)
    energies, levels = [], []
    for k, centre in enumerate(centres):
        moment = (sums[k] + options.shrinkage * pool) / (counts[k] + options.shrinkage)
        loaded = moment + ridge * torch.eye(len(pool))
        offset = probe.double() - centre
        if options.filter == "ridge":
            energies.append(offset @ torch.linalg.solve(loaded, offset))
        else:
            gain = torch.linalg.matrix_exp(-moment / (2 * ridge)) / ridge.sqrt()
            energies.append((gain @ offset).square().sum())
        levels.append(torch.logdet(loaded))
    levels = torch.stack(levels)
    return torch.stack(energies) + options.has_levels * (levels - levels.min())


@pytest.mark.parametrize(
    "changes",
    [{}, {"filter": "flow"}, {"has_levels": False}, {"nearest": 1}, {"shrinkage": 0.0}],
    ids=str,
)
def test_energies_are_those_of_the_definition(changes):
    features, probes = groups(600), 1.5 * groups(20, seed=3)
    mixture = mixture_of(features, **changes)
    found = mixture(probes)
    for probe, energy in zip(probes, found.tolist(), strict=True):
        distances, order = (mixture.centres - probe).double().square().sum(dim=1).sort()
        nearest = mixture.shape.nearest
        kept = (distances[nearest] - distances) / (distances[nearest] - distances[0])
        energies = by_hand(mixture, features, probe)[order] + 0.1 * D * (1 / kept - 1)
        wanted = energies[:nearest].min()
        assert energy == pytest.approx(wanted.item(), rel=2e-4)


def test_energies_do_not_jump_where_another_centre_becomes_the_third():
    """Along a line between features, steps of the energies shrink with those of the features."""
    features = groups(600)
    mixture = mixture_of(features, 12)
    far = (features - features[0]).norm(dim=1).argmax()
    largest = []
    for count in (1_000, 100_000):
        line = torch.lerp(features[0], features[far], torch.linspace(0, 1, count).unsqueeze(1))
        near = torch.cdist(line, mixture.centres).topk(3, largest=False).indices.sort(dim=1).values
        assert (near[1:] != near[:-1]).any()
        largest.append(mixture(line).diff().abs().max().item())
    assert largest[1] < 0.1 * largest[0]


def test_a_flat_background_has_one_centre():
    """Its features differ by rounding alone: several centres there would differ by chance."""
    flat = 5 + 1e-3 * torch.randn(3000, D, generator=seeded(1))
    features = torch.cat([flat, groups(600)])
    mixture = mixture_of(features, 64)
    on_flat = (mixture.centres - 5).norm(dim=1) < 0.1
    assert on_flat.sum() == 1
    assert len(mixture.centres) > 8
    again = flat + 1e-3 * torch.randn(3000, D, generator=seeded(2))
    assert mixture(again).max() < mixture(groups(600)).median()


def test_parents_stand_between_a_centre_and_the_pool():
    features = groups(900)
    plain, grouped = (mixture_of(features, 12, parents=p, shrinkage=50.0) for p in (0, 3))
    assert torch.equal(plain.centres, grouped.centres)
    assert len(grouped.groups.unique()) == 3
    assert not torch.allclose(plain.filters, grouped.filters, rtol=1e-3)
    # With all centres in one group, the parent is the pool, be it shrunk to itself or not.
    alone = mixture_of(features, 12, parents=1, shrinkage=50.0)
    assert torch.equal(plain.filters, alone.filters)


def test_flow_and_ridge_agree_where_little_varies():
    """Both gains on a variance v, in units of 1 / lambda: 1 - v / lambda + O(v^2)."""
    ratio = torch.tensor([1e-3, 1e-2, 0.1])
    torch.testing.assert_close(torch.exp(-ratio), 1 / (1 + ratio), rtol=6e-3, atol=0)
    features = groups(600)
    ridge, flow = (mixture_of(features, filter=f, ridge=50.0)(features) for f in ("ridge", "flow"))
    torch.testing.assert_close(ridge, flow, rtol=1e-2, atol=1e-3)


def test_levels_let_a_flat_region_and_a_busy_one_compare():
    flat, busy = 0.01 * torch.randn(400, D, generator=seeded(1)), torch.randn(400, D) + 20
    features = torch.cat([flat, busy])
    off_flat = torch.full((1, D), 0.3)
    with_levels, without = (
        mixture_of(features, 2, has_levels=h, shrinkage=0.0, ridge=1e-4) for h in (True, False)
    )
    assert with_levels.levels.max() > 10
    assert not without.levels.any()
    assert (with_levels(flat).mean() < with_levels(busy).mean()).item()
    assert with_levels(off_flat) > with_levels(busy).max()


@pytest.mark.parametrize("count", [1, 7, 300])
def test_blocks_hold_every_feature_once_with_its_centre(count):
    owner = torch.randint(5, (count,), generator=seeded())
    rows, centre, slots = blocks(owner, 5)
    held = rows[rows < count]
    assert held.sort().values.tolist() == list(range(count))
    for block, k in zip(rows, centre.tolist(), strict=True):
        assert (owner[block[block < count]] == k).all()
    assert torch.equal(rows.flatten()[slots], torch.arange(count))


def test_parts_and_single_products_change_no_score(monkeypatch):
    features, probes = groups(700), groups(90, seed=2)
    wanted = mixture_of(features)(probes)
    for name, value in (("AT_ONCE", 1), ("LARGEST", 16), ("TOGETHER", 1), ("DISTANCES", 1)):
        monkeypatch.setattr(module, name, value)
        torch.testing.assert_close(mixture_of(features)(probes), wanted, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "_is_batched", lambda _: False)
    torch.testing.assert_close(mixture_of(features)(probes), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "positions", "channels", "wanted"),
    [
        (128, 600_000, 40, 128),
        (128, 1960, 320, 6),
        (128, 49, 320, 1),
        (1, 600_000, 40, 1),
        (128, 1_000_000, 2000, 4),  # more would take more than 64 MiB
    ],
)
def test_centres_follow_the_data(asked, positions, channels, wanted):
    assert most_centres(asked, positions, channels) == wanted


def test_few_features_are_told():
    assert fitted(stages_of(9)).remarks == [
        "Centres by stage: 4, 4, 4, 1. Some of 4 would have too few normal features, or be where "
        "another one is."
    ]
    assert fitted(stages_of(9), prototypes=1).remarks == []


AWKWARD = {
    "one image": stages_of(1),
    "equal images": [stage[:1].repeat(6, 1, 1, 1) for stage in stages_of(1)],
    "constant channels": [stage * (torch.arange(stage.shape[1]) % 2)[:, None, None] + 3
                          for stage in stages_of(6)],
    "zeros": [torch.zeros_like(stage) for stage in stages_of(4)],
    "large": [1e4 * stage for stage in stages_of(6)],
    "one stage varies": [s if i == 1 else torch.ones_like(s) for i, s in enumerate(stages_of(6))],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ridge", "flow"])
@pytest.mark.parametrize("stages", AWKWARD.values(), ids=AWKWARD)
def test_awkward_data_give_finite_scores_that_see_a_change(stages, kind):
    detector = fitted(stages, filter=kind)
    maps, images = detector.score_stages(stages)
    assert maps.isfinite().all()
    assert images.isfinite().all()
    changed = [stage + 1 + stage.abs().max() for stage in stages]
    other_maps, other_images = detector.score_stages(changed)
    assert other_images.isfinite().all()
    assert (other_images > images.max()).all()
    assert other_maps.isfinite().all()
    assert other_maps.mean() > maps.mean()


@pytest.mark.parametrize("channels", [8, 2000])
def test_few_and_many_channels(channels):
    bank = Bank(torch.randn(5, channels, 3, 3, generator=seeded()))
    detector = NocoCf(FeatureShape((channels,)), NocoCfOptions())
    detector.fit(bank, generator=seeded())
    assert detector(bank.features).isfinite().all()


def test_scores_do_not_depend_on_the_scale_of_features():
    stages, probes = stages_of(8), stages_of(3, seed=5)
    one = fitted(stages).score_stages(probes)
    other = fitted([1000 * s for s in stages]).score_stages([1000 * s for s in probes])
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_coarsest_stage_counts_for_the_image_alone():
    stages, probes = stages_of(9), stages_of(3, seed=5)
    detector = fitted(stages)
    assert (detector.num_averaged, detector.num_context) == (1, 1)
    maps, images = detector.score_stages(probes)
    assert maps.shape == (3, 4, 4)  # the grid of the second stage
    probes[3] = probes[3] + 50
    same, higher = detector.score_stages(probes)
    assert torch.equal(same, maps)
    assert (higher > images + 1).all()


@pytest.mark.parametrize(("count", "wanted"), [(1, (0, 0)), (2, (0, 0)), (3, (0, 1)), (4, (1, 1))])
def test_two_stages_always_stay_for_the_map(count, wanted):
    detector = NocoCf(FeatureShape(STAGES[:count]), NocoCfOptions())
    assert (detector.num_averaged, detector.num_context) == wanted


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_an_images_score_is_the_mean_of_its_highest_positions(share):
    detector = fitted(stages_of(9), context=0, averaged=0, top_share=share)
    maps, images = detector.score_stages(stages_of(3, seed=5))
    count = max(1, round(share * 64))
    wanted = np.sort(maps.flatten(1).numpy())[:, -count:].mean(axis=1)
    np.testing.assert_allclose(images.numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("feature_norm", ["none", "l2"])
def test_learning_online_equals_refitting_on_the_same_centres(feature_norm):
    stages, probes = stages_of(12), stages_of(3, seed=5)
    options = NocoCfOptions(prototypes=4, feature_norm=feature_norm)
    whole, online = (build_detector("noco_cf", Stages(*STAGES), options) for _ in range(2))
    for detector, size in ((whole, 12), (online, 1)):
        detector.start(seeded())
        detector.partial_fit([s[:4] for s in stages])  # these give the centres
        for rows in torch.arange(4, 12).split(size):
            detector.partial_fit([s[rows] for s in stages])
            detector.solve()
            assert detector.score_stages(probes)[0].isfinite().all()
    for ours, theirs in zip(online.score_stages(probes), whole.score_stages(probes), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    online.start(seeded())
    with pytest.raises(ModelError, match="fit first"):
        online.solve()


PROGRAM = """
import sys, torch
from tests.models.methods.test_noco_cf import fitted, stages_of
torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(3)
stages = [s.repeat(6, 1, 4, 4).contiguous(memory_format=torch.channels_last) for s in stages_of(20)]
stages = [s + torch.randn(s.shape, generator=generator) for s in stages]
found = fitted(stages, prototypes=16).score_stages(stages)
print([part.double().sum().item().hex() for part in found], found[0].flatten()[7].item().hex())
"""


def test_threads_change_no_bit():
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(n)], check=True, capture_output=True, text=True
        ).stdout
        for n in (1, 2, 3)
    ]
    assert said[0]
    assert said[0] == said[1] == said[2]
