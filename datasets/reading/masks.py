"""Masks of a test set at the size of the maps, joined by image or one defect at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.reading.images import Reading, read_mask, read_mask_values, read_size
from datasets.reading.mvtec_layout import mask_files
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError, Region, Saturation


def read_masks(
    images: Sequence[Path],
    masks: Sequence[Path | None],
    transform: PairTransform,
) -> Tensor:
    """Reads and transforms the masks of images; an image without one gets zeros.

    Args:
        images: (N,) image files.
        masks: (N,) mask files, or folders of masks that are joined; None for an image without one.
        transform: Of the images.

    Returns:
        (N, S, S) bool.

    Raises:
        DataError: A mask cannot be read, or its size differs from that of its upright image.
    """
    size = transform.output_size
    read = torch.zeros(len(images), size, size, dtype=torch.bool)  # (N, S, S)
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        if mask is not None:
            read[index] = torch.from_numpy(
                transform.mask(read_checked_mask(image, mask, transform.reading))
            )
    return read


def read_regions(
    masks: Sequence[Path | None],
    saturations: Mapping[int, Saturation],
    transform: PairTransform,
) -> list[Region]:
    """Reads the defects of images whose masks are a file each; `read_masks` has checked these.

    A saturation area in pixels of the file shrinks with the image, and is the defect's own area
    where that is less. Defects that have no pixel left at this size are left out.

    Args:
        masks: (N,) mask files, or folders of them; None for an image without one.
        saturations: Grey value of a file -> when its defect counts as found.
        transform: Of the images.

    Raises:
        DataError: A file's grey value is none of the saturations'.
    """
    found = []
    for index, mask in enumerate(masks):
        for file in () if mask is None else mask_files(mask):
            values = read_mask_values(file, transform.reading)  # (H, W)
            value = int(values.max())
            if value not in saturations or not np.isin(values, (0, value)).all():
                grey = sorted({int(one) for one in np.unique(values)} - {0})
                raise DataError(
                    f"the mask {file} has grey values {grey[:5]}: "
                    "MVTec LOCO's masks have one each, and defects_config.json must list it as a "
                    f"pixel_value (it has {', '.join(map(str, sorted(saturations)))})"
                )
            pixels = np.flatnonzero(transform.mask(values > 0))  # (A,)
            if not len(pixels):
                continue
            one = saturations[value]
            area = one.area * (len(pixels) if one.is_relative else transform.area_scale(values))
            found.append(Region(index, pixels, min(area, float(len(pixels)))))
    return found


def read_checked_mask(image: Path, path: Path, reading: Reading) -> np.ndarray:
    """Reads the mask of an image, a file or a folder of files that are joined: (H, W) bool.

    Raises:
        DataError: It cannot be read, or its size differs from that of its upright image.
    """
    parts = [_read_checked_part(image, part, reading) for part in mask_files(path)]
    return parts[0] if len(parts) == 1 else np.any(parts, axis=0)  # (H, W)


def _read_checked_part(image: Path, path: Path, reading: Reading) -> np.ndarray:
    mask = read_mask(path, reading)  # (H, W)
    image_size = read_size(image, reading)
    if mask.shape != image_size:
        raise DataError(
            f"the mask {path} is {mask.shape[1]} x {mask.shape[0]} pixels, its image "
            f"{image} is {image_size[1]} x {image_size[0]} (width x height): "
            "save the mask at the size of the image"
        )
    return mask
