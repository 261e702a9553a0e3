"""Anomalib's image models on the experiment's backbone; importing this imports anomalib."""

import contextlib
import difflib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalib.models import image as library
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import get_datasets_dir
from jsonargparse import ArgumentParser
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from models.backbone.extractor import FrozenExtractor
from models.errors import ModelError
from models.methods.anomalib.facts import FACTS, REFUSED, Facts
from models.methods.anomalib.weights import base_name, experiment_weights

COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")
"""Arguments of every model that the bridge has its own answer to."""
IMAGE_FOLDERS = {"dtd_dir": "dtd", "imagenet_dir": "imagenette"}
"""Argument -> folder in anomalib's cache, where its default is a folder of the current one."""
PROBED_SIDE = 64


@dataclass(frozen=True)
class Built:
    """A model made for one size of image.

    Attributes:
        module: anomalib's Lightning module; its `model` is what scores.
        side: side in pixels of the images it runs on.
        copies: path in `module.model` -> network that has the experiment's weights.
    """

    module: Any
    side: int
    copies: dict[str, nn.Module]


class LibraryModel:
    """One of anomalib's image models, by name, on the experiment's backbone.

    Args:
        name: as anomalib spells it; case and underscores do not matter.
        backbone: gives architecture, stages and weights.
        words: arguments of the model's constructor, KEY=VALUE each.
        epochs: None for what the model's own trainer arguments, or else `FACTS`, say.
        batch_size: None for what `FACTS` says.

    Raises:
        ModelError: unknown name or argument, or a value of the wrong type.
    """

    def __init__(
        self,
        name: str,
        backbone: FrozenExtractor,
        words: tuple[str, ...] = (),
        *,
        epochs: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.name, self.kind = find_model(name)
        self.facts = FACTS.get(self.name, Facts())
        self.epochs = epochs
        self.batch_size = batch_size or self.facts.batch_size
        self._parameters = inspect.signature(self.kind).parameters
        self._known = [option for option in self._parameters if option not in COMPONENTS]
        self._chosen = self._parse(words)
        self._backbone = backbone

    def _parse(self, words: tuple[str, ...]) -> dict[str, Any]:
        for word in words:
            if word.partition("=")[0] not in self._known:
                raise ModelError(
                    f"anomalib's {self.name} has no option {word.partition('=')[0]!r}; "
                    f"--method.model-options takes {', '.join(self._known)}"
                )
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(
            self.kind, skip=set(COMPONENTS), fail_untyped=False, instantiate=False
        )
        try:
            chosen = parser.parse_args([f"--{word}" for word in words], defaults=False)
        except Exception as error:  # argparse's, jsonargparse's own, or the type's
            raise ModelError(f"anomalib's {self.name}: --method.model-options: {error}") from error
        return dict(vars(chosen))

    def normalisation(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation the model subtracts and divides by, for [0, 1].

        Where it stands on the experiment's backbone they are the backbone's: anomalib always takes
        ImageNet's, and features of weights that were trained on others suffer.
        """
        if self._on_our_backbone:
            return self._backbone.mean.flatten().tolist(), self._backbone.std.flatten().tolist()
        for step in _steps(self.kind.configure_pre_processor()):
            if isinstance(step, Normalize):
                return list(step.mean), list(step.std)
        return [0.0] * 3, [1.0] * 3

    @property
    def asks_for_category(self) -> bool:
        """Whether the model compares images with texts about a category, and was given none."""
        return "class_name" in self._parameters and "class_name" not in self._chosen

    def build(self, image_size: int, category: str | None = None) -> Built:
        """Build the model anew, its random weights from the global random state.

        Args:
            image_size: side in pixels of the experiment's images.
            category: what they show, for models that compare them with texts.

        Raises:
            ModelError: the model refuses its arguments, or what it downloads cannot be had.
        """
        side = self._own_side() or _round_up(image_size, self.facts.multiple)
        built = self._build(side, category)
        patches = [_first(getattr(m, "patch_size", 1)) for m in built.module.model.modules()]
        if side % max(patches):  # a transformer, which sees whole patches only
            built = self._build(_round_up(side, max(patches)), category)
        return built

    def _own_side(self) -> int | None:
        """Return the side of images that the model insists on, if it does."""
        size = (PROBED_SIDE, PROBED_SIDE)
        try:
            steps = _steps(self.kind.configure_pre_processor(image_size=size))
        except ValueError:  # smaller than its crop; crops are left to the data sets
            return None
        sides = [_first(step.size) for step in steps if isinstance(step, Resize)]
        return sides[0] if sides and sides[0] != PROBED_SIDE else None

    def _build(self, side: int, category: str | None) -> Built:
        mean, std = self.normalisation()
        arguments = self._arguments(side)
        if category is not None and self.asks_for_category:
            arguments["class_name"] = category
        arguments |= {name: False for name in COMPONENTS if name in self._parameters}
        # Some models read the size of their images off it. As a callback it would act on every
        # batch; the detector does its work instead.
        transform = Compose([Resize((side, side)), Normalize(mean, std)])
        arguments["pre_processor"] = PreProcessor(transform)
        copies: list[nn.Module] = []
        with self.explained("cannot be built"), experiment_weights(self._backbone, copies):
            module = self.kind(**arguments)
        module.pre_processor = None
        if "k_shot" in self._chosen:  # WinCLIP notes it at its fit, but not among its tensors
            module.model.k_shot = self._chosen["k_shot"]
        for net in copies:
            net.requires_grad_(False)
        paths = {p: net for p, net in module.model.named_modules() if any(net is c for c in copies)}
        return Built(module, side, paths)

    def _arguments(self, side: int) -> dict[str, Any]:
        """Return what the experiment says of the constructor's arguments, and what was chosen."""
        given: dict[str, Any] = {
            "batch_size": self.batch_size,
            "epochs": self.epochs or self.facts.epochs,
            "image_size": side,
            "input_shape": (side, side),
            **self._image_folders(),
        }
        if self._on_our_backbone:
            given |= self._stages(side)
        for folder in self._image_folders().values():
            _check_images(folder)
        return {n: value for n, value in given.items() if n in self._parameters} | self._chosen

    @property
    def _on_our_backbone(self) -> bool:
        return "backbone" in self._parameters and "backbone" not in self._chosen

    def _stages(self, side: int) -> dict[str, Any]:
        """Return the experiment's backbone and stages in anomalib's words."""
        declared: Any = self._backbone.net.feature_info  # timm's declaration of the stages
        names: list[str] = declared.module_name()
        stages: dict[str, Any] = {
            "backbone": base_name(self._backbone.backbone),
            "layer": names[-1],
        }
        layers = self._parameters.get("layers")
        if layers is not None and "str" in str(layers.annotation):
            # Where one stage is the default, one is what the model can deal with.
            only_one = isinstance(layers.default, tuple) and len(layers.default) == 1
            stages["layers"] = names[-1:] if only_one else names
        if self.name == "fre":  # asks for the number of its features, which follows from the rest
            pooling = self._chosen.get("pooling_kernel_size", 2)
            cells = -(-side // self._backbone.strides[-1]) // pooling
            stages["input_dim"] = self._backbone.stage_channels[-1] * cells**2
        return stages

    def _image_folders(self) -> dict[str, Path]:
        """Return the arguments that name folders of images, in anomalib's cache unless chosen."""
        return {
            option: Path(self._chosen.get(option, get_datasets_dir() / name))
            for option, name in IMAGE_FOLDERS.items()
            if option in self._parameters
        }

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn what anomalib raises inside into one message.

        Raises:
            ModelError: in place of any error but our own.
        """
        try:
            yield
        except (ModelError, FloatingPointError):
            raise
        except Exception as error:
            for folder in self._image_folders().values():
                # Made before the download that failed, it would pass for the images next time.
                with contextlib.suppress(OSError):
                    folder.rmdir()  # does nothing to a folder that has something in it
            raise ModelError(self._message(what, error)) from error

    def _message(self, what: str, error: Exception) -> str:
        said = " ".join(str(error).split()).rstrip(".")
        fetches = self.facts.fetches
        if "backbone" in self._chosen:
            fetches = fetches or "weights from timm's hub"
        if fetches and isinstance(error, OSError):  # urllib's, httpx's and the hub's are
            reason = textwrap.shorten(f"{type(error).__name__}: {said}", 100)
            return (
                f"anomalib's {self.name} needs {fetches}. That could not be fetched ({reason}); "
                "run it once with a network, and it stays in the cache"
            )
        if isinstance(error, ImportError):
            return f"anomalib's {self.name} needs a package that is not installed: {said}"
        ours = f"the experiment's {self._backbone.backbone} (--backbone)"
        backbone = f"Its backbone is {ours}. " if self._on_our_backbone else ""
        return (
            f"anomalib's {self.name} {what}: {type(error).__name__}: {said}. {backbone}"
            f"--method.model-options KEY=VALUE takes {', '.join(self._known)}"
        )


def find_model(name: str) -> tuple[str, Any]:
    """Return the plain name and the class of an image model.

    Raises:
        ModelError: there is none, with those of similar names; or it cannot be used here.
    """
    kinds = {}
    for exported in library.__all__:
        kind = getattr(library, exported)
        kinds[kind.__module__.split(".")[-2]] = kind  # anomalib.models.image.NAME.lightning_model
    spellings = {_spelling(plain): plain for plain in kinds}
    spellings |= {_spelling(kind.__name__): plain for plain, kind in kinds.items()}
    plain = spellings.get(_spelling(name))
    if plain is None:
        near = difflib.get_close_matches(name, kinds, n=3, cutoff=0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ModelError(
            f"anomalib has no image model {name!r}{hint}. It has {', '.join(sorted(kinds))}"
        )
    if plain in REFUSED:
        raise ModelError(f"anomalib's {plain} cannot be used here: {REFUSED[plain]}")
    return plain, kinds[plain]


def _check_images(folder: Path) -> None:
    """Refuse a folder that is there without images: anomalib would silently do without them."""
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
    if folder.is_dir() and not any(p.suffix.lower() in suffixes for p in folder.rglob("*")):
        raise ModelError(f"{folder} holds no images; delete it, and they are fetched again")


def _steps(pre_processor: Any) -> list[Any]:
    transform = pre_processor.transform
    return list(transform.transforms) if isinstance(transform, Compose) else [transform]


def _spelling(name: str) -> str:
    return name.replace("_", "").lower()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _first(size: Any) -> int:
    """Return a side that may be given once or for each axis; 1 for what is no side."""
    side = size[0] if isinstance(size, tuple | list) else size
    return side if isinstance(side, int) else 1
