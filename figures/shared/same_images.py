"""Which runs are on the same images: by what they were made of, not by the name of a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from figures.shared.run_log import images_of
from utils.runs.made_of import Images, load_made_of, made_of_file
from utils.runs.run import Run


@dataclass
class SameImages:
    """Runs on the same test images.

    Attributes:
        name: of the images, as no other group has it.
        images: as the first run has recorded them (`digests_of`).
        runs: in the order in which they were given.
    """

    name: str
    images: dict[str, Images]
    runs: list[Run] = field(default_factory=list)


def group_by_images(runs: Sequence[Run]) -> list[SameImages]:
    """Group runs by their data set, its test images, and the categories they have finished.

    A mean over some categories is not comparable with one over others. Where data sets share a
    name, their folder tells them apart, or the number of test images; where one is there with
    several choices of categories, these do.

    Raises:
        RunError: a file of a run is corrupt.
    """
    by_data: list[SameImages] = []
    for run in runs:
        name, images = images_of(run.config), digests_of(run)
        same = (one for one in by_data if one.name == name and are_same(one.images, images))
        group = next(same, None)
        if group is None:
            group = SameImages(name, images)
            by_data.append(group)
        group.runs.append(run)
    told_apart = [_folder, _num_images, lambda group: str(by_data.index(group) + 1)]
    for tell in told_apart:
        for name in {group.name for group in by_data}:
            same_name = [group for group in by_data if group.name == name]
            details = [tell(group) for group in same_name]
            if len(set(details)) > 1:
                for group, detail in zip(same_name, details, strict=True):
                    group.name = f"{name} ({detail})"
    return [part for group in by_data for part in _by_categories(group)]


def are_same(one: Mapping[str, Images], other: Mapping[str, Images]) -> bool:
    """Whether runs have the same test images, as far as they have recorded them (`digests_of`).

    Those of the categories that both have finished count. Runs of an earlier version recorded
    nothing, and are taken as of the same.
    """
    return all(one[category] == other[category] for category in one.keys() & other.keys())


def digests_of(run: Run) -> dict[str, Images]:
    """Return category -> the digests of its test images, where a run has recorded them."""
    found: dict[str, Images] = {}
    for row in run.rows():
        category = row["category"]
        if category not in found:
            made_of = load_made_of(made_of_file(run.folder, category, row["seed"]))
            if made_of is not None:
                found[category] = made_of.of_test().images
    return found


def finished_categories(run: Run) -> list[str]:
    """Return the categories of a run that have a row."""
    return list(dict.fromkeys(row["category"] for row in run.rows()))


def _folder(group: SameImages) -> str:
    return str(group.runs[0].config.get("data_root", ""))


def _num_images(group: SameImages) -> str:
    """Say how many test images there are: a method's preset may look at some of them alone."""
    counts = [
        len(files)
        for images in group.images.values()
        for name, files in images.items()
        if name.startswith("test/")
    ]
    return f"{sum(counts)} test images"


def _by_categories(group: SameImages) -> list[SameImages]:
    """Return a group for each choice of categories, each with a name of its own."""
    parts: dict[frozenset[str], SameImages] = {}
    for run in group.runs:
        names = finished_categories(run)
        called = f"{group.name}: {', '.join(names)}"
        part = parts.setdefault(frozenset(names), SameImages(called, group.images))
        part.runs.append(run)
    if len(parts) == 1:
        return [group]
    return list(parts.values())
