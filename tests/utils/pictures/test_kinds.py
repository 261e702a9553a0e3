"""Pictures of kinds: what is drawn, of few regions and of many."""

import numpy as np
import pytest
from PIL import Image

from utils.pictures.kinds import COLUMNS, ROWS, save_confusion, save_map, save_sheet


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def piece(number):
    """A white piece with a mask in its middle."""
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:30, 10:30] = True
    return np.full((40, 40, 3), 255 - number % 3, np.uint8), mask


def test_a_sheet_outlines_masks_and_reads_only_what_it_shows(tmp_path):
    asked = []
    count = COLUMNS * ROWS + 7

    def read(number):
        asked.append(number)
        return piece(number)

    path = save_sheet(tmp_path / "a/1.png", "kind $1_{", ["0.5"] * count, read)
    assert asked == list(range(COLUMNS * ROWS))
    found = pixels(path).astype(int)
    orange = (found[..., 0] > 200) & (found[..., 1] < 160) & (found[..., 2] < 90)
    assert orange.sum() > 100 * COLUMNS


@pytest.mark.parametrize("inside", [False, True])
def test_a_mask_without_an_outline_is_no_fault(tmp_path, inside):
    def read(number):
        return piece(number)[0], np.full((40, 40), inside)

    assert save_sheet(tmp_path / "1.png", "kind 1", ["1.00"], read).is_file()


@pytest.mark.parametrize("count", [1, 2, 7, 8, 40])
def test_any_number_of_regions_has_a_map(tmp_path, count):
    vectors = np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)
    labels = [f"kind {i % 3 + 1}" for i in range(count)]
    first = pixels(save_map(tmp_path / "1.png", "map", vectors, labels, random_seed=0))
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10
    again = pixels(save_map(tmp_path / "2.png", "map", vectors, labels, random_seed=0))
    assert np.array_equal(first, again)


def test_the_share_of_a_name_is_its_shade(tmp_path):
    counts = np.array([[9, 0], [1, 4]])
    found = pixels(
        save_confusion(tmp_path / "1.png", "c", ["kind 1", "kind 2"], ["a", "b"], counts)
    )
    dark = (found.astype(int).sum(axis=2) < 300) & (found[..., 2] > found[..., 0] + 40)
    (columns,) = dark.any(axis=0).nonzero()
    assert columns[-1] - columns[0] > found.shape[1] / 4  # both cells of the diagonal
