"""Experiments on semantic data: an image of another class is the anomaly."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configs.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class SemanticExperiment(Experiment):
    """Globally pooled features, a 1 x 1 grid; the score is the map itself."""

    task: ClassVar[str] = "semantic"

    protocol: Literal["one-vs-rest", "leave-one-out"] = "one-vs-rest"
    """One class is normal and the rest anomalous, or all classes but one are normal."""

    @property
    def map_size(self) -> None:
        """None: nothing is localised."""
        return None

    @property
    def title(self) -> str:
        """What a table is about."""
        return f"{self.method_name} on {self.dataset} ({self.protocol}), {self.backbone}"
