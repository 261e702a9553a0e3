"""Images cut into overlapping windows, which lie below each other in one tall image.

So an image stays one item of a data set, a loader and a bank, however many windows it has.
"""

from pathlib import Path

import torch
from torch import Tensor

from configs.tiles import Tiling
from datasets.reading.fingerprints import digest
from datasets.reading.loading import Images, Item
from datasets.reading.transforms import Box


def cut(images: Tensor, tiling: Tiling) -> Tensor:
    """Return the T windows of images (..., K, K), below each other: (..., T * S, S)."""
    windows = [images[..., rows, columns] for rows, columns in tiling.windows]
    return torch.cat(windows, dim=-2)  # (..., T * S, S)


class TiledImages(Images):
    """The images of another data set, cut into windows: (3, T * S, S) uint8 each.

    An unreadable image passes through as its error.

    Args:
        dataset: the whole images.
        tiling: the windows.
    """

    def __init__(self, dataset: Images, tiling: Tiling) -> None:
        self._dataset = dataset
        self._tiling = tiling
        self.tiles = tiling.count

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Item:
        place, image = self._dataset[index]
        return place, image if isinstance(image, str) else cut(image, self._tiling)

    def index(self, place: int) -> int:
        """The index that the other data set gives the image at `place`."""
        return self._dataset.index(place)

    def source(self, index: int) -> Path | int:
        """What to call an image in a message."""
        return self._dataset.source(index)

    def box(self, index: int) -> Box | None:
        """Where the image lies in the whole that its windows are cut from."""
        return self._dataset.box(index)

    def fingerprint(self) -> str:
        """A hash of the whole images and of the windows."""
        return digest([self._dataset.fingerprint(), repr(self._tiling)])
