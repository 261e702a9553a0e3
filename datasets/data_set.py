"""What the file of a data set declares, and how the files are found; nothing here needs torch."""

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets.sets
from configs.presets import DataPreset
from datasets.samples import Category
from datasets.tasks.labelled import LabelledSet

DECLARES = re.compile(r"^DATA_SET\b", re.MULTILINE)
FIRST = ("mvtec", "cifar10", "digits")
"""Listed first, and taken where none is named, among their like."""


@dataclass(frozen=True, kw_only=True)
class StructuredSet(DataPreset):
    """The constant DATA_SET of a data set with defects: all that the rest of the suite knows of it.

    Attributes:
        read: returns a category, given the root, its name and the data set's options.
        categories: the official ones, in order; none where they are the sub-folders of the root.
        groups: name of a mean line -> the categories it is over, as "mean_textures".
        page: what it is called and where it is to be had, for messages.
        prepare: returns the root to read from, given the one that was named.
        name: on the command line; that of its file.
    """

    read: Callable[[Path, str, Any], Category]
    categories: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    page: str = ""
    prepare: Callable[[Path], Path] = lambda root: root
    name: str = ""

    @property
    def num_categories(self) -> int:
        """How many categories a mean over all of them is over; 0 where it is not known."""
        return len(self.categories)


@dataclass(frozen=True, kw_only=True)
class SemanticSet(DataPreset):
    """The constant DATA_SET of a labelled data set, of which a class or all but one are normal.

    Attributes:
        read: returns it, given its root.
        num_categories: its classes; 0 where they are not known.
        is_grey: grey images, which `train_mnist.py` has; else `train_cifar10.py` does.
        name: on the command line; that of its file.
    """

    read: Callable[[Path], LabelledSet]
    num_categories: int = 0
    is_grey: bool = False
    name: str = ""


# The published pipelines: NoCo's, which resizes MVTec with OpenCV, MPDD and VisA with Lanczos; the
# semantic one takes the last stage of a ResNet152 and Pillow's bilinear filter.
WIDE_RESNET50 = {"backbone": "wide_resnet50_2.tv_in1k", "layers": (1, 2, 3)}
OPENCV_CROP_224 = {"image_size": 256, "crop_size": 224, "resize": "opencv_square"}
LANCZOS_CROP_224 = {"image_size": 256, "crop_size": 224, "resize": "lanczos_shorter"}
# No published crop binds a user's own images, and a crop can cut defects away.
WHOLE_224 = {"image_size": 224, "crop_size": None, "resize": "opencv_square"}
RESNET152_CROP_224 = {
    "backbone": "resnet152.tv_in1k",
    "layers": (4,),
    "image_size": 256,
    "crop_size": 224,
    "resize": "bilinear_shorter",
}

DataSet = TypeVar("DataSet", StructuredSet, SemanticSet)


def find_data_sets(kind: type[DataSet]) -> dict[str, DataSet]:
    """Return the data sets of a kind by name, the default first, the rest in order."""
    found = {}
    for name, module in _modules().items():
        declared = importlib.import_module(module).DATA_SET
        for one in declared if isinstance(declared, tuple) else (declared,):
            if isinstance(one, kind):
                found[name] = replace(one, name=name)
    return found


def num_categories(name: str) -> int:
    """Return how many categories or classes a data set has; 0 where that is not known."""
    known = find_data_sets(StructuredSet) | find_data_sets(SemanticSet)
    return known[name].num_categories if name in known else 0


def _modules() -> Mapping[str, str]:
    """Return the modules of the data sets by name."""
    return _modules_in(tuple(datasets.sets.__path__))


@functools.cache
def _modules_in(folders: tuple[str, ...]) -> Mapping[str, str]:
    found = {}
    for folder in map(Path, folders):
        for path in folder.rglob("*.py"):
            if DECLARES.search(path.read_text(encoding="utf-8")):
                parts = path.relative_to(folder).with_suffix("").parts
                found[path.stem] = ".".join(["datasets.sets", *parts])
    return dict(sorted(found.items(), key=lambda item: (item[0] not in FIRST, item[0])))
