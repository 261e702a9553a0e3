"""Options of models that other libraries bring."""

from dataclasses import dataclass

from configs.options import OptionalInt, require_positive


@dataclass(frozen=True, kw_only=True)
class AnomalibConfig:
    """A model of anomalib, on our images and splits, scored by our metrics."""

    epochs: OptionalInt = None
    """Passes over the training images; none for what the model's own trainer asks for."""
    batch_size: OptionalInt = None
    """Images per step; none for what the model's own configuration has."""
    model_options: tuple[str, ...] = ()
    """Arguments of the model as KEY=VALUE words, e.g. coreset_sampling_ratio=0.01."""

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "batch_size")
        if wrong := [word for word in self.model_options if "=" not in word]:
            raise ValueError(f"--method.model-options {wrong[0]!r} must be KEY=VALUE")
