"""Experiments on structured data: a defect is a part of the image."""

from dataclasses import dataclass
from typing import ClassVar

from configs.experiment import Experiment
from configs.options import Beside, NotNegative, Odd


@dataclass(frozen=True, kw_only=True)
class StructuredExperiment(Experiment):
    """Anomaly maps on the grid of patch features; image score = maximum of the map."""

    task: ClassVar[str] = "structured"

    patch_size: Odd = 3
    """Side of the neighbourhood each feature is averaged over (papers: 3)."""
    blur_sigma: NotNegative = 4.0
    """Gaussian blur of the anomaly map, in pixels (papers: 4)."""
    save_maps: Beside[bool] = False
    """Keep every anomaly map, and the masks, in the run folder (large)."""

    @property
    def map_size(self) -> int:
        """Side in pixels of the anomaly maps."""
        return self.input_size
