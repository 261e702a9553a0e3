"""Experiments on semantic data: an image of another class is the anomaly."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from configs.experiment import Experiment
from configs.options import Since


@dataclass(frozen=True, kw_only=True)
class SemanticExperiment(Experiment):
    """Globally pooled features, a 1 x 1 grid; the score is the map itself."""

    task: ClassVar[str] = "semantic"

    protocol: Literal["one-vs-rest", "leave-one-out"] = "one-vs-rest"
    """One class is normal and the rest anomalous, or all classes but one are normal."""

    pool: Annotated[Literal["mean", "class_token"], Since.LATER] = "mean"
    """What stands for an image: the mean of a stage's map, or of a transformer its class token."""

    @property
    def map_size(self) -> None:
        """None: nothing is localised."""
        return None

    @property
    def title(self) -> str:
        """What a table is about."""
        return f"{self.method_name} on {self.dataset} ({self.protocol}), {self.backbone}"
