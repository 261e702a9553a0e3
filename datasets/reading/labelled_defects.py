"""Reads defects that have names and masks: what new kinds of defects are learnt beside.

```
FOLDER/images/<kind>/*  and  FOLDER/masks/<kind>/*           cropped around the defect already
FOLDER/test/<kind>/**   and  FOLDER/ground_truth/<kind>/**   whole images; test/good is left out
```
Images and masks may lie in folders below a kind, the same for both, as the domains of AeBAD-S do. A
mask has its image's name, or that with `_mask` behind it, whatever the suffixes. The kinds are the
folders of masks, sorted.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePath

from datasets.reading.images import is_image_file, read_size
from datasets.reading.mvtec_layout import NORMAL, composed, subfolders
from datasets.reading.unused import walk
from datasets.samples import DataError

CROPPED = ("images", "masks")
WHOLE = ("test", "ground_truth")
SUFFIX = "_mask"


@dataclass(frozen=True)
class LabelledDefect:
    """An image of a defect with a name.

    Attributes:
        image: Its file.
        mask: The file of the defect's pixels, of the same size.
        kind: The name.
        is_cropped: Whether the image shows the defect's surroundings alone; else it is whole.
    """

    image: Path
    mask: Path
    kind: str
    is_cropped: bool


def read_labelled_defects(folder: Path) -> list[LabelledDefect]:
    """Lists the defects of a folder of either layout, by kind and path.

    Raises:
        DataError: The folder has neither layout or both, a kind has no image or is missing on one
            side, an image has no mask or more than one, a mask has no image or more than one, or
            the two differ in size.
    """
    images, masks = _layout_of(folder)
    is_cropped = images.name == CROPPED[0]
    kinds = [one.name for one in subfolders(masks)]
    if not kinds:
        raise DataError(f"{masks} has no folder: expected {masks}/<kind>/<mask> of each defect")
    for other in subfolders(images):
        if other.name not in kinds and (is_cropped or other.name != NORMAL):
            raise DataError(
                f"{other} has no folder of masks {masks / other.name}: add it, or remove the former"
                + ("" if is_cropped else f"; a folder of normal images is called {NORMAL}")
            )
    found = []
    for kind in kinds:
        for image, mask in _pairs(images / kind, masks / kind):
            found.append(LabelledDefect(image, mask, kind, is_cropped))
    return found


def _layout_of(folder: Path) -> tuple[Path, Path]:
    """Return the folders of images and of masks."""
    if not folder.is_dir():
        raise DataError(f"the folder of labelled defects {folder} does not exist")
    layouts = [
        (folder / images, folder / masks)
        for images, masks in (CROPPED, WHOLE)
        if (folder / images).is_dir() and (folder / masks).is_dir()
    ]
    if len(layouts) != 1:
        has = ", ".join(one.name for one in subfolders(folder)) or "no folders"
        raise DataError(
            f"{folder} must have either images/ and masks/ (cropped defects) or test/ and "
            f"ground_truth/ (whole images), with a folder for each kind in them; it has: {has}"
        )
    return layouts[0]


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Return the images below a folder, each with its mask."""
    by_image = _by_name(images)
    if not by_image:
        raise DataError(
            f"{images} holds no image, {masks} is there: add the images of this kind, or remove "
            "its folders"
        )
    by_mask = _by_name(masks)
    pairs = []
    for name, files in by_image.items():
        image = _only(files, "images", f"the mask {masks / name}.*")
        names = (name, name.with_name(name.name + SUFFIX))
        own = [mask for one in names for mask in by_mask.pop(one, [])]
        if not own:
            raise DataError(
                f"{image} has no mask: expected {masks / name}.png or "
                f"{masks / names[1]}.png; add it, or remove the image"
            )
        mask = _only(own, "masks", f"the image {image}")
        _require_size(image, mask)
        pairs.append((image, mask))
    for left in by_mask.values():
        raise DataError(f"the mask {left[0]} has no image in {images}: add it, or remove the mask")
    return pairs


def _by_name(folder: Path) -> dict[PurePath, list[Path]]:
    """Return the image files below a folder by their path in it without suffix, sorted."""
    found: dict[PurePath, list[Path]] = defaultdict(list)
    if folder.is_dir():
        paths = sorted(place / name for place, names in walk(folder) for name in names)
        for path in filter(is_image_file, paths):
            inside = path.relative_to(folder)
            found[PurePath(composed(inside.with_name(path.stem).as_posix()))].append(path)
    return dict(found)


def _only(files: list[Path], what: str, whose: str) -> Path:
    if len(files) > 1:
        names = " and ".join(str(path) for path in files)
        raise DataError(f"{names} are {what} of one name, for {whose}: keep one")
    return files[0]


def _require_size(image: Path, mask: Path) -> None:
    height, width = read_size(image)
    mask_size = read_size(mask)
    if mask_size != (height, width):
        raise DataError(
            f"the mask {mask} is {mask_size[1]} x {mask_size[0]} pixels, its image {image} is "
            f"{width} x {height} (width x height): save the mask at the size of the image"
        )
