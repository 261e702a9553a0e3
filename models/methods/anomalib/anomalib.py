"""Anomalib's image models (https://github.com/open-edge-platform/anomalib) as detectors.

`AnomalibDetector` builds a model by name, trains it as anomalib's own trainer would, and takes the
raw maps and scores of the network. Anomalib's post-processing, which squeezes scores into [0, 1] by
statistics of the test set and can saturate them, its thresholds, metrics and pictures stay out.
Nothing here imports anomalib until a detector is made.
"""

import importlib
import itertools
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import Hidden, MethodOptions, OptionalInt
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.method import Method
from models.methods.anomalib.weights import holds_weights

INSTALL = "pip install -r requirements-anomalib.txt"


@dataclass(frozen=True, kw_only=True)
class AnomalibOptions(MethodOptions):
    """A model of anomalib, on our images and splits, scored by our metrics."""

    model: Hidden = ""
    """In anomalib's spelling: padim, patchcore, reverse_distillation, ..."""
    epochs: OptionalInt = None
    """Passes over the training images; none for what the model's own trainer arguments or
    anomalib's example configuration say."""
    batch_size: OptionalInt = None
    """Images per step; none for what the model's own configuration has."""
    model_options: tuple[str, ...] = ()
    """Arguments of the model's constructor as KEY=VALUE words, e.g. coreset_sampling_ratio=0.01."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [word for word in self.model_options if "=" not in word]:
            raise ValueError(f"--method.model-options {wrong[0]!r} must be KEY=VALUE")


class AnomalibDetector(Detector):
    """A model of anomalib, on images.

    Where the model works on a timm backbone it is given the experiment's: architecture, stages and
    weights. The frozen copy of these weights is not part of the head; what anomalib downloads
    itself is. Images are normalised as the backbone asks for, or else as the model's own
    pre-processing does it, but neither resized nor cropped, unless the model cannot run on their
    size; then its maps are resized back.

    Batch normalisation and dropout are in the mode the model's training puts them in; a fitted or
    loaded detector is in eval mode.

    Attributes:
        remarks: what a reader of the fit's numbers must know, in words.
        category: what models that compare images with texts are told the images show.

    Raises:
        ModelError: anomalib is not installed, has no such model, or that has no such option.
    """

    final_maps: bool = True
    category: str | None = None

    image_size: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, features: FeatureShape, options: AnomalibOptions) -> None:
        super().__init__()
        backbone = features.backbone
        assert backbone is not None
        self._backbone = (backbone,)  # in a tuple, so that its weights are not part of this head
        self._recipe = _anomalib("wrapper").LibraryModel(
            options.model,
            backbone,
            options.model_options,
            epochs=options.epochs,
            batch_size=options.batch_size,
        )
        mean, std = self._recipe.normalisation()
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)
        self.register_buffer("image_size", torch.tensor(0))  # 0: neither fitted nor loaded
        self.model: nn.Module | None = None
        self._side = 0
        self._copies: dict[str, nn.Module] = {}
        self.register_state_dict_post_hook(_without_copies)
        self.eval()

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Build the model anew and let it train itself; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the model refuses backbone, stages or options, cannot be trained on these
                images, or what it downloads cannot be had.
        """
        training = _anomalib("training")
        image_size = next(iter(bank.batches(1))).shape[-1]
        seed = int(torch.randint(2**31, (), generator=generator))
        with training.isolated(seed) as stderr:
            module = self._build(image_size, self.category)
            training.train(
                self._recipe,
                module,
                bank,
                self._pixels,
                generator=generator,
                device=self.mean.device,
                stderr=stderr,
            )
            self._adopt(module.model, image_size)
            self._forget_changed_copies()
            _, maps = self._predict(next(iter(bank.batches(1))))
        self.remarks = self._remarks(has_maps=maps is not None)
        if monitor is not None:
            monitor(1, {})

    def forward(self, features: Tensor) -> Tensor:
        """Return anomaly maps (B, S, S) of uint8 images (B, 3, S, S).

        Models without maps give their image score as a map (B, 1, 1).
        """
        return self.score(features)[0]

    def score(self, features: Tensor) -> Scored:
        """Return the maps of `forward` and the model's own image scores (B,)."""
        scores, maps = self._predict(features)
        if maps is None:
            return rearrange(scores, "b -> b 1 1"), scores
        size = features.shape[-2:]
        if maps.shape[-2:] != size:
            maps = F.interpolate(maps.unsqueeze(1), size, mode="bilinear").squeeze(1)  # (B, S, S)
        return maps, scores

    def exported(self) -> nn.Module:
        """Refuse: see `Detector.exported`.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"anomalib's {self._recipe.name} cannot be exported here: its network is another "
            "library's, which exports it itself; every other method can be"
        )

    def _predict(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return image scores (B,) and, if the model has any, maps (B, h, w), float32."""
        if self.model is None:
            raise ModelError(f"anomalib's {self._recipe.name} was neither fitted nor loaded")
        with torch.no_grad():
            output = self.model(self._pixels(images))
        named = hasattr(output, "pred_score")  # AnomalyVFM gives a plain pair
        scores, maps = (output.pred_score, output.anomaly_map) if named else output
        if maps is not None:
            maps = maps.float().reshape(len(images), *maps.shape[-2:])  # (B, h, w)
        return scores.float().reshape(len(images)), maps

    def _pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, 3, S, S) as the model takes them, float32."""
        # Banks give channels last, and anomalib views what it takes for channels first.
        pixels = images.to(self.mean.device).contiguous().float() / 255
        if pixels.shape[-1] != self._side:
            size = (self._side, self._side)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return (pixels - self.mean) / self.std

    def _build(self, image_size: int, category: str | None = None) -> Any:
        built = self._recipe.build(image_size, category)
        self._side, self._copies = built.side, built.copies
        return built.module

    def _adopt(self, model: nn.Module, image_size: int) -> None:
        """Make a model this detector's own: on its device, in eval mode."""
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            # Products of other layouts round differently, and a loaded head has this one.
            tensor.data = tensor.data.contiguous()
        self.model = model.to(self.mean.device)
        self.image_size.fill_(image_size)
        self.eval()

    def _forget_changed_copies(self) -> None:
        """Count as part of the head whatever training made of the experiment's weights."""
        (backbone,) = self._backbone
        self._copies = {p: net for p, net in self._copies.items() if holds_weights(net, backbone)}

    def _remarks(self, *, has_maps: bool) -> list[str]:
        remarks = []
        if self._side != int(self.image_size):
            remarks.append(
                f"anomalib's {self._recipe.name} runs on images of {self._side} pixels: they were "
                f"resized from {int(self.image_size)}, and its maps back."
            )
        if not has_maps:
            remarks.append(
                f"anomalib's {self._recipe.name} has an image score and no map: pixel metrics "
                "measure nothing."
            )
        if self._recipe.asks_for_category and self.category is None:
            remarks.append(
                f'anomalib\'s {self._recipe.name} was asked about an "object", for want of one '
                "name of what the images show: --method.model-options class_name=NAME gives it."
            )
        return remarks

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Build the model for the stored size of image before its tensors are loaded."""
        image_size = int(state_dict.get(f"{prefix}image_size", 0))
        if image_size and (self.model is None or image_size != int(self.image_size)):
            with _anomalib("training").isolated(seed=0):
                self._adopt(self._build(image_size).model, image_size)
        for path, net in list(self._copies.items()):
            tensors = {f"{prefix}model.{path}.{n}": t for n, t in net.state_dict().items()}
            if tensors.keys() & state_dict.keys():
                del self._copies[path]  # training had changed them
            else:
                state_dict |= tensors
        for path, owner in self.named_modules():
            for name, buffer in owner.named_buffers(recurse=False):
                stored = state_dict.get(".".join(filter(None, [prefix.rstrip("."), path, name])))
                if stored is not None and stored.shape != buffer.shape:
                    setattr(owner, name, torch.empty_like(stored, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _without_copies(
    detector: AnomalibDetector, state_dict: dict[str, Any], prefix: str, metadata: Any
) -> None:
    del metadata
    for path in detector._copies:
        for name in [n for n in state_dict if n.startswith(f"{prefix}model.{path}.")]:
            del state_dict[name]


def _anomalib(part: str) -> ModuleType:
    """Import one of the modules that need anomalib.

    Raises:
        ModelError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own dependencies' deprecations
            return importlib.import_module(f"models.methods.anomalib.{part}")
    except ImportError as error:
        raise ModelError(f"anomalib is not installed ({error}): {INSTALL}") from error


def _per_channel(values: list[float]) -> Tensor:
    return rearrange(torch.tensor(values), "c -> 1 c 1 1")


METHOD = Method(
    detector=lambda: AnomalibDetector,
    options=AnomalibOptions(),
    takes=frozenset({"images"}),
    is_library=True,
    published_as={
        "patchcore": "PatchCore",
        "padim": "PaDiM",
        "stfpm": "STPM",
        "draem": "DRAEM",
        "cfa": "CFA",
        "csflow": "CS-Flow",
        "fastflow": "FastFlow",
        "reverse_distillation": "RevDist",
    },
    experiment={"structured": {"layers": (2, 3), "patch_size": 1, "blur_sigma": 0.0}},
    ignores=frozenset({"blur_sigma", "compile"}),  # what is trained is its own trainer's
    unfitted=frozenset({"anomalyvfm", "winclip"}),
)
