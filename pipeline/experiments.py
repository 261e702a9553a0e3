"""The experiments of the training scripts: command lines, configurations, data; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs.command_line import parse
from configs.presets import Catalogue, task_of
from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from datasets.data_set import SemanticSet, StructuredSet, find_data_sets
from datasets.samples import DataError, Task
from datasets.tasks.one_class import one_class_tasks
from datasets.tasks.structured import in_whole_batches, structured_tasks
from models.method import find_methods

AnyExperiment = StructuredExperiment | SemanticExperiment


@dataclass(frozen=True)
class Script:
    """A training script.

    Attributes:
        name: of its module.
        description: first line of its --help.
        kind: of its data: "structured", or semantic in "colour" or "grey".
    """

    name: str
    description: str
    kind: Literal["structured", "colour", "grey"]

    def catalogue(self) -> Catalogue[StructuredExperiment] | Catalogue[SemanticExperiment]:
        """Return the data sets and methods that it has."""
        if self.kind == "structured":
            return structured_catalogue()
        return semantic_catalogue(is_grey=self.kind == "grey")

    def parse(self, argv: Sequence[str] | None) -> AnyExperiment:
        """Read its command line; see `configs.command_line.parse`."""
        catalogue: Catalogue[Any] = self.catalogue()
        experiment: AnyExperiment = parse(
            argv, catalogue, prog=f"{self.name}.py", description=self.description
        )
        return experiment


SCRIPTS = {
    script.name: script
    for script in (
        Script("train_mvtec", "Structured anomaly detection.", "structured"),
        Script("train_cifar10", "Semantic anomaly detection on colour images.", "colour"),
        Script("train_mnist", "Semantic anomaly detection on grey images.", "grey"),
    )
}


def structured_catalogue() -> Catalogue[StructuredExperiment]:
    """Return the structured data sets, and the methods for them."""
    methods = find_methods("structured")
    return Catalogue(StructuredExperiment, find_data_sets(StructuredSet), methods)


def semantic_catalogue(*, is_grey: bool | None = None) -> Catalogue[SemanticExperiment]:
    """Return the labelled data sets, all or those in grey or colour, and methods for them."""
    data_sets = find_data_sets(SemanticSet)
    if is_grey is not None:
        data_sets = {name: one for name, one in data_sets.items() if one.is_grey == is_grey}
    return Catalogue(SemanticExperiment, data_sets, find_methods("semantic"))


def experiment_of(config: Mapping[str, Any]) -> AnyExperiment:
    """Rebuild the experiment of a run's configuration.

    Raises:
        ValueError: it is none of this version.
    """
    if task_of(config) == "structured":
        return structured_catalogue().from_json(dict(config))
    return semantic_catalogue().from_json(dict(config))


def read_tasks(experiment: AnyExperiment, categories: Sequence[str] | None = None) -> list[Task]:
    """Read what data an experiment is on: a task for each category or normal class.

    Args:
        experiment: names the data set, where it lies, and its categories.
        categories: others instead.

    Raises:
        DataError: the data cannot be found, or are missing or inconsistent; a category is unknown;
            or there is one category for the head of several.
    """
    wanted = experiment.categories if categories is None else categories
    if isinstance(experiment, StructuredExperiment):
        structured = find_data_sets(StructuredSet)[experiment.dataset]
        tasks = structured_tasks(structured, experiment.data_root, wanted, experiment.data)
        if categories is None and experiment.is_joint and len(tasks) < 2:
            raise DataError(
                "--protocol multi-class wants several categories and there is one, "
                f"{tasks[0].category}; leave the option out"
            )
        if experiment.test_batches is None:
            return tasks
        return [in_whole_batches(task, experiment.test_batches) for task in tasks]
    labelled = find_data_sets(SemanticSet)[experiment.dataset].read(experiment.data_root)
    return one_class_tasks(labelled, experiment.protocol, wanted)


def groups_of(experiment: AnyExperiment) -> Mapping[str, Sequence[str]]:
    """Return the groups of categories that get a mean line of their own in a table."""
    if isinstance(experiment, SemanticExperiment):
        return {}
    return find_data_sets(StructuredSet)[experiment.dataset].groups


def leaves_one_out(experiment: AnyExperiment) -> bool:
    """Whether the class that a task is named after is its anomaly."""
    return isinstance(experiment, SemanticExperiment) and experiment.protocol == "leave-one-out"
