"""Contrast vectors against a loop over positions."""

import numpy as np
import pytest
import torch

from utils.discovery.contrast import (
    contrasts,
    standard_of,
    surroundings,
    turned,
    whatever_way_up,
    whole_images,
)


@pytest.fixture
def stages():
    generator = torch.Generator().manual_seed(0)
    return [
        3 + 2 * torch.randn(5, 4, 8, 8, generator=generator),
        torch.randn(5, 6, 4, 4, generator=generator),
    ]


def halves(stages):
    return ([stage[:2] for stage in stages], [stage[2:] for stage in stages])


def test_the_standard_is_that_of_all_positions(stages):
    standard = standard_of(halves(stages))
    for stage, mean, deviation in zip(stages, standard.means, standard.deviations, strict=True):
        values = stage.permute(1, 0, 2, 3).flatten(1)
        assert torch.allclose(mean, values.mean(1), atol=1e-5)
        assert torch.allclose(deviation, values.std(1, correction=0), atol=1e-4)


def by_hand(stage, row, inside, around, mean, deviation):
    """One image's contrast; masks (8, 8) are averaged over the pixels of each position."""
    block = 8 // stage.shape[-1]
    sums = {}
    for what, weights in (("inside", inside), ("around", around)):
        total, weight = torch.zeros(stage.shape[1]), 0.0
        for y in range(stage.shape[2]):
            for x in range(stage.shape[3]):
                share = weights[block * y : block * (y + 1), block * x : block * (x + 1)].mean()
                total += share * (stage[row, :, y, x] - mean) / deviation
                weight += float(share)
        sums[what] = total / weight if weight else torch.zeros_like(total)
    difference = sums["inside"] - sums["around"]
    return difference / difference.norm()


def test_contrasts_are_those_of_a_loop(stages):
    standard = standard_of([stages])
    inside, around = torch.zeros(5, 8, 8), torch.zeros(5, 8, 8)
    inside[:, 2:5, 3:6] = torch.rand(5, 3, 3, generator=torch.Generator().manual_seed(1))
    around[:, 0:2] = 1
    around[4] = 0  # nothing around: the contrast is to the mean of normal images
    found = contrasts(stages, inside, around, standard)
    for row in range(5):
        expected = [
            by_hand(stage, row, inside[row], around[row], mean, deviation)
            for stage, mean, deviation in zip(
                stages, standard.means, standard.deviations, strict=True
            )
        ]
        assert torch.allclose(found[row], torch.cat(expected), atol=1e-4)


def test_each_stage_has_unit_length_and_nothing_inside_is_zero(stages):
    inside = torch.zeros(5, 8, 8)
    inside[:4, 1:3, 1:3] = 1
    found = contrasts(stages, inside, torch.zeros(5, 8, 8), standard_of([stages]))
    lengths = torch.stack([part.norm(dim=1) for part in found.split([4, 6], dim=1)])
    assert torch.allclose(lengths[:, :4], torch.ones(2, 4), atol=1e-5)
    assert found[4].abs().max() == 0


def test_what_a_defect_lies_on_is_taken_off(stages):
    """The same change on two grounds is one vector, the ground far from normal or not."""
    standard = standard_of([stages])
    grounds = [torch.zeros(2, stage.shape[1], *stage.shape[2:]) for stage in stages]
    for ground in grounds:
        ground[1] += 7
        ground[:, 0, : ground.shape[2] // 2] += 1
    inside, around = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    inside[:, :4], around[:, 4:] = 1, 1
    found = contrasts(grounds, inside, around, standard)
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_surroundings_are_a_ring_beyond_a_gap():
    mask = np.zeros((100, 100), dtype=bool)
    mask[40:60, 40:60] = True
    ring = surroundings(mask, 0.1)
    (rows,) = ring[:, 50].nonzero()
    assert rows.tolist() == [*range(28, 38), *range(62, 72)]
    assert not surroundings(np.ones((20, 20), dtype=bool), 0.1).any()
    assert not surroundings(mask, 0.0).any()


def test_whole_images_are_standardised_averages(stages):
    standard = standard_of([stages])
    found = whole_images(stages, standard)
    first = (stages[0].mean((2, 3)) - standard.means[0]) / standard.deviations[0]
    assert torch.allclose(found[:, :4], first / first.norm(dim=1, keepdim=True), atol=1e-5)


def test_a_defect_is_the_same_whichever_way_it_lies():
    """Of a backbone that sees rows and columns differently."""
    kernel = torch.tensor([[1.0, 0, -1]])[None, None]

    def stage(images):
        rows = torch.nn.functional.conv2d(images[:, None], kernel, padding=(0, 1))
        columns = torch.nn.functional.conv2d(images[:, None], kernel.mT, padding=(1, 0))
        return torch.cat([rows.square(), 3 * columns.square(), images[:, None]], dim=1)

    bars = torch.zeros(2, 16, 16)
    bars[0, 6:9, 2:14] = 1
    bars[1] = torch.rot90(bars[0])
    inside = (bars > 0).float()
    standard = standard_of([[stage(torch.rand(20, 16, 16))]])
    once = contrasts([stage(bars)], inside, 1 - inside, standard)
    assert (once[0] - once[1]).norm() > 0.1
    every = [
        contrasts([stage(turned(bars, i))], turned(inside, i), 1 - turned(inside, i), standard)
        for i in range(4)
    ]
    found = whatever_way_up(every, [3])
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found.norm(dim=1), torch.ones(2))
