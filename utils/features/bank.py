"""Features of a set of images, extracted once and read many times by small heads.

python -m utils.features.bank --list           what `--cache disk` stored
python -m utils.features.bank --clear [KEY]    delete one entry, or all
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from datasets.samples import ImageLoader
from models.detector import Extractor
from utils.cli import exits_cleanly
from utils.errors import UsageError
from utils.features.features import Features, Rows, boxes_at, joined_boxes, rounded_maps
from utils.features.store import Entry, EntryWriter, FeatureStore, default_folder
from utils.features.thumbnails import thumbnails

STORES = ("auto", "device", "host", "disk")
DEVICE_SHARE = 0.4
"""Share of a GPU's free memory that `auto` gives to one bank."""
HOST_SHARE = 0.4
"""Share of the available main memory that `auto` gives to one bank."""


class FeatureBank(Features):
    """Stored features of N images.

    Each stage is kept at its own resolution in half precision and the stages are joined when read.
    For a WideResNet50 that takes a quarter of the memory of the joined 56 x 56 features, and the
    values are the same up to the rounding to half precision.

    Attributes:
        stages: one (N, H_l, W_l, C_l) tensor per stage, channels last.
        extract_seconds: time the extraction took, of the whole bank where this is a subset; of
            opening the files where the features were on disk already.
        pass_seconds: time the extraction took, be it in an earlier run.

    See `Features` for the others.
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
        pass_seconds: float = 0.0,
        skipped: Sequence[str] = (),
        thumbnails: Tensor | None = None,
    ) -> None:
        super().__init__(
            indices,
            sum(s.shape[-1] for s in stages if s.is_floating_point()) or stages[-1].shape[-1],
            assemble,
            extract_seconds=extract_seconds,
            pass_seconds=pass_seconds,
            skipped=skipped,
        )
        self.stages = tuple(stages)
        self.thumbnails = thumbnails
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
        folder: Path | None = None,
    ) -> "FeatureBank":
        """Run every image of `loader` through the backbone once.

        Args:
            extractor: the backbone; its stage maps are what is stored.
            loader: batches of images, in order.
            store: "device" keeps the features where the heads run, "host" in main memory, "disk"
                in `folder`, where later runs find them. "auto" reads them from there if it can;
                else it takes the first of a GPU, main memory and disk that has room.
            dtype: of the stored features; images, which methods that train a backbone take in
                place of features, stay uint8.
            description: what messages and the progress bar call the images.
            folder: of the store on disk; None for none.

        Raises:
            UsageError: not one image could be read, or the disk is full.
            FloatingPointError: a feature is beyond the range of `dtype`.
        """
        start = time.perf_counter()
        identity = {}
        found: Entry | _InMemory | None = None
        disk = FeatureStore(folder) if folder is not None and store in {"auto", "disk"} else None
        if disk is not None:
            identity = extractor.fingerprint() | loader.fingerprint() | {"dtype": str(dtype)}
            found = disk.find(identity)
        if found is None:
            found = _extract(extractor, loader, store, dtype, description, disk, identity)
        return cls(
            _uploaded(found.stages(), extractor.device, store),
            found.indices,
            assemble=extractor.assemble,
            device=extractor.device,
            extract_seconds=time.perf_counter() - start,
            pass_seconds=found.seconds,
            skipped=found.skipped,
            thumbnails=found.thumbnails(),
        )

    @property
    def nbytes(self) -> int:
        """Memory the stored features take, in bytes."""
        return sum(s.numel() * s.element_size() for s in self.stages)

    def subset(self, rows: Rows) -> "FeatureBank":
        """Return a view of the images at `rows` of this bank; nothing is copied."""
        wanted = torch.as_tensor(rows, dtype=torch.long)
        chosen = self._rows[wanted]
        indices = [self.indices[i] for i in wanted.tolist()]
        found = FeatureBank(
            self.stages,
            indices,
            assemble=self._assemble,
            device=self._device,
            rows=chosen,
            extract_seconds=self.extract_seconds,
            pass_seconds=self.pass_seconds,
            skipped=self.skipped,
            thumbnails=None if self.thumbnails is None else self.thumbnails[wanted],
        )
        found.held_out = self.held_out
        found.boxes = boxes_at(self, wanted)
        return found

    def join(self, other: "FeatureBank") -> "FeatureBank":
        """Return a bank of the images of both, copied; `indices` counts them anew."""
        stages = [
            torch.cat([a[self._rows.to(a.device)], b[other._rows.to(b.device)].to(a.device)])
            for a, b in zip(self.stages, other.stages, strict=True)
        ]
        count = len(self) + len(other)
        found = FeatureBank(stages, range(count), assemble=self._assemble, device=self._device)
        found.boxes = joined_boxes([self, other])
        return found

    def _maps(self, batch_size: int, order: Tensor) -> Iterator[list[Tensor]]:
        for chunk in self._rows[order].split(batch_size):
            yield [self._read(stage, chunk) for stage in self.stages]

    def _read(self, stage: Tensor, rows: Tensor) -> Tensor:
        if self._device.type == "cuda" and stage.device.type == "cpu":
            # The copy does not wait: the next rows are gathered while the GPU computes.
            pinned = torch.empty((len(rows), *stage.shape[1:]), dtype=stage.dtype, pin_memory=True)
            torch.index_select(stage, 0, rows, out=pinned)
            chosen = pinned.to(self._device, non_blocking=True)
        else:
            chosen = stage[rows.to(stage.device)].to(self._device)
        return rearrange(chosen, "b h w c -> b c h w")


@dataclass(frozen=True)
class _InMemory:
    """Extracted features in main memory or on a device; has what an entry on disk has."""

    tensors: list[Tensor]
    indices: list[int]
    skipped: list[str]
    seconds: float
    small: Tensor

    def thumbnails(self) -> Tensor:
        return self.small

    def stages(self) -> list[Tensor]:
        return [tensor[: len(self.indices)] for tensor in self.tensors]


def _extract(
    extractor: Extractor,
    loader: ImageLoader,
    store: str,
    dtype: torch.dtype,
    description: str,
    disk: FeatureStore | None,
    identity: dict[str, Any],
) -> _InMemory | Entry:
    """Run the backbone over the images; the first batch tells how much room they need."""
    began = time.perf_counter()
    indices: list[int] = []
    tensors: list[Tensor] = []
    small: list[Tensor] = []
    writer: EntryWriter | None = None
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=loader.num_images, desc=description, leave=False, disable=None)
        )
        for batch in loader:
            maps = rounded_maps(extractor, batch.images, dtype, description, at_once=loader.at_once)
            small.append(thumbnails(batch.images))
            if not indices:
                needed = sum(m[0].numel() * m.element_size() for m in maps) * loader.num_images
                place = _place(needed, extractor.device, store, disk is not None)
                if place is None:
                    assert disk is not None
                    writer = stack.enter_context(disk.writing(identity, needed))
                else:
                    tensors = [
                        torch.empty((loader.num_images, *m.shape[1:]), dtype=m.dtype, device=place)
                        for m in maps
                    ]
            if writer is None:
                start, stop = len(indices), len(indices) + len(batch.indices)
                for tensor, stage_map in zip(tensors, maps, strict=True):
                    tensor[start:stop] = stage_map
            else:
                writer.append(maps)
            indices.extend(batch.indices)
            bar.update(len(batch.indices))
        if not indices:
            raise UsageError(f"{description}: not one image could be read")
        skipped = [why for _, why in loader.skipped]
        seconds = time.perf_counter() - began
        if writer is not None:
            return writer.finish(indices, skipped, description, seconds, torch.cat(small))
    return _InMemory(tensors, indices, skipped, seconds, torch.cat(small))


def _place(needed: int, device: torch.device, store: str, has_disk: bool) -> torch.device | None:
    """Choose where features of so many bytes live; None is on disk."""
    if store not in STORES or (store == "disk" and not has_disk):
        raise ValueError(f"store {store!r} is not one of {', '.join(STORES)}, or has no folder")
    host = torch.device("cpu")
    if store != "auto":
        return {"device": device, "host": host, "disk": None}[store]
    if _has_room(device, needed):
        return device
    if has_disk and needed > HOST_SHARE * psutil.virtual_memory().available:
        return None
    return host


def _uploaded(stages: list[Tensor], device: torch.device, store: str) -> list[Tensor]:
    """Return stages on a GPU where they fit, so that they are copied once and not each epoch."""
    needed = sum(s.numel() * s.element_size() for s in stages if s.device.type == "cpu")
    if store == "host" or not needed or not _has_room(device, needed):
        return stages
    return [stage.to(device) for stage in stages]


def _has_room(device: torch.device, needed: int) -> bool:
    """Tell whether a device is a GPU on which one bank may take so many bytes."""
    return device.type == "cuda" and needed <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> None:
    """List or delete the features that `--cache disk` stored."""
    parser = argparse.ArgumentParser(prog="python -m utils.features.bank", description=main.__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="what is stored, last used first")
    action.add_argument("--clear", nargs="*", metavar="KEY", help="delete these, or everything")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="%(default)s")
    arguments = parser.parse_args(argv)
    stored = FeatureStore(arguments.folder)
    if arguments.list:
        entries = stored.entries()
        for entry in entries:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.folder.stat().st_mtime))
            backbone = entry.identity.get("backbone", "images")
            sys.stdout.write(
                f"{entry.folder.name}  {entry.num_bytes / 1e6:9.1f} MB  {len(entry.indices):7d} "
                f"images  used {used}  {backbone}  {entry.description}\n"
            )
        total = sum(entry.num_bytes for entry in entries) / 1e6
        sys.stdout.write(f"{len(entries)} entries, {total:.1f} MB in {arguments.folder}\n")
    else:
        deleted = stored.clear(arguments.clear)
        sys.stdout.write(f"{len(deleted)} entries deleted from {arguments.folder}\n")


if __name__ == "__main__":
    main()
