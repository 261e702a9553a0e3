"""What the file of a method declares, and how the files are found; nothing here needs torch."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import models.methods
from configs.options import MethodOptions
from configs.presets import ANY_MODEL, MethodPreset
from models import deferred

if TYPE_CHECKING:
    from models.detector import Detector, FeatureShape

Options = TypeVar("Options", bound=MethodOptions)

DECLARES = re.compile(r"^METHOD\b", re.MULTILINE)
OF_FEATURES = frozenset({"precision", "patch_size", "pool"})
FIRST = "noco"
"""The method that is listed first, and taken where none is named."""


@dataclass(frozen=True, kw_only=True)
class Method(MethodPreset, Generic[Options]):
    """The constant METHOD of a method's file: all that the rest of the suite knows of it.

    The method's name is that of its file. A file is run in two parts (see `models.deferred`), so
    that torch is only imported when a detector is wanted.

    Attributes:
        detector: returns the detector's class, once its file has run: `lambda: Knn`.
        tasks: kinds of tasks it is for, "structured" and "semantic".
        takes: what its detector is given of an image: "features", "images" or both.
        published_as: its name in figures/published.csv; of a library, that of each model.
        scales_on_held_out: it sets scales on normal images beside those it is trained on, which
            `--scale-on` names.
        is_library: it stands for the models of a library, `NAME:MODEL` on the command line, and its
            options have the field `model`.
    """

    options: Options
    detector: "Callable[[], Callable[[FeatureShape, Options], Detector]]"
    tasks: frozenset[str] = frozenset({"structured", "semantic"})
    takes: frozenset[str] = frozenset({"features"})
    published_as: str | dict[str, str] = ""
    scales_on_held_out: bool = False
    is_library: bool = False

    @property
    def ignored(self) -> frozenset[str]:
        """All options that do nothing for it: without features, those of their extraction."""
        idle = self.ignores if "features" in self.takes else self.ignores | OF_FEATURES
        return idle if self.scales_on_held_out else idle | {"scale_on"}

    def detector_class(self) -> "Callable[[FeatureShape, Options], Detector]":
        """Return the detector's class; the rest of its file is run first."""
        deferred.complete(self.detector.__module__)
        return self.detector()


def find_method(name: str) -> Method[MethodOptions]:
    """Return what the file of a method declares; `anomalib:patchcore` is of the file anomalib.py.

    Raises:
        KeyError: there is no such file.
    """
    return _load(*_files()[name.partition(":")[0]])


def find_methods(task: str) -> dict[str, Method[MethodOptions]]:
    """Return the methods for a kind of task, by their names on the command line."""
    return {
        f"{name}:{ANY_MODEL}" if method.is_library else name: method
        for name, place in _files().items()
        if task in (method := _load(*place)).tasks
    }


def published_name(method: str) -> str:
    """Return a method's name in figures/published.csv; "" where no paper compares with it."""
    known = find_method(method).published_as
    return known if isinstance(known, str) else known.get(method.partition(":")[2], "")


def _files() -> Mapping[str, tuple[str, Path]]:
    """Return module and file of each method by name, the default first, the rest in order."""
    return _files_in(tuple(models.methods.__path__))


@functools.cache
def _files_in(folders: tuple[str, ...]) -> Mapping[str, tuple[str, Path]]:
    found: dict[str, tuple[str, Path]] = {}
    for folder in map(Path, folders):
        for path in folder.rglob("*.py"):
            if DECLARES.search(path.read_text(encoding="utf-8")):
                if path.stem in found:
                    raise ValueError(f"{path} and {found[path.stem][1]} are methods of one name")
                parts = path.relative_to(folder).with_suffix("").parts
                found[path.stem] = (".".join([deferred.METHODS, *parts]), path)
    return dict(sorted(found.items(), key=lambda item: (item[0] != FIRST, item[0])))


def _load(module: str, path: Path) -> Method[MethodOptions]:
    method = deferred.load(module, path).METHOD
    assert isinstance(method, Method), path
    return method
