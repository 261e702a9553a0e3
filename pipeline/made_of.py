"""What an experiment is made of, as it is there now: images, masks and weights; needs no torch."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from configs.cache import cache_folder
from configs.options import Names, fields_marked
from datasets.contents import Contents, Digests, contents_of
from datasets.reading.finding import find_images
from datasets.samples import DataError, Task
from pipeline.experiments import AnyExperiment
from utils.runs.made_of import OF_TRAINING, WHATEVER, MadeOf


def made_of(
    experiment: AnyExperiment, tasks: Sequence[Task], backbone: str = WHATEVER
) -> dict[str, MadeOf]:
    """Return what the heads of each task would be made of, by category.

    Files that were digested before, and have the same path, size and time, are not read again. A
    head of several categories is made of the training images of all.

    Args:
        experiment: names the data root, and files: of weights, or of what its method takes.
        tasks: its categories.
        backbone: short hash of the backbone's weights; unknown without.
    """
    digests = Digests(cache_folder() / "digests.sqlite")
    weights = _named_files(experiment, digests)
    root = experiment.data_root
    contents = {task.category: contents_of(task, root, digests) for task in tasks}
    if experiment.is_joint:
        trained_on: Contents = {}
        for found in contents.values():
            for group, names in found.items():
                if group.startswith(OF_TRAINING):
                    trained_on.setdefault(group, {}).update(names)
        contents = {category: found | trained_on for category, found in contents.items()}
    return {category: MadeOf(found, weights, backbone) for category, found in contents.items()}


def _named_files(experiment: AnyExperiment, digests: Digests) -> str:
    """Return digests of the files that options name, and one of all images below such a folder."""
    method = experiment.method
    texts = [experiment.weights, *vars(method).values()]
    files = [Path(text) for text in texts if isinstance(text, str) and Path(text).is_file()]
    found = digests.of(files) if files else []
    for name in sorted(fields_marked(type(method), Names.IMAGES)):
        folder = getattr(method, name)
        if folder is None or not Path(folder).is_dir():
            continue
        with contextlib.suppress(DataError):  # the method refuses an empty one
            images = " ".join(digests.of(find_images([folder])))
            found.append(hashlib.blake2b(images.encode(), digest_size=16).hexdigest())
    return " ".join(found) if found else WHATEVER
