"""Images that were cut into windows are scored as whole images."""

import pytest
import torch
from einops import rearrange
from torch import Tensor

from configs.tiles import Tiling
from datasets.reading.tiles import cut
from models.detector import Detector
from tests.models.banks import seeded
from tests.utils.banks import bank_of
from utils.evaluation.scoring import (
    Scoring,
    part_maps,
    reconstructions,
    score_all,
    score_all_steps,
)

TILING = Tiling(image_size=20, tile_size=8, per_side=3)


class Everything(Detector):
    """A head that can do all that a head may, of windows of one channel."""

    part_names = ("bright", "dark")

    def __init__(self, *, own=False, final=False):
        super().__init__()
        self.own = own
        self.final_maps = final
        self.seen: list[int] = []

    def score(self, features: Tensor):
        self.seen.append(len(features))
        maps = features[:, 0]
        return maps, (maps.flatten(1).mean(1) if self.own else None)

    def score_parts(self, stages):
        return [stages[0][:, 0], -stages[0][:, 0]]

    def geometry(self, stages, maps):
        return maps.flatten(1).amax(1), stages[0].flatten(1).mean(1)

    def steps(self):
        return [{}, {}]

    def score_steps(self, stages):
        return torch.stack([stages[0][:, 0], 2 * stages[0][:, 0]])

    def reconstruct(self, images):
        return 255 - images.to(torch.uint8)


@pytest.fixture
def images():
    return torch.rand(5, 1, 20, 20, generator=seeded(0))


def scoring(**changes):
    return Scoring(20, 0.0, 4, tiling=TILING, **changes)


def test_maps_are_of_the_whole_image_and_scores_their_maximum(images):
    detector = Everything()
    scores = score_all(detector, bank_of(cut(images, TILING)), scoring())
    torch.testing.assert_close(scores.maps, images[:, 0].half().float(), rtol=0, atol=1e-3)
    assert torch.equal(scores.images, scores.maps.amax((1, 2)))
    assert max(detector.seen) == 4  # windows at once, of nine an image has
    assert sum(detector.seen) == 5 * 9


def test_maps_that_come_final_are_blended_but_not_blurred(images):
    bank = bank_of(cut(images, TILING))
    final = score_all(Everything(final=True), bank, Scoring(20, 4.0, 4, tiling=TILING))
    torch.testing.assert_close(final.maps, images[:, 0], rtol=0, atol=1e-3)
    blurred = score_all(Everything(), bank, Scoring(20, 4.0, 4, tiling=TILING))
    assert blurred.maps.std() < final.maps.std() / 3


def test_a_methods_own_score_is_that_of_the_worst_window(images):
    bank = bank_of(cut(images, TILING))
    scores = score_all(Everything(own=True), bank, scoring())
    means = torch.stack([images[:, 0, r, c].mean((1, 2)) for r, c in TILING.windows])
    torch.testing.assert_close(scores.images, means.amax(0), rtol=0, atol=1e-3)


def test_geometry_is_that_of_the_window_with_the_highest_map(images):
    bank = bank_of(cut(images, TILING))
    scores = score_all(Everything(), bank, scoring(), geometry=True)
    parts = torch.stack([images[:, 0, r, c].flatten(1) for r, c in TILING.windows])  # (T, N, P)
    highest = parts.amax(2).argmax(0)  # (N,)
    means = parts.mean(2).gather(0, highest[None])[0]
    torch.testing.assert_close(scores.norms, images.flatten(1).amax(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(scores.angles, means, rtol=0, atol=1e-3)


def test_parts_and_steps_are_of_the_whole_image_too(images):
    bank = bank_of(cut(images, TILING))
    bright, dark = part_maps(Everything(), bank, scoring())
    torch.testing.assert_close(bright, images[:, 0], rtol=0, atol=1e-3)
    torch.testing.assert_close(dark, -images[:, 0], rtol=0, atol=1e-3)
    once, twice = score_all_steps(Everything(), bank, scoring(stride=2))
    torch.testing.assert_close(once.maps, images[:, 0, ::2, ::2], rtol=0, atol=1e-3)
    torch.testing.assert_close(twice.images, 2 * once.images)


def test_reconstructions_are_put_together():
    images = torch.randint(256, (3, 3, 20, 20), generator=seeded(1), dtype=torch.uint8)
    bank = bank_of(cut(images, TILING))
    found = reconstructions(Everything(), bank, scoring())
    assert torch.equal(found, 255 - rearrange(images, "n c h w -> n h w c"))
