"""MVTec AD (Bergmann et al., CVPR 2019): 5 textures and 10 objects with defects."""

from pathlib import Path

from datasets.data_set import OPENCV_CROP_224, WIDE_RESNET50, StructuredSet
from datasets.reading.mvtec_layout import read_category

TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
OBJECTS = (
    *("bottle", "cable", "capsule", "hazelnut", "metal_nut"),
    *("pill", "screw", "toothbrush", "transistor", "zipper"),
)

DATA_SET = StructuredSet(
    read=read_category,
    categories=TEXTURES + OBJECTS,
    groups={"mean_textures": TEXTURES, "mean_objects": OBJECTS},
    page="MVTec AD: https://www.mvtec.com/company/research/datasets/mvtec-ad",
    experiment={"data_root": Path("data/mvtec"), **WIDE_RESNET50, **OPENCV_CROP_224},
)
