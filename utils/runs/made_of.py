"""What finished pairs of a run were made of, data/<category>-seed<k>.json, and what is there now.

The file has "images", group -> name -> digest, "weights", the digest of the file that `--weights`
named, and "backbone", a short hash of the backbone's weights; see `MadeOf`.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import RunError
from utils.runs.files import corrupt, file_stem, read_object, write_text

Images = Mapping[str, Mapping[str, str]]
OF_TRAINING = ("train/", "validation/")
"""How groups of images begin that a fit looks at."""
WHATEVER = ""
"""A digest that is not known: any other is taken for equal."""


@dataclass(frozen=True)
class MadeOf:
    """What a head and its scores come from.

    Attributes:
        images: group ("train/good", "test/hole", "masks/hole") -> name of a file below the data
            root -> digest of its content; one entry without a name where tasks share their images.
        weights: digests of the files that options name, that of the weights among them.
        backbone: short hash of the backbone's weights.
    """

    images: Images
    weights: str = WHATEVER
    backbone: str = WHATEVER

    def of_test(self) -> "MadeOf":
        """Return it without the images for training, which an evaluation does not see."""
        images = {g: files for g, files in self.images.items() if not g.startswith(OF_TRAINING)}
        return MadeOf(images, self.weights, self.backbone)

    @property
    def training_digests(self) -> set[str]:
        """The digests of the training images, where they are files of the task's own."""
        train = [files for group, files in self.images.items() if group.startswith("train/")]
        return {digest for files in train for name, digest in files.items() if name}

    def differences(self, now: "MadeOf") -> list[str]:
        """Say what has changed since, each in a few words; nothing where all is equal."""
        said = _image_differences(self.images, now.images)
        if WHATEVER not in (self.weights, now.weights) and self.weights != now.weights:
            said.append("a file that the options name (--weights or the method's) has changed")
        elif WHATEVER not in (self.backbone, now.backbone) and self.backbone != now.backbone:
            said.append(f"the backbone's weights were {self.backbone} and are {now.backbone}")
        return said


def made_of_file(folder: Path, category: str, seed: int) -> Path:
    """Return where a run folder has what a pair was made of."""
    return folder / "data" / f"{file_stem(category, seed)}.json"


def save_made_of(path: Path, made_of: MadeOf) -> None:
    """Write what a pair was made of."""
    write_text(path, json.dumps(asdict(made_of), indent=1, ensure_ascii=True) + "\n")


def load_made_of(path: Path) -> MadeOf | None:
    """Read what a pair was made of; None where an earlier version did not keep it.

    Raises:
        RunError: the file is corrupt.
    """
    if not path.is_file():
        return None
    values = read_object(path)
    images, weights, backbone = map(values.get, ("images", "weights", "backbone"))
    if not (isinstance(images, dict) and isinstance(weights, str) and isinstance(backbone, str)):
        raise corrupt(path, "not what a pair was made of")
    groups = [files for files in images.values() if isinstance(files, dict)]
    if len(groups) < len(images) or any(
        not isinstance(digest, str) for files in groups for digest in files.values()
    ):
        raise corrupt(path, "its images are not names with digests")
    return MadeOf(images, weights, backbone)


def check_made_of(
    folder: Path,
    pairs: Collection[tuple[str, int]],
    now: Mapping[str, MadeOf],
    *,
    way_out: str,
    test_only: bool = False,
) -> list[tuple[str, int]]:
    """Compare what finished pairs were made of with what is there.

    Args:
        folder: of the run.
        pairs: its finished (category, seed).
        now: what is there, by category; others are not compared.
        way_out: what the user can do about it.
        test_only: compare the test set and the weights alone.

    Returns:
        The pairs of which an earlier version did not keep it.

    Raises:
        RunError: a pair was made of other data or weights; what has changed is named.
    """
    unknown = []
    for category, seed in sorted(pairs):
        if category not in now:
            continue
        before, there = load_made_of(made_of_file(folder, category, seed)), now[category]
        if before is None:
            unknown.append((category, seed))
            continue
        if test_only:
            before, there = before.of_test(), there.of_test()
        if said := before.differences(there):
            raise RunError(
                f"{folder}: {category}, seed {seed} was made of other data or weights than are "
                f"there now: {'; '.join(said)}. {way_out}"
            )
    return unknown


def _image_differences(before: Images, now: Images) -> list[str]:
    """Say what has changed of images and masks: "3 files moved from test/hole to test/good"."""
    if any("" in files for files in (*before.values(), *now.values())):
        return [
            _group_difference(group, before, now)
            for group in dict.fromkeys([*before, *now])
            if before.get(group) != now.get(group)
        ]
    old = {name: (group, d) for group, files in before.items() for name, d in files.items()}
    new = {name: (group, d) for group, files in now.items() for name, d in files.items()}
    counts: Counter[str] = Counter()
    for name in old.keys() & new.keys():
        (group, digest), (new_group, new_digest) = old[name], new[name]
        if group != new_group:
            counts[f"moved from {group} to {new_group}"] += 1
        elif digest != new_digest:
            counts[f"of {group} changed"] += 1
    added: dict[str, list[str]] = {}
    for name in sorted(new.keys() - old.keys()):
        added.setdefault(new[name][1], []).append(new[name][0])
    for name in sorted(old.keys() - new.keys()):
        group, digest = old[name]
        if same := added.get(digest):
            new_group = same.pop(0)
            is_there = group == new_group
            counts[f"of {group} renamed" if is_there else f"moved from {group} to {new_group}"] += 1
        else:
            counts[f"gone from {group}"] += 1
    counts.update(f"added to {group}" for groups in added.values() for group in groups)
    return [f"{n} {'file' if n == 1 else 'files'} {what}" for what, n in sorted(counts.items())]


def _group_difference(group: str, before: Images, now: Images) -> str:
    counts = [
        " ".join(next(iter(contents.get(group, {}).values()), "no images").split()[:2])
        for contents in (before, now)
    ]
    return f"{group}: {counts[0]}, now {counts[1]}" + (
        ", but others" if counts[0] == counts[1] else ""
    )
