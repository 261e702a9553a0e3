"""Experiments on structured data: a defect is a part of the image."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from configs.experiment import Experiment
from configs.options import Beside, Fraction, NotNegative, Odd, OptionalInt, Since
from configs.tiles import OVERLAP, Tiling, tiling_of

JOINT = "multi-class"
"""The protocol of one head for all categories."""


@dataclass(frozen=True, kw_only=True)
class StructuredExperiment(Experiment):
    """Anomaly maps on the grid of patch features; image score = maximum of the map."""

    task: ClassVar[str] = "structured"

    protocol: Annotated[Literal["single-class", "multi-class"], Since.LATER] = "single-class"
    """A head for each category, or one head for all of them, fitted on the normal images of all;
    evaluated on each category either way."""
    patch_size: Odd = 3
    """Side of the neighbourhood each feature is averaged over (papers: 3)."""
    blur_sigma: NotNegative = 4.0
    """Gaussian blur of the anomaly map, in pixels (papers: 4)."""
    tiles: Annotated[OptionalInt, Since.LATER] = None
    """Cut each image into N x N overlapping windows, each as large as images are without: for
    small defects of large images. Images are resized to what the windows need; none sees them
    whole."""
    tile_size: Annotated[OptionalInt, Since.LATER] = None
    """Cut windows of this many pixels out of images of --image-size instead, as many as cover
    them: with the size of your files as --image-size, at their own resolution."""
    tile_overlap: Annotated[Fraction, Since.LATER] = OVERLAP
    """Share of its side that a window shares at least with the next one; maps are blended there."""
    scale_on: Annotated[Literal["held_out", "test"], Since.LATER] = "held_out"
    """Normal images on which methods of several maps rescale them: held-out ones (the data set's
    own where it has some), or those of the test set (optimistic; said in the table's title)."""
    test_batches: Annotated[OptionalInt, Since.LATER] = None
    """Leave out of the test set the last images by path that fill no batch of this many, as some
    released code does (said in the table's title); none keeps all."""
    save_maps: Beside[bool] = False
    """Keep every anomaly map, and the masks, in the run folder (large)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tiling is None and self.tile_overlap != OVERLAP:
            raise ValueError("--tile-overlap is of windows: add --tiles or --tile-size")
        if self.is_joint and self.online:
            raise ValueError(
                "--online follows a head of one category; leave it out of --protocol multi-class"
            )

    @property
    def is_joint(self) -> bool:
        """Whether one head is fitted on all categories."""
        return self.protocol == JOINT

    @property
    def title(self) -> str:
        """What a table is about, and in which ways it looks at the test set."""
        said = super().title
        if self.is_joint:
            said += "; ONE HEAD FOR ALL CATEGORIES (multi-class)"
        if self.tiling is not None:
            windows, size = self.tiling.per_side, self.tiling.image_size
            said += f"; {windows} x {windows} windows of images of {size} pixels"
        if self.scale_on == "test":
            said += "; OPTIMISTIC: scales set on normal test images"
        if self.test_batches:
            said += f"; NOT ALL TEST IMAGES: batches of {self.test_batches}, the last left out"
        return said

    @property
    def tiling(self) -> Tiling | None:
        """Windows that images are cut into, each seen as an image; None where they stay whole."""
        return tiling_of(self.cut_size, self.tiles, self.tile_size, self.tile_overlap)

    @property
    def map_size(self) -> int:
        """Side in pixels of the anomaly maps, which are of whole images."""
        return self.cut_size if self.tiling is None else self.tiling.image_size
