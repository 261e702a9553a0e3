"""The options of discover.py, and of the methods that tell kinds of defects apart."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from configs.anomalyncd import AnomalyNcdOptions
from configs.options import (
    Between0And1,
    Bound,
    Fraction,
    MethodOptions,
    PositiveInt,
    check_bounds,
    option_name,
)

Masks = Literal["normal", "mebin", "mebin_released", "true"]
"""How maps become masks: what normal images do not reach, MEBin, or the data set's own masks."""


@dataclass(frozen=True, kw_only=True)
class ContrastOptions(MethodOptions):
    """A defect is how its features differ from those around it: no training, any backbone."""

    clustering: Literal["ward", "kmeans"] = "ward"
    """How defects that differ alike are joined."""
    surroundings: Fraction = 0.107
    """Width of the ring around a mask that it is compared with, as a share of the image's side; 0
    compares with normal images alone."""
    turns: Annotated[int, Bound("1, 2 or 4", lambda value: value in (1, 2, 4))] = 4
    """Quarter turns of an image over which a defect's vector is averaged, so that it says little of
    how the defect lies; each beyond 1 is a pass of the backbone over the images with a mask."""


@dataclass(frozen=True, kw_only=True)
class WholeImageOptions(MethodOptions):
    """The baseline: k-means on the features of whole images, which uses no map."""


@dataclass(frozen=True)
class DiscoverOptions:
    """What is looked at, how many kinds are wanted, and how they are found."""

    run: Positional[Path | None] = None
    """Run folder of train_mvtec.py; may be left out with --maps and --images."""
    kinds: Annotated[int | Literal["auto", "known"], tyro.conf.arg(metavar="K|auto|known")] = "auto"
    """Kinds of defects, "good" not counted: a number, auto (estimated), or known (as many as the
    folders of the test set have names: what published figures assume)."""
    method: Annotated[
        Annotated[ContrastOptions, tyro.conf.subcommand("contrast", prefix_name=False)]
        | Annotated[AnomalyNcdOptions, tyro.conf.subcommand("anomalyncd", prefix_name=False)]
        | Annotated[WholeImageOptions, tyro.conf.subcommand("whole_image", prefix_name=False)],
        tyro.conf.arg(name="method"),
    ] = field(default_factory=ContrastOptions)
    """How kinds are told apart."""

    images: tuple[str, ...] = ()
    """Images to look at (files, folders, quoted patterns); by default the run's test images."""
    maps: Path | None = None
    """Folder of maps of other software, 8-bit, 16-bit or .npy, found by the names of --images."""
    base: Path | None = None
    """anomalyncd: folder of labelled defects of other products, or another finished run whose kinds
    were found."""
    assign: tuple[str, ...] = ()
    """New images, which get the kinds that were found before; nothing is learned."""
    names: Path | None = None
    """Your names of kinds, a csv with the columns kind,name; they stay with the kinds."""

    leave_out: tuple[str, ...] = ()
    """Names of test folders that are not looked at; published figures leave out "combined"."""
    category: str | None = None
    """One category; by default all of the run."""
    seed: int | None = None
    """Seed of the head; needed where the run has several."""
    name: str | None = None
    """Folder below RUN/discovery; by default the method's name."""
    out: Path | None = None
    """Folder instead of RUN/discovery; needed without a run."""

    masks: Masks | None = None
    """How maps become masks. normal: above what maps of held-out normal images reach, and no mask
    for images that score like them (the default of contrast); mebin (of anomalyncd, and with
    --maps); mebin_released; true: the data set's masks, an upper bound that uses labels."""
    false_alarm_rate: Between0And1 = 0.05
    """With --masks normal: share of held-out normal images that may get a mask."""
    most_regions: PositiveInt = 5
    """With --masks normal or true: regions of an image that are kept, the largest."""

    backbone: str = "tf_efficientnet_lite0"
    """Without a run: a timm model whose features tell kinds apart."""
    data_root: Path | None = None
    """Folder of the data set, where it is no longer where the run had it."""
    weights: str | None = None
    """File of the backbone's weights, where it is no longer where the run had it."""
    device: str = "auto"
    """auto ($NOCO_DEVICE, else a GPU where there is one), cpu, cuda, cuda:1."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, each named, instead of ending."""
    workers: int = 2
    """Processes that decode images."""
    cache: Literal["auto", "device", "host", "disk", "none"] = "disk"
    """Where features are kept meanwhile; on disk, memory does not grow with the images."""
    random_seed: int = 3407
    """Of everything random beside the run (AnomalyNCD: 3407)."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.run is None and self.maps is None:
            raise ValueError("name a run folder, or --maps and --images of other software")
        if self.maps is not None and not self.images:
            raise ValueError("--maps needs --images, the images that the maps are of")
        if self.run is None and self.out is None:
            raise ValueError("without a run, --out names the folder to write into")
        if self.maps is not None and self.masks in {"normal", "true"}:
            raise ValueError(f"--masks {self.masks} needs a run's own maps; --maps takes mebin")
        if self.images and self.masks == "true":
            raise ValueError("--masks true needs the run's test images; leave --images out")
        if isinstance(self.kinds, int) and self.kinds < 1:
            raise ValueError(f"--kinds {self.kinds} must be at least 1")
        if self.kinds == "known" and self.images:
            raise ValueError("--kinds known: images without labels have no names to count")
        if isinstance(self.method, AnomalyNcdOptions) == (self.base is None) and not self.assign:
            raise ValueError(
                "anomalyncd learns beside labelled defects of other products: --base FOLDER"
                if self.base is None
                else "--base does nothing without the method anomalyncd; leave it out"
            )
        if self.assign and (self.images or self.maps):
            raise ValueError("--assign brings its own images; leave --images and --maps out")
        if self.workers < 0:
            raise ValueError("--workers cannot be negative")
        for option, why in self._idle():
            raise ValueError(f"{option} does nothing {why}; leave it out")

    def _idle(self) -> Iterator[tuple[str, str]]:
        """Yield options that were given and change nothing, and why."""
        given = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        if self.run is None:
            for name in sorted(given & {"category", "seed", "data_root", "name"}):
                yield option_name(name), "without a run"
        elif "backbone" in given:
            yield "--backbone", "with a run, which has its own"
        if self.assign:
            for name in sorted(
                given & {"kinds", "masks", "false_alarm_rate", "most_regions", "base"}
            ):
                yield option_name(name), "with --assign: kinds and masks are those found before"
            return
        if "false_alarm_rate" in given and self.masks_by != "normal":
            yield "--false-alarm-rate", f"with --masks {self.masks_by}"
        if "most_regions" in given and self.masks_by not in {"normal", "true"}:
            yield "--most-regions", f"with --masks {self.masks_by}"

    @property
    def method_name(self) -> str:
        """As it is named on the command line."""
        if isinstance(self.method, AnomalyNcdOptions):
            return "anomalyncd"
        return "contrast" if isinstance(self.method, ContrastOptions) else "whole_image"

    @property
    def folder_name(self) -> str:
        """Of the folder that is written."""
        return self.name or self.method_name

    @property
    def masks_by(self) -> Masks:
        """How maps become masks, the method's own way where none is asked for."""
        if self.masks is not None:
            return self.masks
        own = self.maps is None and self.method_name != "anomalyncd"
        return "normal" if own else "mebin"

    @property
    def needs_levels(self) -> bool:
        """Whether held-out normal images are measured, which a run's maps alone have."""
        return self.maps is None and self.masks_by in {"normal", "mebin"}

    @property
    def needs_scale(self) -> bool:
        """Whether the range of all maps is needed, for masks or for scores of pieces."""
        return self.masks_by in {"mebin", "mebin_released"} or self.method_name == "anomalyncd"
