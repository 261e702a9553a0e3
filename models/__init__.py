"""Frozen backbone and the detectors that stand on its features."""

import inspect
from typing import Any, Protocol

from models.anomalib_bridge import AnomalibDetector
from models.closed_form import ClosedFormNoco
from models.deep_svdd import DeepSvdd
from models.detector import Detector
from models.errors import ModelError
from models.extractor import FrozenExtractor
from models.feature_norm import FeatureNorm, NormalisedDetector
from models.knn import Knn
from models.mahalanobis import Mahalanobis
from models.mean_shifted import MeanShifted
from models.noco import Noco
from models.padim import Padim
from models.panda import Panda
from models.patchcore import PatchCore
from models.raw_images import RawImages
from models.simplenet import SimpleNet
from models.stpm import Stpm

DETECTORS: dict[str, dict[str, type[Detector]]] = {
    "noco": {"sgd": Noco, "closed_form": ClosedFormNoco},
    "noco_cf": {"sgd": Noco, "closed_form": ClosedFormNoco},
    "simplenet": {"sgd": SimpleNet},
    "simplenet_released": {"sgd": SimpleNet},
    "nc_disc": {"sgd": SimpleNet},
    "patchcore": {"sgd": PatchCore},
    "padim": {"sgd": Padim},
    "knn": {"sgd": Knn},
    "mahalanobis": {"sgd": Mahalanobis},
    "stpm": {"sgd": Stpm},
    "deep_svdd": {"sgd": DeepSvdd},
    "panda": {"sgd": Panda},
    "panda_ewc": {"sgd": Panda},
    "mean_shifted": {"sgd": MeanShifted},
    "anomalib:NAME": {"sgd": AnomalibDetector},
}
"""Method name (NAME stands for any model of the library) -> solver -> detector."""

Extractor = FrozenExtractor | RawImages
"""What turns images into what a method takes."""

WITHOUT_BACKBONE = "lenet"
"""The backbone's name where a method brings a network of its own."""


class Stages(Protocol):
    """What heads on features need to know of an extractor."""

    stage_channels: tuple[int, ...]


def build_extractor(
    method: str,
    backbone: str,
    layers: tuple[int, ...],
    *,
    weights: str = "auto",
    patch_size: int = 3,
    feature_location: str = "bottleneck",
    pooled: bool = False,
    precision: str = "fp32",
    compile_backbone: bool = False,
) -> Extractor:
    """Build what turns images into what a method takes: its features, or the images themselves.

    Args:
        method: as `build_detector` takes it.
        backbone: a timm model name, or `WITHOUT_BACKBONE`.
        layers: stages; this and what follows is as `FrozenExtractor` has it.
        weights: of the backbone.
        patch_size: side of the averaged neighbourhood.
        feature_location: "bottleneck" or "expansion".
        pooled: global averages, for semantic tasks.
        precision: autocast of the backbone.
        compile_backbone: run it through torch.compile.

    Raises:
        ModelError: see `FrozenExtractor`.
    """
    on_images = next(iter(_solvers(method).values())).takes == "images"
    if on_images and backbone == WITHOUT_BACKBONE:
        return RawImages(None)
    extractor = FrozenExtractor(
        backbone,
        layers,
        weights=weights,
        patch_size=patch_size,
        feature_location=feature_location,
        pooled=pooled,
        precision=precision,
        compile_backbone=compile_backbone,
    )
    return RawImages(extractor) if on_images else extractor


def build_detector(method: str, extractor: Stages, options: dict[str, Any]) -> Detector:
    """Build an unfitted detector for what an extractor gives.

    Args:
        method: a key of `DETECTORS`, with the model in place of NAME.
        extractor: of `build_extractor`.
        options: all of the method's options. `solver` chooses the detector and `feature_norm` what
            stands before it; each solver takes its own options from the rest.

    Raises:
        ModelError: an option has no meaning here.
        TypeError: an option that no solver of the method has.
    """
    options = dict(options)
    solvers = _solvers(method)
    kind: Any = solvers[options.pop("solver", "sgd")]
    feature_norm = FeatureNorm(options.pop("feature_norm", "none"), extractor.stage_channels)
    known = {name for solver in solvers.values() for name in option_names(solver)}
    if unknown := set(options) - known:
        raise TypeError(f"{method} has no option {', '.join(sorted(unknown))}")
    mine = {name: options[name] for name in option_names(kind) if name in options}
    if kind.takes == "images":
        assert isinstance(extractor, RawImages)
        of_library = {"name": method.partition(":")[2]} if ":" in method else {}
        return kind(extractor.network, **of_library, **mine)
    head = kind(sum(extractor.stage_channels), **mine)
    return head if feature_norm.kind == "none" else NormalisedDetector(head, feature_norm)


def option_names(kind: type[Detector]) -> list[str]:
    """Return the names of a detector's options: what a config may set."""
    given = {"channels", "backbone", "name"}
    return [name for name in inspect.signature(kind).parameters if name not in given]


def _solvers(method: str) -> dict[str, type[Detector]]:
    library, _, model = method.partition(":")
    name = f"{library}:NAME" if model else method
    if name not in DETECTORS:
        raise ModelError(f"unknown method {method!r} (known: {', '.join(DETECTORS)})")
    return DETECTORS[name]
