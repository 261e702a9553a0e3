"""The experiment's weights in networks that anomalib asks timm for."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models.backbone.extractor import FrozenExtractor
from models.errors import ModelError


@contextlib.contextmanager
def experiment_weights(backbone: FrozenExtractor, copies: list[nn.Module]) -> Iterator[None]:
    """Let timm answer with the experiment's weights whenever its backbone is wanted pretrained.

    Anomalib's models ask timm for networks by name and take no network from outside. `copies`
    collects those that got the weights. Where the backbone is wanted untrained (the student of
    STFPM) it stays so, and other backbones come from where timm has them.

    Raises:
        ModelError: a model needs stages of the backbone that the experiment did not load.
    """
    create = timm.create_model

    def answer(model_name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if base_name(model_name) != base_name(backbone.backbone):
            return create(model_name, pretrained=pretrained, **options)
        if options.get("features_only") and backbone.feature_location != "bottleneck":
            options["feature_location"] = backbone.feature_location
        net = create(backbone.backbone, pretrained=False, **options)
        if pretrained:
            net.load_state_dict(_weights_for(backbone, net), strict=False)
            copies.append(net)
        return net

    library: Any = timm
    library.create_model = answer
    try:
        yield
    finally:
        library.create_model = create


def _weights_for(backbone: FrozenExtractor, net: nn.Module) -> dict[str, Tensor]:
    """Return the experiment's tensors for a network of its backbone.

    Raises:
        ModelError: the network looks at stages that the experiment did not load.
    """
    weights, wanted = backbone.net.state_dict(), net.state_dict().keys()
    stages: Any = getattr(net, "feature_info", None)
    deepest = max(getattr(stages, "out_indices", [sys.maxsize]))  # whole networks end in no stage
    # The experiment's network ends with its last stage. Others may go on, but nobody looks there.
    enough = deepest <= max(backbone.layers) and weights.keys() <= wanted
    if not (enough or wanted <= weights.keys()):
        asked = "all of it" if deepest == sys.maxsize else f"its stages up to {deepest}"
        raise ModelError(
            f"{backbone.backbone}: the model wants {asked}, and --layers "
            f"{' '.join(map(str, backbone.layers))} load less; name its last stage among --layers"
        )
    return {name: tensor for name, tensor in weights.items() if name in wanted}


def holds_weights(net: nn.Module, backbone: FrozenExtractor) -> bool:
    """Tell whether a network still has the weights that `experiment_weights` gave it."""
    own = net.state_dict()
    weights = _weights_for(backbone, net)
    return all(torch.equal(own[name], w.to(own[name].device)) for name, w in weights.items())


def base_name(model: str) -> str:
    """Return a timm name without the tag of its weights, as anomalib's tables have it."""
    return model.split(".")[0]
