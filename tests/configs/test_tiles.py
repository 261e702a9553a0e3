import itertools

import pytest

from configs.tiles import OVERLAP, Tiling, resized_for, resized_in, tiling_of


@pytest.mark.parametrize("overlap", [0.0, OVERLAP, 0.5])
@pytest.mark.parametrize(("size", "tiles", "tile_size"), [(224, 3, None), (2000, None, 256)])
def test_windows_cover_the_image_and_overlap_as_asked(size, tiles, tile_size, overlap):
    tiling = tiling_of(size, tiles, tile_size, overlap)
    starts = tiling.starts
    assert starts[0] == 0
    assert starts[-1] + tiling.tile_size == tiling.image_size
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert max(steps) <= tiling.tile_size * (1 - overlap) + 1
    assert max(steps) - min(steps) <= 1
    assert len(tiling.windows) == tiling.count == tiling.per_side**2


def test_tiles_keep_the_size_of_what_is_seen_and_tile_size_that_of_the_image():
    assert tiling_of(224, 4, None, 0.0) == Tiling(896, 224, 4)
    assert tiling_of(896, None, 224, 0.0) == Tiling(896, 224, 4)


def test_without_tiles_there_are_none():
    assert tiling_of(224, None, None, OVERLAP) is None
    assert resized_for(None, 256, 224) == (256, 224)


def test_a_crop_keeps_its_share():
    """Of 256 pixels 224 are kept; of four windows a side, the same part of the image."""
    assert resized_for(Tiling(896, 224, 4), 256, 224) == (1024, 896)
    assert resized_for(Tiling(896, 224, 4), 224, None) == (896, None)


def test_the_sizes_of_a_run_folder_are_those_of_its_options():
    config = {"image_size": 256, "crop_size": 224, "tiles": 4, "tile_overlap": 0.0}
    assert resized_in(config) == (1024, 896)
    assert resized_in({"image_size": 64, "crop_size": None}) == (64, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((2, 100), "--tiles and --tile-size both"),
        ((1, None), "--tiles 1 is the whole image"),
        ((None, 224), "--tile-size 224 must be smaller than the images of 224 pixels"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        tiling_of(224, *options, OVERLAP)
