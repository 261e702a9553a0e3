"""Reads the folder layout of MVTec AD, which MPDD, MVTec LOCO and many own data sets share.

```
<category>/train/good/*
<category>/test/good/*                             normal
<category>/test/<defect>/*                         anomalous
<category>/ground_truth/<defect>/<stem>_mask.*     or <stem>.*, or a folder <stem>/ of masks that
                                                   are joined; ground_truth may be missing
<category>/validation/good/*                       normal, for scales and thresholds; may be missing
<category>/defects_config.json                     where each file of such a folder is one defect:
                                                   [{"defect_name", "pixel_value",
                                                   "saturation_threshold", "relative_saturation"}]
```
"""

import json
import unicodedata
from collections import defaultdict
from pathlib import Path

from configs.options import DataOptions
from datasets.reading.images import is_image_file
from datasets.reading.unused import is_hidden
from datasets.samples import Category, DataError, Sample, Saturation

NORMAL = "good"
_NAMES_OF_NORMAL = frozenset(
    {
        "good",
        "normal",
        "normals",
        "ok",
        "okay",
        "pass",
        "passed",
        "fine",
        "defect_free",
        "no_defect",
    }
)


def read_category(
    root: Path, name: str, options: DataOptions, *, partial_masks: bool = False
) -> Category:
    """Reads a category of this layout, sorted by path; files that are no images are ignored.

    Args:
        root: The folder above the category folders.
        name: The category.
        options: Of the data set; the layout has none.
        partial_masks: Some anomalous images may lack a mask.

    Raises:
        DataError: There are no images in train/good or in test, a folder of test is called like
            normal images, an anomalous image has no mask although there is a ground_truth folder,
            or it has more than one, or defects_config.json cannot be understood.
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
            _ask_if_normal(defect_folder)
            masks = masks_folder / defect_folder.name if has_masks else None
            test.extend(_read_defect(defect_folder, masks, may_lack=partial_masks))
    if not test:
        raise DataError(
            f"category {name!r} has no test images: put them into {folder / 'test' / NORMAL} and "
            f"{folder / 'test' / '<defect>'}"
        )
    validation = tuple(
        Sample(path, label=0) for path in image_files(folder / "validation" / NORMAL)
    )
    saturations = read_saturations(folder / "defects_config.json")
    return Category(name, train, tuple(test), has_masks, validation, saturations)


def read_saturations(path: Path) -> dict[int, Saturation]:
    """Reads how much of each kind of defect has to be found; nothing where there is no file.

    Returns:
        Grey value of a mask -> its saturation.

    Raises:
        DataError: The file is none of this kind.
    """
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = {
            int(entry["pixel_value"]): Saturation(
                float(entry["saturation_threshold"]), bool(entry["relative_saturation"])
            )
            for entry in entries
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not MVTec LOCO's list of defects ({type(error).__name__}: {error}); correct "
            "it, or remove it to do without sPRO"
        ) from None
    if bad := [value for value, one in found.items() if not one.area > 0]:
        raise DataError(f"{path}: the saturation_threshold of pixel_value {bad[0]} must be above 0")
    return found


def image_files(folder: Path) -> list[Path]:
    """Lists the image files directly in `folder`, sorted; a missing folder has none."""
    if not folder.is_dir():
        return []
    return sorted(filter(is_image_file, folder.iterdir()), key=Path.as_posix)


def mask_files(mask: Path) -> list[Path]:
    """Lists the files of a mask: itself, or those of its folder."""
    return image_files(mask) if mask.is_dir() else [mask]


def subfolders(folder: Path) -> list[Path]:
    """Lists the visible folders directly in `folder`, sorted; a missing folder has none."""
    if not folder.is_dir():
        return []
    visible = (path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    return sorted(visible, key=Path.as_posix)


def pair_masks(
    images: list[Path], masks_folder: Path, *, may_lack: bool = False
) -> list[Path | None]:
    """Finds the mask of each image: `<stem>_mask.*` or `<stem>.*` in `masks_folder`, or `<stem>/`.

    Args:
        images: Files.
        masks_folder: Holds the masks; a folder of several belongs to the image of its name.
        may_lack: Return None for an image without a mask.

    Raises:
        DataError: An image has no mask or more than one.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    folders = [path for path in subfolders(masks_folder) if image_files(path)]
    for path in (*image_files(masks_folder), *folders):
        by_stem[composed(path.name if path in folders else path.stem)].append(path)
    return [_mask_of(image, by_stem, masks_folder, may_lack=may_lack) for image in images]


def composed(name: str) -> str:
    """Returns a name with composed letters: macOS decomposes those of the files that it writes."""
    return unicodedata.normalize("NFC", name)


def _mask_of(
    image: Path, by_stem: dict[str, list[Path]], masks_folder: Path, *, may_lack: bool
) -> Path | None:
    stem = composed(image.stem)
    found = by_stem.get(f"{stem}_mask", []) + by_stem.get(stem, [])
    if not found and may_lack:
        return None
    if not found:
        raise DataError(
            f"the anomalous image {image} has no mask: expected "
            f"{masks_folder / (image.stem + '_mask.png')} (or {image.stem}.png there). Without "
            "any mask folder the run goes on, and pixel metrics are undefined; a data set `folder` "
            "leaves such images out of them with --data.partial-masks"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(
            f"the anomalous image {image} has more than one mask in {masks_folder}: {names}; "
            f"keep one, or put them into a folder {image.stem} to have them joined"
        )
    return found[0]


def _ask_if_normal(folder: Path) -> None:
    """Refuses a kind of defect that is called like normal images."""
    if folder.name.lower() in _NAMES_OF_NORMAL:
        raise DataError(
            f"{folder}: are these normal images? Then put them into {folder.with_name(NORMAL)}; "
            "if they show a defect, call the folder otherwise"
        )


def _read_defect(folder: Path, masks_folder: Path | None, *, may_lack: bool) -> list[Sample]:
    images = image_files(folder)
    masks: list[Path | None] = [None] * len(images)
    if masks_folder is not None:
        masks = pair_masks(images, masks_folder, may_lack=may_lack)
    return [
        Sample(image, label=1, defect=folder.name, mask_path=mask)
        for image, mask in zip(images, masks, strict=True)
    ]
