"""What the network is shown of a piece: two random views in training, one fixed view after it.

Source: the released code of AnomalyNCD (CVPR 2025). A training view, in this order: the shorter
side is resized, a random square cut out, image and mask are flipped across and down and turned by
quarters; then, of the image alone, brightness, contrast and saturation change (in a random order),
sharpness, blur and the number of grey values. (The released code turns after it has changed the
colours, which gives the same.) The mask is resized bilinearly, as the image is.

On two points an image that is not square is treated otherwise than published, where only squares
are right: the released test view starts 16 pixels from the upper left corner and so sees a quarter
of an image of 4:1, and training cuts within 32 pixels of that corner. Here the test view is the
centre, and training cuts anywhere. Of a square image of 256 pixels both are the same as published.

Each view's random numbers are of one seed. So views depend neither on threads nor on what else is
drawn.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

BRIGHTNESS = CONTRAST = (0.6, 1.4)
SATURATION = (0.6, 1.8)
SHARPNESS = (0.2, 2.0)
BLUR_SIGMA = (0.1, 2.0)
BLUR_KERNELS = (9, 13, 17, 21, 25, 29, 33)
BITS = (5, 6, 7, 8)
QUARTER = 90


@dataclass(frozen=True)
class Change:
    """What is done to a piece for one view.

    Attributes:
        down, across: where the square is cut out, 0 to below 1, of what is left beside it.
        is_mirrored: left for right.
        is_upturned: top for bottom.
        turns: quarters, 0 to 3.
        colours: names and factors of brightness, contrast and saturation, in the order of use.
        sharpness: a factor; 1 changes nothing.
        blur: kernel in pixels, standard deviation in pixels.
        bits: that are left of 8.
    """

    down: float
    across: float
    is_mirrored: bool
    is_upturned: bool
    turns: int
    colours: tuple[tuple[str, float], ...]
    sharpness: float
    blur: tuple[int, float]
    bits: int


def draw_change(seed: int) -> Change:
    """Draw what is done to a piece; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = iter(torch.rand(12, generator=generator, dtype=torch.float64).tolist())
    order = torch.randperm(3, generator=generator).tolist()

    def between(limits: tuple[float, float]) -> float:
        return limits[0] + (limits[1] - limits[0]) * next(drawn)

    def one_of(choices: tuple[int, ...]) -> int:
        return choices[int(next(drawn) * len(choices))]

    down, across = next(drawn), next(drawn)
    is_mirrored, is_upturned = next(drawn) < 0.5, next(drawn) < 0.5
    colours = (
        ("brightness", between(BRIGHTNESS)),
        ("contrast", between(CONTRAST)),
        ("saturation", between(SATURATION)),
    )
    return Change(
        down,
        across,
        is_mirrored,
        is_upturned,
        turns=one_of((0, 1, 2, 3)),
        colours=tuple(colours[i] for i in order),
        sharpness=between(SHARPNESS),
        blur=(one_of(BLUR_KERNELS), between(BLUR_SIGMA)),
        bits=one_of(BITS),
    )


def resized(image: Image.Image, mask: Image.Image, shorter: int) -> tuple[Image.Image, Image.Image]:
    """Return both with the shorter side at a number of pixels, resized bilinearly."""
    image, mask = (V.resize(x, [shorter], InterpolationMode.BILINEAR) for x in (image, mask))
    return image, mask


def training_view(
    image: Image.Image, mask: Image.Image, size: int, change: Change
) -> tuple[Tensor, Tensor]:
    """Return a changed view of a resized piece.

    Args:
        image: RGB, no side below `size`.
        mask: grey, of the same size.
        size: S, side of the view.
        change: what is done.

    Returns:
        (3, S, S) and (1, S, S), uint8.
    """

    def placed(x: Image.Image) -> Image.Image:
        top = int(change.down * (x.height - size))
        left = int(change.across * (x.width - size))
        x = V.crop(x, top, left, size, size)
        x = V.horizontal_flip(x) if change.is_mirrored else x
        x = V.vertical_flip(x) if change.is_upturned else x
        return V.rotate(x, QUARTER * change.turns) if change.turns else x

    return V.pil_to_tensor(coloured(placed(image), change)), V.pil_to_tensor(placed(mask))


def coloured(image: Image.Image, change: Change) -> Image.Image:
    """Return an RGB image with other colours, sharpness, blur and number of grey values."""
    adjust = {
        "brightness": V.adjust_brightness,
        "contrast": V.adjust_contrast,
        "saturation": V.adjust_saturation,
    }
    for name, factor in change.colours:
        image = adjust[name](image, factor)
    image = V.adjust_sharpness(image, change.sharpness)
    kernel, sigma = change.blur
    # Of separable kernels, in integers: a tenth of torchvision's time, within one grey value of it.
    blurred = cv2.GaussianBlur(
        np.asarray(image), (kernel, kernel), sigma, borderType=cv2.BORDER_REFLECT_101
    )
    return V.posterize(Image.fromarray(blurred), change.bits)


def central_view(image: Image.Image, mask: Image.Image, size: int) -> tuple[Tensor, Tensor]:
    """Return the central square of a resized piece, (3, S, S) and (1, S, S), uint8."""
    found = (V.pil_to_tensor(V.center_crop(x, [size, size])) for x in (image, mask))
    image_view, mask_view = found
    return image_view, mask_view
