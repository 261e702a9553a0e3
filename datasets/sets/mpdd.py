"""MPDD (Jezek et al., ICUMT 2021): 6 kinds of painted metal parts, in the layout of MVTec AD."""

from pathlib import Path

from datasets.data_set import LANCZOS_CROP_224, WIDE_RESNET50, StructuredSet
from datasets.reading.mvtec_layout import read_category

DATA_SET = StructuredSet(
    read=read_category,
    categories=(
        *("bracket_black", "bracket_brown", "bracket_white"),
        *("connector", "metal_plate", "tubes"),
    ),
    page="MPDD: https://github.com/stepanje/MPDD",
    experiment={"data_root": Path("data/mpdd"), **WIDE_RESNET50, **LANCZOS_CROP_224},
)
