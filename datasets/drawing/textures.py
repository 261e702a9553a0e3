"""Where the textures come from that are pasted into normal images, and the pasting.

DRAEM and what follows it paste images of DTD, a download of 600 MB; a folder of any images does.
Without one there is a set that can always be made: three photographs that come with scikit-image,
and drawn noise.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from datasets.drawing.augmenters import augment
from datasets.drawing.perlin import perlin_mask, perlin_noise
from datasets.reading.finding import find_images
from datasets.reading.images import read_image
from datasets.samples import DataError

PHOTOGRAPHS = ("brick", "grass", "gravel")
"""Of scikit-image, 512 x 512, grey; the data set demo is made of them too."""
NOISE_SIZE = 256
COPIES = 9
"""Images of each kind of noise."""
LEAST_CONTRAST = 60
"""Levels between the two colours of a noise, in the channel where they differ most."""
SEED = 20210817
"""Of the noise: the set is always the same."""
OPACITY = (0.2, 1.0)
"""Of a texture over the image (paper of DRAEM: the image shows through by up to 0.8)."""


class TextureError(DataError):
    """A folder cannot be pasted from; the message names it."""


@dataclass(frozen=True, eq=False)
class Textures:
    """Images to paste from.

    Attributes:
        images: files, which are read when they are drawn, or arrays (H, W, 3) uint8.
        words: which they are, and how many.
    """

    images: Sequence[Path | np.ndarray]
    words: str

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Return one of the images, squeezed to (size, size, 3), uint8.

        Raises:
            DataError: a file cannot be read.
        """
        image = self.images[int(rng.integers(len(self.images)))]
        array = read_image(image) if isinstance(image, Path) else image
        shrinks = min(array.shape[:2]) > size
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(array, (size, size), interpolation=way)


def find_textures(folder: str | None) -> Textures:
    """Return the images below a folder, or the suite's own set.

    Raises:
        TextureError: there is no such folder, or no image in it.
    """
    if folder is None:
        return own_textures()
    if not Path(folder).is_dir():
        raise TextureError(f"{folder} is not a folder")
    try:
        images = find_images([folder])
    except DataError as error:
        raise TextureError(str(error)) from error
    return Textures(images, f"the {len(images)} images below {folder}")


@functools.lru_cache(maxsize=1)
def own_textures() -> Textures:
    """Return the suite's own set, which is always the same."""
    from skimage import data  # only here: its import takes half a second

    photographs = [cv2.cvtColor(getattr(data, name)(), cv2.COLOR_GRAY2RGB) for name in PHOTOGRAPHS]
    rng = np.random.default_rng(SEED)
    noise = [_coloured(draw(rng), rng) for draw in NOISE for _ in range(COPIES)]
    images = [*photographs, *noise]
    for image in images:
        image.flags.writeable = False  # every caller gets the same
    return Textures(
        images,
        f"the suite's own {len(images)} images ({', '.join(PHOTOGRAPHS)} of scikit-image, of which "
        f"the data set demo is made too, and {len(noise)} of drawn noise)",
    )


def paste(image: np.ndarray, texture: np.ndarray, mask: np.ndarray, opacity: float) -> np.ndarray:
    """Return an image with a texture over it where a mask is.

    Args:
        image: (S, S, 3) uint8.
        texture: the same.
        mask: (S, S) bool.
        opacity: 1 hides the image, with 0 it stays as it is.
    """
    blended = cv2.addWeighted(texture, opacity, image, 1 - opacity, 0)
    return cv2.copyTo(blended, mask.astype(np.uint8), image.copy())


def paste_texture(
    image: np.ndarray, textures: Textures, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw DRAEM's anomaly: an augmented texture, in a Perlin mask, more or less opaque.

    Args:
        image: (S, S, 3) uint8.
        textures: to draw from.
        rng: draws everything.

    Returns:
        The anomalous image, the same shape, and the mask, (S, S) bool, perhaps empty.
    """
    size = len(image)
    mask = perlin_mask(size, rng)
    texture = augment(textures.draw(size, rng), rng)
    return paste(image, texture, mask, rng.uniform(*OPACITY)), mask


def _clouds(rng: np.random.Generator) -> np.ndarray:
    """Perlin noise of several scales, the finer the weaker."""
    first = int(rng.integers(0, 4))
    scales = range(first, first + 4)
    return sum(
        (perlin_noise(NOISE_SIZE, (2**k, 2**k), rng) / 2 ** (k - first) for k in scales),
        start=np.zeros((NOISE_SIZE, NOISE_SIZE)),
    )


def _grain(rng: np.random.Generator) -> np.ndarray:
    """White noise, more or less blurred, perhaps along one axis only."""
    white = rng.standard_normal((NOISE_SIZE, NOISE_SIZE))
    along, across = rng.uniform(0.3, 6, size=2)
    return cv2.GaussianBlur(white, (0, 0), along, sigmaY=along if rng.random() < 0.5 else across)


def _waves(rng: np.random.Generator) -> np.ndarray:
    """Parallel stripes, bent by clouds."""
    y, x = np.mgrid[:NOISE_SIZE, :NOISE_SIZE]
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 48)
    bent = rng.uniform(0, 20) * perlin_noise(NOISE_SIZE, (4, 4), rng)
    return np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle) + bent) / period)


def _checks(rng: np.random.Generator) -> np.ndarray:
    """Two crossing sets of sharp stripes."""
    return np.where(_waves(rng) > rng.uniform(-0.5, 0.5), 1.0, 0.0) + (_waves(rng) > 0)


def _patches(rng: np.random.Generator) -> np.ndarray:
    """Patches about random points, each of one value, darker towards its border."""
    points = np.full((NOISE_SIZE, NOISE_SIZE), 255, np.uint8)
    count = int(rng.integers(20, 400))
    rows, columns = rng.integers(0, NOISE_SIZE, size=(2, count))
    points[rows, columns] = 0
    distance, nearest = cv2.distanceTransformWithLabels(
        points, cv2.DIST_L2, cv2.DIST_MASK_PRECISE, labelType=cv2.DIST_LABEL_PIXEL
    )
    values = rng.random(count + 1)
    return values[nearest] - rng.uniform(0, 1) * distance / distance.max()


NOISE: tuple[Callable[[np.random.Generator], np.ndarray], ...] = (
    _clouds,
    _grain,
    _waves,
    _checks,
    _patches,
)


def _coloured(field: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a field (S, S) as an image from one random colour at its least to another.

    Every second image is grey, as many data sets are: there a colour would tell too much.
    """
    least, largest = field.min(), field.max()
    share = ((field - least) / (largest - least))[..., None]  # (S, S, 1)
    saturation = rng.integers(2) * rng.random()
    first = second = np.zeros(3)
    while np.abs(first - second).max() < LEAST_CONTRAST:
        colours = rng.integers(0, 256, size=(2, 3))
        grey = colours.mean(axis=1, keepdims=True)
        first, second = grey + saturation * (colours - grey)
    return np.rint(first + share * (second - first)).astype(np.uint8)  # (S, S, 3)
