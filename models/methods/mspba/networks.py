"""The networks of MSPBA: one shared backbone, a head for each size of patch, and classifiers."""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.models import FeatureListNet
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn

from models.backbone.extractor import FrozenExtractor, channels_first
from models.backbone.rewriting import accelerated
from models.errors import ModelError
from models.methods.mspba.sampling import DIRECTIONS
from models.training.initial_weights import draw_convolution, draw_linear

SLOPE = 0.1
"""Of the leaky ReLUs."""
CLASSIFIER_WIDTHS = (128, 256, 512)


@dataclass(frozen=True)
class Published:
    """Where in a VGG16 the head of a size of patch stands, and what it is made of.

    Attributes:
        grid: side of the map that it gets.
        widths: channels after each convolution but the last, which has those of the embedding.
        kernels: side of each convolution, without padding.
    """

    grid: int
    widths: tuple[int, ...]
    kernels: tuple[int, ...]


PUBLISHED = {
    64: Published(4, (256, 128, 64), (2, 2, 2, 1)),  # relu5_3
    32: Published(8, (256, 128, 128, 64), (3, 3, 2, 2, 2)),  # relu3_3
    16: Published(8, (128, 64, 32), (3, 3, 3, 2)),  # relu2_2
}


def published_for(size: int) -> Published:
    """Return the head for patches of `size` pixels: that of the published size nearest by ratio."""
    return PUBLISHED[min(PUBLISHED, key=lambda known: abs(math.log2(size / known)))]


def choose_stage(size: int, strides: tuple[int, ...]) -> int:
    """Return which stage suits patches of `size` pixels: the one of the head's grid, or nearest.

    For the published sizes 64, 32 and 16 that is stride 16, 4 and 2. Of two that are as near, the
    finer.
    """
    wanted = size / published_for(size).grid
    return min(range(len(strides)), key=lambda i: (abs(math.log2(strides[i] / wanted)), strides[i]))


def stage_map(net: nn.Module, pixels: Tensor, index: int) -> Tensor:
    """Return one of the maps that a timm feature network returns, (B, C_l, H_l, W_l).

    What comes after its stage is not run where the kind of network shows what that is: for patches
    of 16 pixels that is two thirds of a VGG16.
    """
    if isinstance(net, FeatureListNet):
        last = list(net.return_layers)[index]
        found = pixels
        for name, module in net.items():
            found = module(found)
            if name == last:
                break
        if isinstance(found, Tensor):
            return channels_first(net, [found])[0]
    if isinstance(net, EfficientNetFeatures) and net.feature_hooks is None:
        blocks = net.feature_info.get_dicts()[index]["stage"]
        return net.blocks[:blocks](net.bn1(net.conv_stem(pixels)))
    return channels_first(net, net(pixels))[index]


class Head(nn.Module):
    """From a stage's map of a patch to its embedding, every entry in -1 to 1.

    The convolutions are the published ones. A larger map is first averaged to the published grid;
    in a smaller one kernels are no larger than what is left of it.

    Args:
        published: what it is made of.
        channels: of the stage.
        grid: side of the stage's map.
        outputs: numbers D of the embedding.
    """

    def __init__(self, published: Published, channels: int, grid: int, outputs: int) -> None:
        super().__init__()
        self.grid = min(grid, published.grid)
        self.is_larger = grid > published.grid
        side, layers = self.grid, []
        for width, wanted in zip((*published.widths, outputs), published.kernels, strict=True):
            kernel = min(wanted, side)
            layers.append(nn.Conv2d(channels, width, kernel))
            channels, side = width, side - kernel + 1
        assert side == 1
        self.layers = nn.ModuleList(layers)

    def forward(self, maps: Tensor) -> Tensor:
        """Return embeddings (n, D) of maps (n, C, H, W)."""
        found = F.adaptive_avg_pool2d(maps, self.grid) if self.is_larger else maps
        for i, layer in enumerate(self.layers):
            found = layer(F.leaky_relu(found, SLOPE) if i else found)
        return found.float().tanh().flatten(1)


class PatchNetwork(nn.Module):
    """Embeds patches of several sizes by one trained backbone with a head for each size.

    Normalisation layers keep the statistics they come with; the published VGG16 has none.

    Args:
        backbone: is copied; the copy is trained.
        sizes: pixels of the square patches.
        outputs: numbers D of the embedding.
        std: what patches are divided by, (1, 3, 1, 1).

    Attributes:
        stages: for each size, which of the backbone's maps its head gets.
        outputs: numbers D of the embedding.

    Raises:
        ModelError: the backbone takes no patches of these sizes.
    """

    std: Tensor

    def __init__(
        self, backbone: FrozenExtractor, sizes: tuple[int, ...], outputs: int, std: Tensor
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.register_buffer("std", std, persistent=False)
        self.net = copy.deepcopy(backbone.net).requires_grad_(True)
        self.stages = {size: choose_stage(size, backbone.strides) for size in sizes}
        heads = {}
        for size, stage in self.stages.items():
            _, C, grid, _ = _example_map(backbone, size, stage).shape
            heads[str(size)] = Head(published_for(size), C, grid, outputs)
        self.heads = nn.ModuleDict(heads)

    def initialise(self, backbone: FrozenExtractor, generator: torch.Generator) -> None:
        """Take the backbone's weights again, and draw those of the heads anew."""
        self.net.load_state_dict(backbone.net.state_dict())
        for layer in self.heads.modules():
            if isinstance(layer, nn.Conv2d):
                draw_convolution(layer, generator)

    def unused(self, layers: tuple[int, ...]) -> str:
        """Return which of the backbone's layers no size takes; nothing where all are taken."""
        used = {layers[stage] for stage in self.stages.values()}
        return ", ".join(str(layer) for layer in layers if layer not in used)

    def for_scoring(self) -> "PatchNetwork":
        """Return a view of what it is now that embeds the same, up to rounding, in less time."""
        fast = copy.copy(self)
        fast._modules = dict(self._modules)
        largest = max(self.stages)
        fast.net = accelerated(
            self.net, torch.zeros(1, 3, largest, largest, device=self.std.device)
        )
        return fast

    def forward(self, patches: Tensor) -> Tensor:
        """Return embeddings (n, D), float32, of patches (n, 3, K, K) less the mean."""
        size = patches.shape[-1]
        return self.heads[str(size)](stage_map(self.net, patches / self.std, self.stages[size]))


class PositionClassifier(nn.Module):
    """Tells from the difference of two embeddings in which direction the second patch lies.

    In the last layer the weights of each input have unit length over the directions, as in
    PatchSVDD's released code.

    Args:
        inputs: numbers D of the embedding.
        frozen: normalise the last layer without a gradient, so that its weights stay as drawn.
    """

    def __init__(self, inputs: int, *, frozen: bool) -> None:
        super().__init__()
        widths = (inputs, *CLASSIFIER_WIDTHS)
        self.hidden = nn.ModuleList(nn.Linear(*around) for around in pairwise(widths))
        self.last = nn.Linear(widths[-1], DIRECTIONS)
        self.last.weight.requires_grad_(not frozen)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        for layer in (*self.hidden, self.last):
            assert isinstance(layer, nn.Linear)
            draw_linear(layer, "default", generator)

    def forward(self, ones: Tensor, others: Tensor) -> Tensor:
        """Return logits (n, DIRECTIONS) of embeddings (n, D) of patches and their neighbours."""
        found = ones - others
        for layer in self.hidden:
            found = F.leaky_relu(layer(found), SLOPE)
        return F.linear(found, F.normalize(self.last.weight, dim=0), self.last.bias)


@torch.no_grad()
def _example_map(backbone: FrozenExtractor, size: int, stage: int) -> Tensor:
    """Return what a stage makes of a patch."""
    pixels = torch.zeros(1, 3, size, size, device=backbone.device)
    try:
        return stage_map(backbone.net, pixels, stage)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{backbone.backbone} takes no patches of {size} pixels ({reason}): choose other "
            "--method.patch-sizes, or a convolutional --backbone"
        ) from error
