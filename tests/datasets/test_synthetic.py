"""Synthetic anomalies: where they are, how large, and that only seed and index matter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.drawing.pasting import PATCH_AREA
from datasets.reading.loading import BatchLoader, Images
from datasets.samples import DataError
from datasets.synthetic import ImagesAt, SyntheticDataset, cutpaste, rotate
from tests.datasets.trees import texture

SIZE = 64


class Textures(Images):
    """Textures that differ; the image at `broken` cannot be read."""

    def __init__(self, count=4, size=SIZE, broken=None):
        rng = np.random.default_rng(0)
        self.images = [
            torch.from_numpy(texture(rng, (size, size))).permute(2, 0, 1) for _ in range(count)
        ]
        self.broken = broken

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.broken:
            return index, f"image {index} cannot be read"
        return index, self.images[index]

    def fingerprint(self):
        return "textures"

    def source(self, index):
        return Path(f"{index}.png")


def noise(size=SIZE, seed=0):
    """An image whose pixels all differ from their neighbours, so that a paste shows."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [32, 64, 256])
def test_the_mask_is_where_pixels_differ(size):
    image = noise(size)
    before = image.copy()
    shapes = set()
    for seed in range(60):
        pasted, mask = cutpaste(image, np.random.default_rng(seed))
        assert np.array_equal(image, before), "the input was changed"
        assert (pasted.shape, pasted.dtype) == (image.shape, np.uint8)
        assert (mask.shape, mask.dtype) == ((size, size), bool)
        changed = (pasted != image).any(axis=2)
        assert not changed[~mask].any()
        assert changed[mask].mean() > 0.95
        rows, columns = mask.any(axis=1).sum(), mask.any(axis=0).sum()
        patch = mask.sum() == rows * columns and mask.sum() > 0.015 * size**2
        shapes.add("patch" if patch else "scar")
    assert shapes == {"patch", "scar"}


def test_sizes_stay_within_those_of_the_paper():
    size, patches, scars = 256, [], []
    for seed in range(300):
        _, mask = cutpaste(noise(size), np.random.default_rng(seed))
        rows, columns = int(mask.any(axis=1).sum()), int(mask.any(axis=0).sum())
        if mask.sum() == rows * columns and mask.sum() > 0.015 * size**2:
            patches.append((mask.mean(), columns / rows))
        else:
            scars.append((mask.sum(), np.hypot(rows, columns)))
    areas, aspects = np.array(patches).T
    assert PATCH_AREA[0] * 0.95 < areas.min() < 0.04
    assert 0.12 < areas.max() < PATCH_AREA[1] * 1.05
    assert 0.28 < aspects.min() < 0.5
    assert 2 < aspects.max() < 3.5
    assert (aspects < 1).mean() == pytest.approx(0.5, abs=0.15)
    pixels, diagonals = np.array(scars).T
    assert 10 < pixels.min() < 60
    assert 250 < pixels.max() <= 17 * 26
    assert diagonals.max() < 16 + 25 + 3  # of the box around a scar turned by 45 degrees
    assert len(scars) / 300 == pytest.approx(0.5, abs=0.1)


def test_colour_jitter_stays_small():
    grey = np.full((SIZE, SIZE, 3), 128, dtype=np.uint8)
    values = {
        int(value)
        for seed in range(40)
        for value in np.unique(cutpaste(grey, np.random.default_rng(seed))[0])
    }
    # Saturation and contrast do nothing to grey; the rim of a turned scar is mixed with no black.
    assert 128 * 0.89 < min(values) < 120
    assert 136 < max(values) < 128 * 1.11
    assert len(values) > 10


def test_a_tiny_image_still_gets_a_defect():
    for seed in range(40):
        pasted, mask = cutpaste(noise(4), np.random.default_rng(seed))
        assert mask.any()
        assert pasted.shape == (4, 4, 3)


def test_seed_and_index_alone_decide():
    images = Textures()
    dataset = SyntheticDataset(images, cutpaste, copies=3, seed=7)
    forward = [dataset[i][1] for i in range(len(dataset))]
    again = SyntheticDataset(Textures(), cutpaste, copies=3, seed=7)
    for i in reversed(range(len(again))):
        assert torch.equal(again[i][1], forward[i])
    other = SyntheticDataset(images, cutpaste, copies=3, seed=8)
    assert not torch.equal(other[0][1], forward[0])
    assert not torch.equal(forward[0], forward[1]), "copies must differ"


@pytest.mark.parametrize("workers", [0, 2])
def test_some_images_keep_their_positions_and_their_drawing(workers):
    whole = SyntheticDataset(Textures(), cutpaste)
    some = ImagesAt(whole, [1, 3])
    batches = list(BatchLoader(some, batch_size=1, workers=workers, skip_unreadable=False))
    assert [batch.indices for batch in batches] == [[1], [3]]
    for batch, position in zip(batches, (1, 3), strict=True):
        assert torch.equal(batch.images[0], whole[position][1])
    loader = BatchLoader(some, batch_size=1, workers=workers, skip_unreadable=False)
    assert loader.indices == [1, 3]
    (batch,) = loader.at([1])
    assert batch.indices == [3]
    assert some.source(3) == whole.source(3)
    prints = {d.fingerprint() for d in (whole, some, ImagesAt(whole, [1, 2]))}
    assert len(prints) == 3


def test_copies_follow_their_image():
    images = Textures()
    dataset = SyntheticDataset(images, cutpaste, copies=3)
    assert len(dataset) == 12
    masks = dataset.masks(range(12))
    assert (masks.shape, masks.dtype) == ((12, SIZE, SIZE), torch.bool)
    for index in range(12):
        position, drawn = dataset[index]
        assert (position, drawn.dtype, drawn.shape) == (index, torch.uint8, (3, SIZE, SIZE))
        assert dataset.source(index) == Path(f"{index // 3}.png")
        original = images.images[index // 3]
        assert torch.equal(drawn[:, ~masks[index]], original[:, ~masks[index]])
        assert (drawn != original).any()
    assert torch.equal(dataset.masks([5]), masks[5:6])
    assert all(torch.equal(a, b) for a, b in zip(images.images, Textures().images, strict=True))


@pytest.mark.parametrize("draw", [cutpaste, rotate])
def test_masks_read_one_image_and_are_those_of_the_drawings(draw, monkeypatch):
    images = Textures(count=6)
    dataset = SyntheticDataset(images, draw, copies=8)
    drawn = [
        draw(images.images[i // 8].permute(1, 2, 0).numpy(), np.random.default_rng([0, i]))[1]
        for i in range(len(dataset))
    ]
    read = []
    getitem = Textures.__getitem__
    monkeypatch.setattr(
        Textures, "__getitem__", lambda self, i: (read.append(i), getitem(self, i))[1]
    )
    masks = dataset.masks(range(len(dataset)))
    np.testing.assert_array_equal(masks.numpy(), np.stack(drawn))
    assert read == [0]


def test_rotation_turns_the_image():
    image, turns = noise(), set()
    for seed in range(30):
        turned, mask = rotate(image, np.random.default_rng(seed))
        (turn,) = [k for k in range(4) if np.array_equal(turned, np.rot90(image, k))]
        turns.add(turn)
        assert mask.all()
        assert mask.shape == (SIZE, SIZE)
    assert turns == {1, 2, 3}


def test_an_unreadable_image_passes_through():
    dataset = SyntheticDataset(Textures(broken=1), cutpaste, copies=2)
    for index in (2, 3):
        assert dataset[index] == (index, "image 1 cannot be read")
    with pytest.raises(DataError, match="image 1 cannot be read"):
        dataset.masks([3, 0])
    loader = BatchLoader(dataset, batch_size=8, skip_unreadable=True, workers=0)
    assert [b.indices for b in loader] == [[0, 1, 4, 5, 6, 7]]
    assert [why for _, why in loader.skipped] == ["image 1 cannot be read"] * 2
