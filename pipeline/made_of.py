"""What an experiment is made of, as it is there now: images, masks and weights; needs no torch."""

from collections.abc import Sequence
from pathlib import Path

from configs.cache import cache_folder
from datasets.contents import Digests, contents_of
from datasets.samples import Task
from pipeline.experiments import AnyExperiment
from utils.runs.made_of import WHATEVER, MadeOf


def made_of(
    experiment: AnyExperiment, tasks: Sequence[Task], backbone: str = WHATEVER
) -> dict[str, MadeOf]:
    """Return what the heads of each task would be made of, by category.

    Files that were digested before, and have the same path, size and time, are not read again.

    Args:
        experiment: names the data root, and files: of weights, or of what its method takes.
        tasks: its categories.
        backbone: short hash of the backbone's weights; unknown without.
    """
    digests = Digests(cache_folder() / "digests.sqlite")
    texts = [experiment.weights, *vars(experiment.method).values()]
    files = [Path(text) for text in texts if isinstance(text, str) and Path(text).is_file()]
    weights = " ".join(digests.of(files)) if files else WHATEVER
    root = experiment.data_root
    return {
        task.category: MadeOf(contents_of(task, root, digests), weights, backbone) for task in tasks
    }
