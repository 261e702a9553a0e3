"""Features of a set of images, extracted once and read many times by small heads."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from utils.cli import UsageError

STORES = ("auto", "device", "host")
DEVICE_SHARE = 0.4
"""Share of a GPU's free memory that `auto` gives to one bank."""


class Extractor(Protocol):
    """What the bank needs of a backbone."""

    @property
    def device(self) -> torch.device:
        """Where it runs, and where the heads will."""
        ...

    def assemble(self, maps: list[Tensor]) -> Tensor:
        """Join the stages' maps into features (B, C, H, W), float32."""
        ...

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Run the backbone on uint8 images (B, 3, S, S); one (B, C_l, H_l, W_l) per stage."""
        ...


class ImageBatch(Protocol):
    """A batch of a loader."""

    @property
    def indices(self) -> list[int]:
        """Positions in the data set."""
        ...

    @property
    def images(self) -> Tensor:
        """Images (B, 3, S, S), uint8."""
        ...


class ImageLoader(Protocol):
    """Batches of images in the data set's order; `num_images` counts unreadable ones too."""

    num_images: int

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield the batches."""
        ...


class FeatureBank:
    """Stored features of N images.

    Each stage is kept at its own resolution in half precision and the stages are joined when read.
    For a WideResNet50 that takes a quarter of the memory of the joined 56 x 56 features, and the
    values are the same up to the rounding to half precision.

    Attributes:
        stages: one (N, H_l, W_l, C_l) tensor per stage, channels last.
        indices: position in the data set of each image of the bank; an unreadable image that was
            left out is missing here.
        channels: channels of the joined features.
        extract_seconds: time the extraction took, of the whole bank where this is a subset.
    """

    def __init__(
        self,
        stages: Sequence[Tensor],
        indices: Sequence[int],
        *,
        assemble: Callable[[list[Tensor]], Tensor],
        device: torch.device,
        rows: Tensor | None = None,
        extract_seconds: float = 0.0,
    ) -> None:
        self.stages = tuple(stages)
        self.indices = list(indices)
        self.channels = sum(s.shape[-1] for s in self.stages)
        self.extract_seconds = extract_seconds
        self._assemble = assemble
        self._device = device
        self._rows = torch.arange(len(self.indices)) if rows is None else rows

    @classmethod
    def extract(
        cls,
        extractor: Extractor,
        loader: ImageLoader,
        *,
        store: str = "auto",
        dtype: torch.dtype = torch.float16,
        description: str = "features",
    ) -> "FeatureBank":
        """Run every image of `loader` through the backbone once.

        Args:
            extractor: the backbone; its stage maps are what is stored.
            loader: batches of images, in order.
            store: "device" keeps the features where the heads run, "host" in main memory, "auto"
                on the device if they fit in `DEVICE_SHARE` of its free memory.
            dtype: of the stored features.
            description: what messages and the progress bar call the images.

        Raises:
            UsageError: not one image could be read.
            FloatingPointError: a feature is beyond the range of `dtype`.
        """
        start_time = time.perf_counter()
        stages: list[Tensor] = []
        indices: list[int] = []
        with tqdm(total=loader.num_images, desc=description, leave=False, disable=None) as bar:
            for batch in loader:
                maps = [
                    rearrange(m, "b c h w -> b h w c").to(dtype)
                    for m in extractor.stage_maps(batch.images)
                ]
                if not stages:
                    place = _place(maps, loader.num_images, extractor.device, store)
                    stages = [
                        torch.empty((loader.num_images, *m.shape[1:]), dtype=dtype, device=place)
                        for m in maps
                    ]
                start, stop = len(indices), len(indices) + len(batch.indices)
                for stage, stage_map in zip(stages, maps, strict=True):
                    stage[start:stop] = stage_map
                indices.extend(batch.indices)
                bar.update(len(batch.indices))
        if not indices:
            raise UsageError(f"{description}: not one image could be read")
        stages = [s[: len(indices)] for s in stages]
        for stage in stages:
            _check_finite(stage, description)
        return cls(
            stages,
            indices,
            assemble=extractor.assemble,
            device=extractor.device,
            extract_seconds=time.perf_counter() - start_time,
        )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Memory the stored features take, in bytes."""
        return sum(s.numel() * s.element_size() for s in self.stages)

    def subset(self, rows: Sequence[int] | np.ndarray | Tensor) -> "FeatureBank":
        """Return a view of the images at `rows` of this bank; nothing is copied."""
        wanted = torch.as_tensor(rows, dtype=torch.long)
        chosen = self._rows[wanted]
        indices = [self.indices[i] for i in wanted.tolist()]
        return FeatureBank(
            self.stages,
            indices,
            assemble=self._assemble,
            device=self._device,
            rows=chosen,
            extract_seconds=self.extract_seconds,
        )

    @staticmethod
    def join(first: "FeatureBank", second: "FeatureBank") -> "FeatureBank":
        """Return a bank of the images of both, copied; `indices` counts them anew."""
        stages = [
            torch.cat([a[first._rows.to(a.device)], b[second._rows.to(b.device)].to(a.device)])
            for a, b in zip(first.stages, second.stages, strict=True)
        ]
        count = len(first) + len(second)
        return FeatureBank(stages, range(count), assemble=first._assemble, device=first._device)

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yield features (B, C, H, W), float32, on the device of the heads.

        Args:
            batch_size: images per batch; the last one may be smaller.
            generator: a CPU generator; when given the images are shuffled, else they come in order.
        """
        rows = self._rows
        if generator is not None:
            rows = rows[torch.randperm(len(rows), generator=generator)]
        for chunk in rows.split(batch_size):
            yield self._assemble([self._read(stage, chunk) for stage in self.stages])

    def _read(self, stage: Tensor, rows: Tensor) -> Tensor:
        chosen = stage[rows.to(stage.device)].to(self._device)
        return rearrange(chosen, "b h w c -> b c h w")


def _place(
    maps: Sequence[Tensor], num_images: int, device: torch.device, store: str
) -> torch.device:
    """Choose where a bank of `num_images` such maps lives."""
    if store not in STORES:
        raise ValueError(f"store {store!r} is not one of {', '.join(STORES)}")
    if store == "host" or device.type == "cpu":
        return torch.device("cpu")
    if store == "device":
        return device
    needed = sum(m[0].numel() * m.element_size() for m in maps) * num_images
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return device if needed <= DEVICE_SHARE * free else torch.device("cpu")


def _check_finite(stage: Tensor, description: str) -> None:
    for chunk in stage.split(64):
        if not torch.isfinite(chunk).all():
            raise FloatingPointError(
                f"{description}: a feature is not finite in {stage.dtype}; weights or precision "
                "(--precision) do not suit this backbone"
            )
