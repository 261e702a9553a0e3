"""VisA (Zou et al., ECCV 2022): 12 objects in a layout of its own.

```
<category>/Data/Images/Normal/*.JPG
<category>/Data/Images/Anomaly/*.JPG
<category>/Data/Masks/Anomaly/*.png      values count the kinds of defect from 1
split_csv/1cls.csv                       object, split, label, image, mask
```
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.options import DataOptions
from datasets.data_set import LANCZOS_CROP_224, WIDE_RESNET50, StructuredSet
from datasets.reading.mvtec_layout import image_files, pair_masks
from datasets.samples import Category, DataError, Sample

_DEFECT = "anomaly"
_COLUMNS = ("object", "split", "label", "image", "mask")
_NUM_TEST_NORMALS = 100


@dataclass(frozen=True, kw_only=True)
class VisaOptions(DataOptions):
    """How VisA's normal images are split."""

    split: Literal["auto", "csv", "last100"] = "auto"
    """The official one-class split of split_csv/1cls.csv, or NoCo's released code's last 100 normal
    file names for the test; auto takes the csv where it is present."""


def read_category(root: Path, name: str, options: VisaOptions) -> Category:
    """Reads one category of VisA, sorted by path.

    Args:
        root: The folder that holds the category folders and split_csv.
        name: The category.
        options: The split.

    Raises:
        DataError: The csv asked for is missing, lacks a column or names a missing file; there
            are no images for training or test; an anomalous image has no mask.
    """
    split_file, split = root / "split_csv" / "1cls.csv", options.split
    if split == "csv" and not split_file.is_file():
        raise DataError(
            f"the official split {split_file} is missing: take split_csv from VisA's download, or "
            "choose the split last100"
        )
    if split != "last100" and split_file.is_file():
        category = _read_csv_split(root, name, split_file)
    else:
        category = _read_last100_split(root / name, name)
    if not category.train or not category.test:
        part = "test" if category.train else "training"
        raise DataError(f"category {name!r} of VisA has no {part} images in {root / name}")
    return category


def _read_last100_split(folder: Path, name: str) -> Category:
    images_folder = folder / "Data" / "Images"
    normals = image_files(images_folder / "Normal")
    if not normals:
        raise DataError(
            f"category {name!r} has no images in {images_folder / 'Normal'}: VisA is read as "
            "downloaded; a copy converted to train and test folders is read as `folder`"
        )
    if len(normals) <= _NUM_TEST_NORMALS:
        raise DataError(
            f"category {name!r} has {len(normals)} normal images: the split last100 tests on "
            f"{_NUM_TEST_NORMALS} and needs more than that to train"
        )
    anomalies = image_files(images_folder / "Anomaly")
    masks_folder = folder / "Data" / "Masks" / "Anomaly"
    has_masks = masks_folder.is_dir()
    masks = pair_masks(anomalies, masks_folder) if has_masks else [None] * len(anomalies)
    test = [Sample(path, label=0) for path in normals[-_NUM_TEST_NORMALS:]]
    test += [
        Sample(path, label=1, defect=_DEFECT, mask_path=mask)
        for path, mask in zip(anomalies, masks, strict=True)
    ]
    train = tuple(Sample(path, label=0) for path in normals[:-_NUM_TEST_NORMALS])
    return Category(name, train, tuple(test), has_masks)


def _read_csv_split(root: Path, name: str, split_file: Path) -> Category:
    with split_file.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{split_file} lacks the column {', '.join(missing)}")
        rows = [row for row in reader if row["object"] == name]
    if not rows:
        raise DataError(f"{split_file} has no rows for the category {name!r}")
    samples: dict[str, list[Sample]] = {"train": [], "test": []}
    for row in sorted(rows, key=lambda row: (row["label"] != "normal", row["image"])):
        if row["split"] not in samples:
            raise DataError(f"{split_file} puts {row['image']} into the split {row['split']!r}")
        samples[row["split"]].append(_sample(root, row, split_file))
    anomalous_training = [sample.path for sample in samples["train"] if sample.label]
    if anomalous_training:
        raise DataError(
            f"{split_file} trains on the anomalous image {anomalous_training[0]}: "
            "use VisA's one-class split"
        )
    return Category(name, tuple(samples["train"]), tuple(samples["test"]), has_masks=True)


def _sample(root: Path, row: dict[str, str], split_file: Path) -> Sample:
    image = root / row["image"]
    if not image.is_file():
        raise DataError(f"{split_file} names an image that is missing: {image}")
    if row["label"] == "normal":
        return Sample(image, label=0)
    mask = root / row["mask"]
    if not mask.is_file():
        raise DataError(f"the anomalous image {image} has no mask: {split_file} names {mask}")
    return Sample(image, label=1, defect=_DEFECT, mask_path=mask)


DATA_SET = StructuredSet(
    read=read_category,
    options=VisaOptions(),
    categories=(
        *("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2"),
        *("pcb1", "pcb2", "pcb3", "pcb4", "pipe_fryum"),
    ),
    page="VisA: https://github.com/amazon-science/spot-diff",
    experiment={"data_root": Path("data/visa"), **WIDE_RESNET50, **LANCZOS_CROP_224},
)
