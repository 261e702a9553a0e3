"""Frozen backbone and the detectors that stand on its features."""

import inspect
from collections.abc import Sequence
from typing import Any

from models.closed_form import ClosedFormNoco
from models.detector import Detector
from models.feature_norm import FeatureNorm, NormalisedDetector
from models.noco import Noco
from models.simplenet import SimpleNet

DETECTORS: dict[str, dict[str, type[Detector]]] = {
    "noco": {"sgd": Noco, "closed_form": ClosedFormNoco},
    "noco_cf": {"sgd": Noco, "closed_form": ClosedFormNoco},
    "simplenet": {"sgd": SimpleNet},
    "simplenet_released": {"sgd": SimpleNet},
    "nc_disc": {"sgd": SimpleNet},
}
"""Method name -> solver -> detector."""


def build_detector(method: str, stage_channels: Sequence[int], options: dict[str, Any]) -> Detector:
    """Build an unfitted detector for concatenated features of some stages.

    Args:
        method: a key of `DETECTORS`.
        stage_channels: channels of each stage.
        options: all of the method's options. `solver` chooses the detector and `feature_norm` what
            stands before it; each solver takes its own options from the rest.

    Raises:
        TypeError: an option that no solver of the method has.
    """
    options = dict(options)
    solvers = DETECTORS[method]
    kind = solvers[options.pop("solver", "sgd")]
    feature_norm = FeatureNorm(options.pop("feature_norm", "none"), stage_channels)
    known = {name for solver in solvers.values() for name in _option_names(solver)}
    if unknown := set(options) - known:
        raise TypeError(f"{method} has no option {', '.join(sorted(unknown))}")
    mine = {name: options[name] for name in _option_names(kind) if name in options}
    head = kind(sum(stage_channels), **mine)
    return head if feature_norm.kind == "none" else NormalisedDetector(head, feature_norm)


def _option_names(kind: type[Detector]) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name != "channels"]
