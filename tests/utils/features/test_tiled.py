"""Windows of images, from the loader to the heads: each is seen once, as itself."""

import pytest
import torch
from einops import rearrange

from configs.tiles import Tiling
from datasets.reading.loading import ArrayDataset, BatchLoader
from datasets.reading.tiles import TiledImages, cut
from datasets.reading.transforms import PairTransform
from models.backbone.raw_images import RawImages
from tests.models.banks import seeded
from utils.features import tiled
from utils.features.extraction import extract_features
from utils.features.features import windows_of
from utils.features.thumbnails import thumbnails
from utils.features.tiled import of_windows, whole_stages

TILING = Tiling(image_size=22, tile_size=8, per_side=3)  # by 7 pixels: one is shared
T = TILING.count
COUNT = 7


@pytest.fixture
def images():
    """Seven images of 22 x 22 pixels, no two pixels' neighbourhoods alike."""
    return torch.randint(256, (COUNT, 22, 22, 3), dtype=torch.uint8, generator=seeded(0)).numpy()


def features_of(images, cache, *, batch_size=20, fails_at=()):
    whole = ArrayDataset(images, PairTransform(22, None, "opencv_square"))
    if fails_at:
        read = whole.__getitem__
        broken = type(
            "Broken",
            (ArrayDataset,),
            {"__getitem__": lambda _, i: (i, "broken") if i in fails_at else read(i)},
        )
        whole = broken(images, whole.transform)
    loader = BatchLoader(
        TiledImages(whole, TILING), batch_size=batch_size, workers=0, skip_unreadable=bool(fails_at)
    )
    return extract_features(RawImages(None), loader, cache=cache, description="images")


def windows(images):
    """All windows (N * T, 3, 8, 8), those of an image next to each other."""
    given = rearrange(torch.from_numpy(images), "n h w c -> n c h w")
    return torch.cat([given[i : i + 1, :, r, c] for i in range(COUNT) for r, c in TILING.windows])


@pytest.mark.parametrize("cache", ["host", "none"])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_a_fit_reads_every_window_in_order(images, cache, batch_size, monkeypatch):
    monkeypatch.setattr(tiled, "POOL", 20)  # two images at once
    source = of_windows(features_of(images, cache), T)
    assert len(source) == COUNT * T
    found = list(source.batches(batch_size))
    assert {len(batch) for batch in found[:-1]} <= {batch_size}
    assert torch.equal(torch.cat(found).byte(), windows(images))
    (last,) = next(iter(source.stage_batches(1000)))
    assert torch.equal(last, windows(images))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_shuffled_windows_are_all_there_once_and_follow_the_seed(images, batch_size, monkeypatch):
    monkeypatch.setattr(tiled, "POOL", 20)
    stored, streamed = (of_windows(features_of(images, cache), T) for cache in ("host", "none"))
    first = list(stored.batches(batch_size, generator=seeded(1)))
    together = torch.cat(first)
    assert {len(batch) for batch in first[:-1]} <= {batch_size}
    expected = {row.numpy().tobytes() for row in windows(images)}
    assert {row.byte().numpy().tobytes() for row in together} == expected
    assert len(together) == len(expected)
    for again in (stored, streamed):
        assert torch.equal(
            torch.cat(list(again.batches(batch_size, generator=seeded(1)))), together
        )
    other = torch.cat(list(stored.batches(batch_size, generator=seeded(2))))
    assert not torch.equal(other, together)
    assert not torch.equal(together.byte(), windows(images))


def test_neighbours_in_a_batch_are_of_several_images(images):
    source = of_windows(features_of(images, "host"), T)
    order = {row.numpy().tobytes(): k // T for k, row in enumerate(windows(images))}
    batch = next(source.batches(9, generator=seeded(0)))
    assert len({order[row.byte().numpy().tobytes()] for row in batch}) > 2


def test_a_subset_is_of_windows(images):
    rows = torch.tensor([0, 40, 8, 62])
    found = torch.cat(list(of_windows(features_of(images, "host"), T).subset(rows).batches(3)))
    assert torch.equal(found.byte(), windows(images)[rows])
    shuffled = of_windows(features_of(images, "host"), T).subset(rows)
    drawn = torch.cat(list(shuffled.batches(3, generator=seeded(0)))).byte()
    assert {r.numpy().tobytes() for r in drawn} == {
        w.numpy().tobytes() for w in windows(images)[rows]
    }


def test_what_is_held_out_is_windows_too(images):
    features = features_of(images, "host")
    assert of_windows(features, T).held_out is None
    features.held_out = features.subset([1, 2])
    assert len(of_windows(features, T).held_out) == 2 * T


def test_whole_images_pass_as_they_are(images):
    features = features_of(images, "host")
    assert of_windows(features, 1) is features


def test_windows_put_together_are_the_image(images):
    given = rearrange(torch.from_numpy(images), "n h w c -> n c h w")
    (whole,) = whole_stages(windows_of([cut(given, TILING)], T), TILING)
    assert torch.equal(whole, given)


def test_cells_of_windows_come_from_the_place_they_are_of():
    """Features that tell their place in pixels tell it in the whole map too, to half a cell."""
    side, grid = TILING.tile_size, 4
    at = torch.arange(grid).add(0.5) * (side / grid)
    tall = torch.cat(
        [(r.start + at)[None, None, :, None].expand(1, 1, grid, grid) for r, _ in TILING.windows], 2
    )
    (whole,) = whole_stages(windows_of([tall], T), TILING)
    assert whole.shape == (1, 1, 11, 11)
    centres = torch.arange(11).add(0.5) * 2
    assert (whole[0, 0, :, 3] - centres).abs().max() <= 1


def test_an_unreadable_image_is_left_out_with_all_its_windows(images):
    features = features_of(images, "host", fails_at=(2,))
    assert features.indices == [0, 1, 3, 4, 5, 6]
    assert len(of_windows(features, T)) == 6 * T


def test_a_batch_is_of_windows_and_no_smaller_than_an_image(images):
    whole = ArrayDataset(images, PairTransform(22, None, "opencv_square"))
    for asked, expected in ((1, 1), (9, 1), (20, 2)):
        loader = BatchLoader(
            TiledImages(whole, TILING), batch_size=asked, workers=0, skip_unreadable=False
        )
        assert loader.batch_size == expected
        assert loader.at_once == asked
        assert next(iter(loader)).images.shape == (expected, 3, 8 * T, 8)


def test_other_windows_are_other_images(images):
    whole = ArrayDataset(images, PairTransform(22, None, "opencv_square"))
    prints = {TiledImages(whole, tiling).fingerprint() for tiling in (TILING, Tiling(22, 11, 2))}
    assert len(prints | {whole.fingerprint()}) == 3


def test_thumbnails_of_windows_show_the_image():
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64)
    tiling = Tiling(64, 16, 4)
    found, expected = thumbnails(cut(ramp, tiling)), thumbnails(ramp)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_stages_of_windows_are_split():
    stages = [torch.arange(2 * 3 * 8 * 4.0).reshape(2, 3, 8, 4)]
    (found,) = windows_of(stages, 2)
    assert found.shape == (4, 3, 4, 4)
    assert torch.equal(found[1], stages[0][0, :, 4:])
