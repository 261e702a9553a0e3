"""Synthetic anomalies made from normal images: CutPaste for defects, rotations for semantics.

What CutPaste pastes is described in `datasets/drawing/pasting.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.drawing.pasting import paste_patch, paste_scar
from datasets.reading.fingerprints import digest
from datasets.reading.loading import Images, Item
from datasets.reading.transforms import Box
from datasets.samples import DataError

Draw = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""Image (S, S, 3) uint8 -> the anomaly made from it, same shape, and its mask (S, S) bool.

The mask follows from the random numbers and the size alone, not from what the image shows."""


class SyntheticDataset(Images):
    """Images of another data set, each turned into an anomaly.

    The anomaly of an image depends on seed and index only, not on the order of reading or the
    worker. An unreadable image passes through as its error.

    Args:
        dataset: the normal images.
        draw: makes an anomaly of (S, S, 3) uint8.
        copies: anomalies made from each image; those of image i are at i * copies and after.
        seed: of the drawing.
    """

    def __init__(self, dataset: Images, draw: Draw, *, copies: int = 1, seed: int = 0) -> None:
        self._dataset = dataset
        self._draw = draw
        self._copies = copies
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset) * self._copies

    def __getitem__(self, index: int) -> Item:
        drawn = self._drawn(index)
        if isinstance(drawn, str):
            return index, drawn
        return index, torch.from_numpy(drawn[0]).permute(2, 0, 1)  # (3, S, S)

    def masks(self, indices: Sequence[int]) -> Tensor:
        """Return where the anomalies at `indices` were drawn, (N, S, S) bool.

        Only the first image is read, for its size.

        Raises:
            DataError: it cannot be read.
        """
        _, first = self._dataset[indices[0] // self._copies]
        if isinstance(first, str):
            raise DataError(first)
        blank = np.zeros((*first.shape[1:], 3), np.uint8)
        masks = [self._draw(blank, self._rng(index))[1] for index in indices]
        return torch.from_numpy(np.stack(masks))  # (N, S, S)

    def source(self, index: int) -> Path | int:
        """What to call an image in a message: the normal image it was made from."""
        return self._dataset.source(index // self._copies)

    def box(self, index: int) -> Box | None:
        """Where the normal image lies, which the anomaly was made from."""
        return self._dataset.box(index // self._copies)

    def fingerprint(self) -> str:
        """A hash of the normal images and of how the anomalies are drawn."""
        drawing = [self._draw.__name__, str(self._copies), str(self._seed)]
        return digest([self._dataset.fingerprint(), *drawing])

    def _drawn(self, index: int) -> tuple[np.ndarray, np.ndarray] | str:
        _, image = self._dataset[index // self._copies]
        if isinstance(image, str):
            return image
        array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())  # (S, S, 3)
        return self._draw(array, self._rng(index))

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, index])


class ImagesAt(Images):
    """Some images of another data set, which keep their positions there as their indices.

    Args:
        dataset: the other data set.
        positions: in it, in the order of reading.
    """

    def __init__(self, dataset: Images, positions: Sequence[int]) -> None:
        self._dataset = dataset
        self._positions = tuple(positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Item:
        return self._dataset[self._positions[index]]

    def index(self, place: int) -> int:
        """The position in the other data set of the image at `place` in this one."""
        return self._dataset.index(self._positions[place])

    def source(self, index: int) -> Path | int:
        """What to call an image in a message; `index` is its position in the other data set."""
        return self._dataset.source(index)

    def box(self, index: int) -> Box | None:
        """Where the image lies; `index` is its position in the other data set."""
        return self._dataset.box(index)

    def fingerprint(self) -> str:
        """A hash of the other data set and of the positions."""
        return digest([self._dataset.fingerprint(), str(self._positions)])


def cutpaste(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of an image with a patch or, as often, a scar pasted on, and its mask."""
    return (paste_patch if rng.random() < 0.5 else paste_scar)(image, rng)


def rotate(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an image turned by 90, 180 or 270 degrees; the mask is everything."""
    turned = np.ascontiguousarray(np.rot90(image, k=int(rng.integers(1, 4))))
    return turned, np.ones(image.shape[:2], dtype=bool)
