"""Experiments on structured data: a defect is a part of the image."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from configs.experiment import Experiment
from configs.options import Beside, NotNegative, Odd, OptionalInt, Since

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
        if self.scale_on == "test":
            said += "; OPTIMISTIC: scales set on normal test images"
        if self.test_batches:
            said += f"; NOT ALL TEST IMAGES: batches of {self.test_batches}, the last left out"
        return said

    @property
    def map_size(self) -> int:
        """Side in pixels of the anomaly maps."""
        return self.input_size
