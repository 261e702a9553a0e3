"""Reads the folder layout of MVTec AD, which MPDD and many own data sets share.

```
<category>/train/good/*
<category>/test/good/*                             normal
<category>/test/<defect>/*                         anomalous
<category>/ground_truth/<defect>/<stem>_mask.*     or <stem>.*; the folder may be missing
```
"""

from collections import defaultdict
from pathlib import Path

from configs.options import DataOptions
from datasets.reading.images import is_image_file
from datasets.samples import Category, DataError, Sample

NORMAL = "good"


def read_category(root: Path, name: str, options: DataOptions) -> Category:
    """Reads a category of this layout, sorted by path; files that are no images are ignored.

    Args:
        root: The folder above the category folders.
        name: The category.
        options: Of the data set; the layout has none.

    Raises:
        DataError: There are no images in train/good or in test, an anomalous image has no mask
            although there is a ground_truth folder, or it has more than one.
    """
    del options
    folder = root / name
    train = tuple(Sample(path, label=0) for path in image_files(folder / "train" / NORMAL))
    if not train:
        raise DataError(
            f"category {name!r} has no training images: put normal images into "
            f"{folder / 'train' / NORMAL}"
        )
    masks_folder = folder / "ground_truth"
    has_masks = masks_folder.is_dir()
    test = [Sample(path, label=0) for path in image_files(folder / "test" / NORMAL)]
    for defect_folder in subfolders(folder / "test"):
        if defect_folder.name != NORMAL:
            masks = masks_folder / defect_folder.name if has_masks else None
            test.extend(_read_defect(defect_folder, masks))
    if not test:
        raise DataError(
            f"category {name!r} has no test images: put them into {folder / 'test' / NORMAL} and "
            f"{folder / 'test' / '<defect>'}"
        )
    return Category(name, train, tuple(test), has_masks)


def image_files(folder: Path) -> list[Path]:
    """Lists the image files directly in `folder`, sorted; a missing folder has none."""
    if not folder.is_dir():
        return []
    return sorted(filter(is_image_file, folder.iterdir()), key=Path.as_posix)


def subfolders(folder: Path) -> list[Path]:
    """Lists the visible folders directly in `folder`, sorted; a missing folder has none."""
    if not folder.is_dir():
        return []
    visible = (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return sorted(visible, key=Path.as_posix)


def pair_masks(images: list[Path], masks_folder: Path) -> list[Path]:
    """Finds the mask of each image, `<stem>_mask.*` or `<stem>.*` in `masks_folder`.

    Raises:
        DataError: An image has no mask or more than one.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in image_files(masks_folder):
        by_stem[path.stem].append(path)
    return [_mask_of(image, by_stem, masks_folder) for image in images]


def _mask_of(image: Path, by_stem: dict[str, list[Path]], masks_folder: Path) -> Path:
    found = by_stem.get(f"{image.stem}_mask", []) + by_stem.get(image.stem, [])
    if not found:
        raise DataError(
            f"the anomalous image {image} has no mask: expected "
            f"{masks_folder / (image.stem + '_mask.png')} (or {image.stem}.png there; without "
            "any mask folder the run goes on, and pixel metrics are left undefined)"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(
            f"the anomalous image {image} has more than one mask in {masks_folder}: {names}; "
            "keep one"
        )
    return found[0]


def _read_defect(folder: Path, masks_folder: Path | None) -> list[Sample]:
    images = image_files(folder)
    masks = pair_masks(images, masks_folder) if masks_folder else [None] * len(images)
    return [
        Sample(image, label=1, defect=folder.name, mask_path=mask)
        for image, mask in zip(images, masks, strict=True)
    ]
