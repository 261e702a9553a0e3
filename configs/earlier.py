"""config.json of earlier versions in today's words, so that their runs are still read."""

from collections.abc import Mapping
from typing import Any

_OF_TRAINED_NOCO = (
    *("objective", "out_dim", "nu", "radius_init", "radius_weight", "learning_rate"),
    *("weight_decay", "amsgrad", "batch_size", "epochs"),
)
_OF_CLOSED_FORM = ("time", "prototypes", "nearest", "kmeans_positions", "sample_w0")
_OF_EWC = ("ewc_weight", "fisher_file", "fisher_images")


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as this version writes it; one of this version stays as it is.

    The first version had `visa_split` for every structured data set, one set of options for `noco`
    and `noco_cf` with the solver among them, and one for `panda` and `panda_ewc` with the variant.
    Until `noco_cf` became local, it was what `noco_exact` is.
    What is not of that form is left alone: whoever reads it says what is wrong.
    """
    values = dict(config)
    method = values.get("method")
    split = values.pop("visa_split", None)
    if split not in (None, "auto") and values.get("dataset") == "visa":
        values["data"] = {"split": split}
    if not isinstance(method, Mapping):
        return values
    options = dict(method)
    name = values.get("method_name")
    if name in ("noco", "noco_cf") and "solver" in options:
        closed_form = options.pop("solver") == "closed_form"
        values["method_name"] = "noco_cf" if closed_form else "noco"
        _drop(options, _OF_TRAINED_NOCO if closed_form else _OF_CLOSED_FORM)
    if values.get("method_name") == "noco_cf" and "time" in options:
        values["method_name"] = "noco_exact"
    if name in ("panda", "panda_ewc") and "variant" in options:
        is_elastic = options.pop("variant") == "ewc"
        values["method_name"] = "panda_ewc" if is_elastic else "panda"
        _drop(options, () if is_elastic else _OF_EWC)
    if name == "mean_shifted":
        options = {"momentum": 0.0, "clip_norm": None} | options
    if str(name).startswith("anomalib:"):
        options.setdefault("model", str(name).partition(":")[2])
    values["method"] = options
    return values


def _drop(options: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        options.pop(name, None)
