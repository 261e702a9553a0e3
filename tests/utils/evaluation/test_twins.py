"""Near-duplicates are found across exposure, noise and small shifts, and nothing else is."""

import pytest
import torch
import torch.nn.functional as F

from tests.utils.banks import bank_of
from utils.evaluation.twins import FEWEST, alike, find_twins
from utils.features.thumbnails import thumbnails


def photographs(count, seed):
    """Different objects in one frame, (N, 3, 64, 64) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 12, 12, generator=generator)
    frame = torch.zeros(1, 1, 64, 64)
    frame[..., 8:56, 8:56] = 60
    grey = 90 + frame + 25 * F.interpolate(coarse, 64, mode="bicubic")
    noise = torch.randn(count, 1, 64, 64, generator=generator)
    return (grey + 3 * noise).clamp(0, 255).byte().expand(-1, 3, -1, -1)


def again(images, *, gain=1.0, noise=0.0, shift=0):
    moved = images.float().roll(shift, dims=3) * gain
    moved += noise * torch.randn(moved.shape, generator=torch.Generator().manual_seed(9))
    return moved.clamp(0, 255).byte()


@pytest.mark.parametrize(
    "changes", [{}, {"gain": 0.6}, {"noise": 5.0}, {"shift": 1}, {"gain": 1.2, "noise": 3.0}]
)
def test_the_same_object_photographed_again_is_found(changes):
    train, test = photographs(60, 0), photographs(30, 1)
    mixed = torch.cat([test, again(train[10:15], **changes)])
    twins = alike(thumbnails(mixed), thumbnails(train))
    assert [(twin.place, twin.other) for twin in twins] == [(30 + n, 10 + n) for n in range(5)]
    assert all(0.96 < twin.correlation <= 1 for twin in twins)


def test_different_objects_are_no_twins_though_their_frame_is_the_same():
    assert alike(thumbnails(photographs(80, 1)), thumbnails(photographs(60, 0))) == []


def test_where_all_are_alike_or_flat_none_is_a_twin():
    same = again(photographs(1, 0).expand(60, -1, -1, -1), noise=4.0)
    assert alike(thumbnails(same[:20]), thumbnails(same[20:])) == []
    flat = torch.full((40, 3, 64, 64), 7, dtype=torch.uint8)
    assert alike(thumbnails(flat), thumbnails(flat)) == []


def test_few_images_tell_nothing():
    train = thumbnails(photographs(FEWEST - 1, 0))
    assert alike(train, train) == []
    assert alike(train[:0], thumbnails(photographs(20, 0))) == []


def test_thumbnails_are_the_mean_of_the_green_channel():
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[0, 1, :2, :2] = torch.tensor([[10, 20], [30, 40]])
    images[0, 0] = 99
    small = thumbnails(images)
    assert small.shape == (1, 32, 32)
    assert small[0, 0, 0] == 25
    assert small.sum() == 25


def bank(images, maps):
    found = bank_of(maps)
    found.thumbnails = thumbnails(images)
    return found


def test_features_tell_objects_that_only_stand_alike():
    train, test = photographs(60, 0), photographs(30, 1)
    mixed = torch.cat([test, again(train[10:12], gain=0.8)])
    generator = torch.Generator().manual_seed(2)
    maps, others = (torch.randn(n, 16, 4, 4, generator=generator) for n in (60, 32))
    others[30] = maps[10] + 0.3 * others[30]  # the same details; of the last, others
    twins = find_twins(bank(mixed, others), bank(train, maps))
    assert [(twin.place, twin.other) for twin in twins] == [(30, 10)]
