"""What methods share that fine-tune a pretrained backbone and score by nearest embeddings."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from configs.options import (
    Fraction,
    MethodOptions,
    NotNegative,
    OptionalFloat,
    Positive,
    PositiveInt,
)
from models.backbone.extractor import FrozenExtractor, channels_first
from models.backbone.weights import canonical_name
from models.deployment.memory import Memory, normalised_pixels
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.features.nearest import nearest
from models.training.loop import Loop
from models.training.mixed_precision import bfloat16_autocast

EMBED_BATCH = 64
"""Images per forward pass where nothing trains, whatever the batch that was asked for."""

Objective = Callable[[Tensor], Tensor]
"""Maps a batch of uint8 images (B, 3, S, S) to the training loss, a scalar."""


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions(MethodOptions):
    """What methods share that train the last stages of the backbone by SGD."""

    learning_rate: Positive
    """Of SGD."""
    momentum: Fraction
    """Of SGD."""
    weight_decay: NotNegative
    """Of SGD."""
    clip_norm: OptionalFloat
    """Largest norm of the gradient of all parameters together; none for no limit."""
    batch_size: PositiveInt
    """Images per step."""
    epochs: PositiveInt
    """Passes over the training images."""
    num_neighbors: PositiveInt
    """Nearest training images whose squared distances, added, are the score."""
    trained_stages: PositiveInt
    """Stages that train, counted from the last."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it (scores are float32); ignored
    elsewhere."""


class FineTunedDetector(Detector):
    """A copy of the backbone whose last stages train; far from the training embeddings = anomalous.

    An image's embedding is the global average of each of the backbone's stages, concatenated. The
    score is the sum of squared Euclidean distances to the `num_neighbors` nearest embeddings of the
    training images, which are computed anew after the last epoch, and after each where a monitor
    scores it. The network is in eval mode throughout, training included: batch normalisation uses
    the pretrained running statistics and they do not move, while its weights and biases train.

    `state_dict` holds the adapted network and the training embeddings.

    Raises:
        ModelError: the stages of the backbone cannot be told apart.
    """

    sized_by_fit = ("embeddings",)

    embeddings: Tensor

    def __init__(self, features: FeatureShape, options: FineTuningOptions) -> None:
        super().__init__()
        backbone = features.backbone
        assert backbone is not None
        self.tuning = options
        self._pretrained = (backbone,)  # in a tuple, so that its weights are not part of this head
        self.net = copy.deepcopy(backbone.net)
        trained = set(trained_parameters(backbone, options.trained_stages))
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name in trained)
        self.register_buffer("embeddings", torch.empty(0, backbone.channels))
        self.eval()

    @property
    def backbone(self) -> FrozenExtractor:
        """The pretrained network, which stays as it is."""
        return self._pretrained[0]

    def train(self, mode: bool = True) -> "FineTunedDetector":
        """Stay in eval mode, as published."""
        del mode
        return super().train(False)

    def objective(self, bank: FeatureSource, generator: torch.Generator) -> Objective:
        """Return the training loss; the network is as it was pretrained when this is called."""
        raise NotImplementedError

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Fine-tune from the pretrained weights; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: fewer training images than neighbours.
        """
        tuning = self.tuning
        if len(bank) < tuning.num_neighbors:
            raise ModelError(
                f"{tuning.num_neighbors} nearest images exceed the {len(bank)} training images",
                {"num_neighbors": "lower"},
            )
        self.net.load_state_dict(self.backbone.net.state_dict())
        objective = self.objective(bank, generator)
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters,
            lr=tuning.learning_rate,
            momentum=tuning.momentum,
            weight_decay=tuning.weight_decay,
        )

        def remember() -> None:
            self.embeddings = self.embed_bank(bank)

        loop = Loop(
            module=self,
            optimizer=optimizer,
            epochs=tuning.epochs,
            generator=generator,
            clip_norm=tuning.clip_norm,
        )
        loop.run(
            lambda: bank.batches(tuning.batch_size, generator=generator),
            lambda images: {"loss": objective(images)},
            monitor=monitor,
            complete=remember,
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """Return embeddings (B, D), float32, of normalised pixels (B, 3, S, S)."""
        maps = channels_first(self.net, self.net(pixels))
        return torch.cat([m.float().mean(dim=(2, 3)) for m in maps], dim=1)  # (B, D)

    def embed_for_training(self, pixels: Tensor) -> Tensor:
        """Do as `embed`, in mixed precision where that is wanted and can be had."""
        with bfloat16_autocast(pixels.device, wanted=self.tuning.mixed_precision):
            return self.embed(pixels)

    @torch.no_grad()
    def embed_bank(self, bank: FeatureSource) -> Tensor:
        """Return embeddings (N, D) of all images, in order."""
        batches = bank.batches(EMBED_BATCH)
        return torch.cat([self.embed(self.backbone.pixels(images)) for images in batches])

    def forward(self, images: Tensor) -> Tensor:
        """Return scores as maps (B, 1, 1) of uint8 images (B, 3, S, S).

        Raises:
            ModelError: nothing was fitted or loaded.
        """
        if len(self.embeddings) < self.tuning.num_neighbors:
            raise ModelError("there are no training embeddings to compare with: fit or load first")
        scores = []
        for chunk in images.split(EMBED_BATCH):
            embeddings = self.embed(self.backbone.pixels(chunk))  # (B, D)
            distances, _ = nearest(embeddings, self.embeddings, self.tuning.num_neighbors)  # (B, k)
            scores.append(distances.square().sum(dim=1))  # (B,)
        return rearrange(torch.cat(scores), "b -> b 1 1")

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)


class _Exported(nn.Module):
    """A fine-tuned backbone and its stored embeddings."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: FineTunedDetector) -> None:
        super().__init__()
        self.register_buffer("mean", detector.backbone.mean)
        self.register_buffer("std", detector.backbone.std)
        self.detector = detector
        self.memory = Memory(detector.embeddings)
        self.count = detector.tuning.num_neighbors

    def forward(self, images: Tensor) -> Tensor:
        """Return scores as maps (B, 1, 1) of uint8 images (B, 3, S, S)."""
        embeddings = self.detector.embed(normalised_pixels(images, self.mean, self.std))  # (B, D)
        distances, _ = self.memory(embeddings - self.memory.shift, self.count)  # (B, k)
        return rearrange(distances.square().sum(dim=1), "b -> b 1 1")


def trained_parameters(backbone: FrozenExtractor, num_stages: int) -> list[str]:
    """Name the parameters of the last `num_stages` stages of `backbone.net`.

    The last stage is the deepest of `backbone.layers`. Stages are those timm counts, stage i being
    what is registered after the end of stage i - 1, up to its own end; all before the first trained
    stage is frozen, and so is what follows the last, which no feature depends on. For ResNets with
    stage 4 as the last and two trained stages these are layer3 and layer4, so that conv1, bn1,
    layer1 and layer2 are frozen as in the released code of PANDA and mean-shifted; for
    tf_efficientnet_lite0 blocks.3 to blocks.6. As many stages as there are, or more: all train.

    Raises:
        ModelError: the network does not say where stages end.
    """
    if backbone.feature_location != "bottleneck":
        raise ModelError(
            "a backbone is fine-tuned at the end of its stages: leave out --feature-location "
            f"{backbone.feature_location}"
        )
    modules = list(backbone.net.named_modules())
    names = [canonical_name(name) for name, _ in modules]
    taps: Any = backbone.net.feature_info  # timm's declaration of the stages

    def end_of(stage: int) -> int:
        module = canonical_name(taps.info[stage]["module"])
        inside = [i for i, n in enumerate(names) if n == module or n.startswith(f"{module}_")]
        if not inside:
            raise ModelError(
                f"{backbone.backbone} does not say where its stages end: choose another --backbone"
            )
        return inside[-1]

    last = max(backbone.layers)
    first_trained = last - num_stages + 1
    start = end_of(first_trained - 1) + 1 if first_trained > 0 else 0
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in modules[start : end_of(last) + 1]
        for name, _ in module.named_parameters(recurse=False)
    ]
