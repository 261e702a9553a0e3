"""The diagonal of the Fisher information of a pretrained classifier, without labels.

F_i is the mean over images x, and over labels y drawn from the classifier's own p(y | x), of
(d log p(y | x) / d theta_i)^2. This is the Fisher information itself, of which the mean over given
labels is an estimate (the "empirical" one), so that any images will do and none needs a label.
"""

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.backbone.checkpoints import read_checkpoint
from models.backbone.extractor import FrozenExtractor
from models.backbone.weights import canonical_name, complete_state
from models.detector import FeatureSource
from models.errors import ModelError

WAY_OUT = {"fisher_file": "name one in"}


def label_free_fisher(
    backbone: FrozenExtractor,
    parameters: Mapping[str, nn.Parameter],
    bank: FeatureSource,
    *,
    num_images: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Compute the Fisher diagonal of some parameters on `num_images` images of a bank.

    Args:
        backbone: the pretrained network; its classifier is loaded from where its weights came from.
        parameters: parameters of a copy of `backbone.net`, by their names there.
        bank: uint8 images.
        num_images: how many of them are used, drawn at random.
        generator: a CPU generator; it draws the images and the labels.

    Returns:
        A tensor of the parameter's shape, on its device, for each name in `parameters`.

    Raises:
        ModelError: the classifier cannot be had.
    """
    classifier = load_classifier(backbone).to(backbone.device)
    by_name = {canonical_name(name): p for name, p in classifier.named_parameters()}
    wanted = [by_name[canonical_name(name)] for name in parameters]
    for parameter in wanted:
        parameter.requires_grad_(True)
    totals = [torch.zeros_like(parameter) for parameter in wanted]
    rows = torch.randperm(len(bank), generator=generator)[:num_images]
    with tqdm(total=len(rows), desc="Fisher diagonal", leave=False, disable=None) as bar:
        for images in bank.subset(rows).batches(32):
            for pixels in backbone.pixels(images).split(1):  # squares of single gradients
                for total, gradient in zip(
                    totals, _draw_gradient(classifier, wanted, pixels, generator), strict=True
                ):
                    total.addcmul_(gradient, gradient)
                bar.update()
    return {name: total / len(rows) for name, total in zip(parameters, totals, strict=True)}


def _draw_gradient(
    classifier: nn.Module, wanted: list[nn.Parameter], pixels: Tensor, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return the gradient of log p(y | x) for one image (1, 3, S, S) and a drawn label y."""
    logits = classifier(pixels)  # (1, K)
    probabilities = logits.detach().double().softmax(dim=1).cpu()
    label = torch.multinomial(probabilities, 1, generator=generator)[:, 0]  # (1,)
    return torch.autograd.grad(F.cross_entropy(logits, label.to(logits.device)), wanted)


def load_classifier(backbone: FrozenExtractor) -> nn.Module:
    """Return the whole pretrained model of a backbone with its classifier, frozen, in eval mode.

    Raises:
        ModelError: the weights are random, or their file holds no classifier.
    """
    name = backbone.backbone
    if backbone.random_weights:
        raise ModelError(
            f"the weights of {name} are random: no classifier has a Fisher information", WAY_OUT
        )
    state, source = complete_state(name, backbone.weights)
    config = timm.get_pretrained_cfg(name)
    head = None if config is None else config.classifier
    head = head[0] if isinstance(head, tuple | list) else head
    if f"{head}.weight" not in state:
        raise ModelError(
            f"{source} holds no classifier of {name}, of which a Fisher information could be "
            "computed",
            WAY_OUT,
        )
    num_classes = len(state[f"{head}.weight"])
    model = timm.create_model(name, pretrained=False, num_classes=num_classes)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def read_fisher(path: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Read a Fisher diagonal: a tensor of its shape for each of `parameters`, by timm's names.

    Tensors of other names are left alone, such as those of frozen layers in the released file.

    Args:
        path: a .safetensors file, or a .pth file that holds tensors only.
        parameters: parameters of a feature network, by their names there.

    Raises:
        ModelError: the file cannot be read, or lacks a tensor, or one has another shape, a negative
            or a non-finite entry.
    """
    try:
        stored = read_checkpoint(path).tensors
    except ModelError as error:
        way_out = {"fisher_file": "name another with"}
        raise ModelError(f"Fisher diagonal: {error}", way_out) from error
    by_name = {canonical_name(name): tensor for name, tensor in stored.items()}
    fisher = {}
    for name, parameter in parameters.items():
        tensor = by_name.get(canonical_name(name))
        if tensor is None:
            raise ModelError(f"the Fisher file {path} holds nothing for {name}")
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"the Fisher file {path}: {name} has shape {tuple(tensor.shape)}, the "
                f"backbone's has {tuple(parameter.shape)}"
            )
        if not (torch.isfinite(tensor) & (tensor >= 0)).all():
            raise ModelError(
                f"the Fisher file {path}: {name} has negative or non-finite entries, as no "
                "Fisher information has"
            )
        fisher[name] = tensor.to(parameter.device, parameter.dtype)
    return fisher
