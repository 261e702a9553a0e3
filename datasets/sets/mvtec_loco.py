"""MVTec LOCO AD (Bergmann et al., IJCV 2022): 5 scenes with logical and structural anomalies.

The layout is that of `datasets.reading.mvtec_layout`, with normal images for validation, kinds
`logical_anomalies` and `structural_anomalies`, a folder of masks for each anomalous image, a file a
defect, and how much of each has to be found. A user's own images so laid out are a `folder`.
"""

from pathlib import Path

from datasets.data_set import WHOLE_224, WIDE_RESNET50, StructuredSet
from datasets.reading.mvtec_layout import read_category

DATA_SET = StructuredSet(
    read=read_category,
    categories=(
        *("breakfast_box", "juice_bottle", "pushpins"),
        *("screw_bag", "splicing_connectors"),
    ),
    page="MVTec LOCO AD: https://www.mvtec.com/company/research/datasets/mvtec-loco",
    experiment={"data_root": Path("data/mvtec_loco"), **WIDE_RESNET50, **WHOLE_224},
)
