"""Resizing and cropping of an image and its mask as a pair, as each paper's preset states it."""

from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np
from PIL import Image

from datasets.reading.images import PLAIN, Reading
from datasets.samples import DataError

Resize = Literal["opencv_square", "lanczos_shorter", "bilinear_shorter", "bilinear_padded"]
Box = tuple[int, int, int, int]
"""First row and column, then height and width."""


@dataclass(frozen=True)
class PairTransform:
    """Resizes and centre-crops an image and its mask alike; normalisation is the backbone's part.

    Attributes:
        image_size: Side length in pixels that the resize aims at.
        crop_size: Side length in pixels of the centre crop that follows. None keeps the whole
            image: it is squeezed to image_size x image_size by the same filter, so that images
            of any shape batch and no defect is cut away.
        resize: "opencv_square" squeezes to image_size x image_size with cv2.INTER_LINEAR (NoCo's
            MVTec pipeline); "lanczos_shorter" and "bilinear_shorter" bring
            the shorter side to image_size with Pillow's antialiased filter, as torchvision's
            Resize does; "bilinear_padded" brings the longer side there, and mirrors the image into
            the two margins that are left of the square (see `box`).
        reading: How the files of images and masks are read.

    Raises:
        ValueError: A size is below 1, crop_size exceeds image_size, or resize is unknown.
        DataError: In use, where resizing would blow a narrow image up beyond `reading.max_pixels`.
    """

    image_size: int
    crop_size: int | None
    resize: Resize
    reading: Reading = PLAIN

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize {self.resize!r} is none of {', '.join(get_args(Resize))}")
        if self.image_size < 1 or (self.crop_size is not None and self.crop_size < 1):
            raise ValueError(
                f"image_size {self.image_size} and crop_size {self.crop_size} must be 1 or more"
            )
        if self.crop_size is not None and self.crop_size > self.image_size:
            raise ValueError(
                f"crop_size {self.crop_size} exceeds image_size {self.image_size}: "
                "there is nothing to crop from"
            )
        if self.pads and self.crop_size is not None:
            raise ValueError(f"crop_size {self.crop_size}: of padded images nothing is cropped")

    @property
    def output_size(self) -> int:
        """Side length S of what the transform returns, in pixels."""
        return self.image_size if self.crop_size is None else self.crop_size

    @property
    def pads(self) -> bool:
        """Whether margins are left around images that are no squares."""
        return self.resize == "bilinear_padded"

    def image(self, image: np.ndarray) -> np.ndarray:
        """Transforms an RGB image: (H, W, 3) uint8 to (S, S, 3) uint8."""
        width, height = self._resized(image)
        if self.resize == "opencv_square":
            resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        else:
            lanczos = self.resize == "lanczos_shorter"
            resample = Image.Resampling.LANCZOS if lanczos else Image.Resampling.BILINEAR
            resized = np.array(Image.fromarray(image).resize((width, height), resample))
        if self.pads:
            margins = (*self._margins(height, width), (0, 0))
            return np.pad(resized, margins, mode="symmetric")  # (S, S, 3)
        return self._crop(resized)  # (S, S, 3)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Transforms a mask by the nearest pixel: (H, W) bool to (S, S) bool."""
        # INTER_NEAREST takes the top left pixel of each block, which shifts the mask against the
        # image by up to half an output pixel; the exact variant takes the centre, as Pillow does.
        width, height = self._resized(mask)
        resized = cv2.resize(
            mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT
        )
        if self.pads:
            return np.pad(resized, self._margins(height, width)).astype(bool)  # (S, S)
        return self._crop(resized).astype(bool)  # (S, S)

    def area_scale(self, image: np.ndarray) -> float:
        """Returns how many pixels become of one by the resize, a fraction where it shrinks."""
        width, height = self._resized(image)
        return width * height / (image.shape[0] * image.shape[1])

    def box(self, height: int, width: int) -> Box | None:
        """Returns where an image (height, width) lies in what becomes of it; None for everywhere.

        Only "bilinear_padded" leaves margins: what a map says there is of mirrored pixels, and
        counts nowhere.
        """
        if not self.pads:
            return None
        columns, rows = self._resized(np.empty((height, width, 0)))
        (top, _), (left, _) = self._margins(rows, columns)
        return top, left, rows, columns

    def _margins(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """What is added above and below, and on the left and right, to make a square."""
        top, left = -self._offset(height), -self._offset(width)
        side = self.image_size
        return (top, side - height - top), (left, side - width - left)

    def _resized(self, image: np.ndarray) -> tuple[int, int]:
        """Width and height after the resize, before the crop."""
        height, width = image.shape[:2]
        size = self.image_size
        if self.pads:
            longer = max(height, width)
            return max(1, round(width * size / longer)), max(1, round(height * size / longer))
        if self.resize == "opencv_square" or self.crop_size is None:
            return size, size
        # torchvision truncates the longer side.
        if width <= height:
            resized = size, int(size * height / width)
        else:
            resized = int(size * width / height), size
        if resized[0] * resized[1] > self.reading.max_pixels:
            raise DataError(
                f"{width} x {height} pixels would become {resized[0]} x {resized[1]} pixels, more "
                "than --max-pixels: use --crop-size none or images nearer to a square"
            )
        return resized

    def _crop(self, image: np.ndarray) -> np.ndarray:
        if self.crop_size is None:
            return image
        height, width = image.shape[:2]
        top, left = self._offset(height), self._offset(width)
        cropped = image[top : top + self.crop_size, left : left + self.crop_size]
        return np.ascontiguousarray(cropped)  # (S, S) or (S, S, 3)

    def _offset(self, length: int) -> int:
        margin = length - self.output_size
        # Odd margins: albumentations, which the OpenCV pipeline comes from, rounds down;
        # torchvision rounds half to even.
        return margin // 2 if self.resize == "opencv_square" else round(margin / 2)
