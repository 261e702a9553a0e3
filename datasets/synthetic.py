"""Synthetic anomalies made from normal images: CutPaste for defects, rotations for semantics.

CutPaste follows Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and
Localization" (CVPR 2021): a patch of the image, or a thin scar, is cut out, jittered in colour,
a scar also rotated, and pasted elsewhere. Sizes in pixels are theirs at 256, scaled to the image.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from datasets.reading.fingerprints import digest
from datasets.reading.loading import Images, Item
from datasets.samples import DataError

PATCH_AREA = (0.02, 0.15)  # share of the image, CVPR 2021, section 4
PATCH_ASPECT = (0.3, 3.3)  # (0.3, 1) or (1, 3.3)
SCAR_WIDTH = (2, 16)  # pixels at 256
SCAR_LENGTH = (10, 25)  # pixels at 256
SCAR_ANGLE = 45.0  # degrees either way
COLOUR_JITTER = 0.1  # of brightness, contrast and saturation

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

    def fingerprint(self) -> str:
        """A hash of the other data set and of the positions."""
        return digest([self._dataset.fingerprint(), str(self._positions)])


def cutpaste(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of an image with a patch or, as often, a scar pasted on, and its mask."""
    return (_paste_patch if rng.random() < 0.5 else _paste_scar)(image, rng)


def rotate(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an image turned by 90, 180 or 270 degrees; the mask is everything."""
    turned = np.ascontiguousarray(np.rot90(image, k=int(rng.integers(1, 4))))
    return turned, np.ones(image.shape[:2], dtype=bool)


def _paste_patch(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size = image.shape[0]
    area = rng.uniform(*PATCH_AREA) * size * size
    low, high = (PATCH_ASPECT[0], 1.0) if rng.random() < 0.5 else (1.0, PATCH_ASPECT[1])
    aspect = rng.uniform(low, high)
    height = int(np.clip(round(math.sqrt(area / aspect)), 1, size))
    width = int(np.clip(round(math.sqrt(area * aspect)), 1, size))
    patch = _jitter(_cut(image, height, width, rng), rng)
    pasted, mask = image.copy(), np.zeros(image.shape[:2], dtype=bool)
    top, left = _place(image, height, width, rng)
    pasted[top : top + height, left : left + width] = patch
    mask[top : top + height, left : left + width] = True
    return pasted, mask


def _paste_scar(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size = image.shape[0]
    scale = size / 256
    width = int(np.clip(round(rng.uniform(*SCAR_WIDTH) * scale), 1, size))
    length = int(np.clip(round(rng.uniform(*SCAR_LENGTH) * scale), 2, size))
    scar = _jitter(_cut(image, length, width, rng), rng)
    side = math.ceil(math.hypot(length, width))
    turn = cv2.getRotationMatrix2D(
        ((width - 1) / 2, (length - 1) / 2), rng.uniform(-SCAR_ANGLE, SCAR_ANGLE), 1.0
    )
    turn[:, 2] += np.array([(side - width) / 2, (side - length) / 2])
    # Its edge continues outwards: black interpolated into it would give every scar a dark rim.
    turned = cv2.warpAffine(scar, turn, (side, side), borderMode=cv2.BORDER_REPLICATE)
    cover = cv2.warpAffine(np.full((length, width), 255, np.uint8), turn, (side, side)) > 127
    if side > size or not cover.any():
        return _paste_patch(image, rng)
    pasted, mask = image.copy(), np.zeros(image.shape[:2], dtype=bool)
    top, left = _place(image, side, side, rng)
    pasted[top : top + side, left : left + side][cover] = turned[cover]
    mask[top : top + side, left : left + side] = cover
    return pasted, mask


def _cut(image: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    top, left = _place(image, height, width, rng)
    return image[top : top + height, left : left + width]


def _place(image: np.ndarray, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return top and left of a random rectangle inside an image."""
    top = int(rng.integers(0, image.shape[0] - height + 1))
    return top, int(rng.integers(0, image.shape[1] - width + 1))


def _jitter(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation each by up to `COLOUR_JITTER`."""
    brightness, contrast, saturation = rng.uniform(1 - COLOUR_JITTER, 1 + COLOUR_JITTER, size=3)
    jittered = patch.astype(np.float32) * brightness
    jittered = (jittered - jittered.mean()) * contrast + jittered.mean()
    grey = jittered.mean(axis=2, keepdims=True)
    jittered = grey + (jittered - grey) * saturation
    return np.clip(np.rint(jittered), 0, 255).astype(np.uint8)
