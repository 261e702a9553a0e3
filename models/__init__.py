"""Frozen backbone and the detectors that stand on its features."""

from typing import Any

from models.detector import Detector
from models.noco import Noco
from models.simplenet import SimpleNet

DETECTORS: dict[str, type[Detector]] = {
    "noco": Noco,
    "simplenet": SimpleNet,
    "simplenet_released": SimpleNet,
    "nc_disc": SimpleNet,
}
"""Method name -> detector; the arguments after `channels` are the method's options."""


def build_detector(method: str, channels: int, options: dict[str, Any]) -> Detector:
    """Build an unfitted detector for features of `channels` channels.

    Raises:
        TypeError: an option the detector does not have.
    """
    return DETECTORS[method](channels, **options)
