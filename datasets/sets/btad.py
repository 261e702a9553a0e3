"""BTAD (Mishra et al., ISIE 2021): 3 industrial products in a layout of its own.

```
<category>/train/ok/*
<category>/test/ok/*                               normal
<category>/test/ko/*                               anomalous
<category>/ground_truth/ko/<stem>.*                .png or .bmp, whatever the image has
```
"""

from pathlib import Path

from configs.options import DataOptions
from datasets.data_set import WHOLE_224, WIDE_RESNET50, StructuredSet
from datasets.reading.mvtec_layout import image_files, pair_masks
from datasets.samples import Category, DataError, Sample

NORMAL, DEFECT = "ok", "ko"


def read_category(root: Path, name: str, options: DataOptions) -> Category:
    """Reads one category of BTAD, sorted by path.

    Args:
        root: The folder that holds the category folders.
        name: The category.
        options: BTAD has none.

    Raises:
        DataError: There are no images for training or test, or an anomalous image has no mask.
    """
    del options
    folder = root / name
    train = tuple(Sample(path, label=0) for path in image_files(folder / "train" / NORMAL))
    normals = [Sample(path, label=0) for path in image_files(folder / "test" / NORMAL)]
    anomalies = image_files(folder / "test" / DEFECT)
    masks = pair_masks(anomalies, folder / "ground_truth" / DEFECT)
    defects = [
        Sample(path, label=1, defect=DEFECT, mask_path=mask)
        for path, mask in zip(anomalies, masks, strict=True)
    ]
    for images, place in ((train, "train/ok"), (normals + defects, "test/ok or test/ko")):
        if not images:
            raise DataError(f"category {name!r} of BTAD has no images in {folder / place}")
    return Category(name, train, (*normals, *defects), has_masks=True)


DATA_SET = StructuredSet(
    read=read_category,
    categories=("01", "02", "03"),
    page="BTAD: https://github.com/pankajmishra000/VT-ADL",
    experiment={"data_root": Path("data/btad"), **WIDE_RESNET50, **WHOLE_224},
)
