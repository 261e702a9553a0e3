"""Categories of the structured data sets: which there are, and the images of each."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from datasets.sets.demo.demo import DEMO_CATEGORIES
from datasets.reading.mvtec_layout import NORMAL, read_mvtec_category, subfolders
from datasets.samples import Category, DataError
from datasets.sets.visa import VisaSplit, read_visa_category

StructuredDataset = Literal["mvtec", "mpdd", "visa", "folder", "demo"]

MVTEC_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
MVTEC_OBJECTS = (
    "bottle",
    "cable",
    "capsule",
    "hazelnut",
    "metal_nut",
    "pill",
    "screw",
    "toothbrush",
    "transistor",
    "zipper",
)
MPDD_CATEGORIES = (
    "bracket_black",
    "bracket_brown",
    "bracket_white",
    "connector",
    "metal_plate",
    "tubes",
)
VISA_CATEGORIES = (
    "candle",
    "capsules",
    "cashew",
    "chewinggum",
    "fryum",
    "macaroni1",
    "macaroni2",
    "pcb1",
    "pcb2",
    "pcb3",
    "pcb4",
    "pipe_fryum",
)

_FIXED_CATEGORIES = {
    "mvtec": MVTEC_TEXTURES + MVTEC_OBJECTS,
    "mpdd": MPDD_CATEGORIES,
    "visa": VISA_CATEGORIES,
    "demo": DEMO_CATEGORIES,
}
_PAGES = {
    "mvtec": "MVTec AD: https://www.mvtec.com/company/research/datasets/mvtec-ad",
    "mpdd": "MPDD: https://github.com/stepanje/MPDD",
    "visa": "VisA: https://github.com/amazon-science/spot-diff",
}


def list_categories(dataset: str, root: Path, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Lists the categories to run, after checking that each has its folder.

    Args:
        dataset: One of `StructuredDataset`. A fixed data set has its official list; the
            categories of "folder" are the sub-folders that hold train/good, sorted.
        root: The folder above the category folders.
        wanted: Some of these categories, in the order to run them; None or empty for all.

    Raises:
        ValueError: The data set is unknown.
        DataError: The root or a category's folder is missing, or a wanted category is unknown.
    """
    _check_root(dataset, root)
    known = _FIXED_CATEGORIES.get(dataset) or _find_categories(root)
    chosen = tuple(dict.fromkeys(wanted)) if wanted else known
    for category in chosen:
        if category not in known:
            raise DataError(_unknown_category(category, known, dataset))
    missing = [category for category in chosen if not (root / category).is_dir()]
    if missing:
        raise DataError(_missing_categories(dataset, root, missing, known))
    return chosen


def read_category(
    dataset: str, root: Path, category: str, *, visa_split: VisaSplit = "auto"
) -> Category:
    """Reads the images of one category.

    Args:
        dataset: One of `StructuredDataset`.
        root: The folder above the category folders.
        category: One of `list_categories`.
        visa_split: How VisA's normal images are split, see `read_visa_category`.

    Raises:
        ValueError: The data set is unknown.
        DataError: The root, the category's folder or its images are missing or inconsistent.
    """
    _check_root(dataset, root)
    if not (root / category).is_dir():
        known = _FIXED_CATEGORIES.get(dataset, (category,))
        raise DataError(_missing_categories(dataset, root, [category], known))
    if dataset == "visa":
        return read_visa_category(root, name=category, split=visa_split)
    return read_mvtec_category(root / category, name=category)


def _check_root(dataset: str, root: Path) -> None:
    if dataset not in get_args(StructuredDataset):
        raise ValueError(
            f"data set {dataset!r} is none of {', '.join(get_args(StructuredDataset))}"
        )
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data root {root} {problem}: {_way_out(dataset)}")


def _find_categories(root: Path) -> tuple[str, ...]:
    if (root / "train" / NORMAL).is_dir():
        raise DataError(
            f"data root {root} is itself a category (it holds train/{NORMAL}): pass the folder "
            f"above, --data-root {root.resolve().parent}, and --categories {root.resolve().name} "
            "if it holds others"
        )
    found = tuple(
        folder.name for folder in subfolders(root) if (folder / "train" / NORMAL).is_dir()
    )
    if not found:
        raise DataError(
            f"data root {root} has no categories: each is a sub-folder that holds train/{NORMAL} "
            "with normal images and test/<defect>"
        )
    return found


def _unknown_category(category: str, known: Sequence[str], dataset: str) -> str:
    by_lower_case = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(category.lower(), by_lower_case, n=3, cutoff=0.5)
    hint = "."
    if nearest:
        hint = f"; did you mean {' or '.join(by_lower_case[name] for name in nearest)}?"
    return f"unknown category {category!r}{hint} The data set {dataset} has: {', '.join(known)}"


def _missing_categories(
    dataset: str, root: Path, missing: Sequence[str], known: Sequence[str]
) -> str:
    present = [name for name in known if (root / name).is_dir()]
    if present:
        way_out = f"pass --categories {' '.join(present)} to run those that are there"
    else:
        way_out = _way_out(dataset)
    return f"data root {root} has no folder {', '.join(missing)}: {way_out}"


def _way_out(dataset: str) -> str:
    where = f" ({_PAGES[dataset]})" if dataset in _PAGES else ""
    return f"pass --data-root, the folder that holds the category folders{where}"
