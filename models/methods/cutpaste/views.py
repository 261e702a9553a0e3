"""The views of an image that CutPaste tells apart: as it is, with a patch, with a scar."""

import functools
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from datasets.drawing.pasting import jitter_colour, paste_patch, paste_scar, place

Classes = Literal["patch", "scar", "three_way"]


@dataclass(frozen=True)
class Views:
    """Draws the views of one image, one for each class.

    The image is changed first, and all views are of what came of it, so that nothing but what is
    pasted tells them apart.

    Attributes:
        classes: what is pasted: a patch, a scar, or each of them in a view of its own.
        shift: largest translation, a share of the side; the image is mirrored at its border. It
            has no effect on crops.
        jitter: strength of the colour jitter of the whole view.
        crop: side of the random crop that the views are of; None for whole images.
    """

    classes: Classes
    shift: float
    jitter: float
    crop: int | None

    @property
    def count(self) -> int:
        """Number of views, and of classes: the first is the one with nothing pasted."""
        return 3 if self.classes == "three_way" else 2

    def draw(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Return `count` views, (S, S, 3) uint8 each, of an image (S, S, 3) uint8."""
        whole = len(image)
        if self.crop is None:
            image = translated(image, self.shift, rng)
        else:
            top, left = place(image, self.crop, self.crop, rng)
            image = image[top : top + self.crop, left : left + self.crop]
        image = jitter_colour(image, rng, self.jitter)
        views = [image]
        if self.classes != "scar":
            views.append(paste_patch(image, rng, jitter=jitter_colour)[0])
        if self.classes != "patch":
            paste = functools.partial(paste_scar, jitter=jitter_colour, whole=whole)
            views.append(paste(image, rng)[0])
        return tuple(views)


def translated(image: np.ndarray, shift: float, rng: np.random.Generator) -> np.ndarray:
    """Return an image (S, S, 3) moved by whole pixels, up to a share of its side, mirrored."""
    most = int(shift * len(image))
    down, right = rng.integers(-most, most + 1, size=2)
    move = np.array([[1, 0, right], [0, 1, down]], np.float32)
    return cv2.warpAffine(
        image, move, image.shape[:2], flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101
    )
