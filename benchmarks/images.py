"""The images that benchmarks run on: a folder of categories, or the embedded demo."""

from pathlib import Path

import torch

from configs.cache import cache_folder
from datasets.data_set import StructuredSet, find_data_sets
from datasets.reading.loading import BatchLoader, images_of
from datasets.reading.transforms import PairTransform
from datasets.samples import ImageSet, Task
from datasets.tasks.structured import structured_tasks

WHOLE_224 = PairTransform(224, None, "opencv_square")


def read_tasks(data_root: Path | None, *categories: str) -> list[Task]:
    """Return some categories, or all, of a folder; of the demo where there is none."""
    name = "demo" if data_root is None else "folder"
    data_set = find_data_sets(StructuredSet)[name]
    return structured_tasks(data_set, data_root or cache_folder(), categories, data_set.options)


def loader_of(
    images: ImageSet,
    transform: PairTransform = WHOLE_224,
    *,
    batch_size: int = 32,
    workers: int = 2,
    device: torch.device | None = None,
) -> BatchLoader:
    """Return batches of decoded images; processes read them for a GPU, threads for a CPU."""
    return BatchLoader(
        images_of(images, transform),
        batch_size=batch_size,
        workers=workers,
        skip_unreadable=False,
        for_gpu=device is not None and device.type == "cuda",
    )
