"""What data sets and methods say to the command line, and the experiments that they make together.

A place, in what follows, is a kind of task ("structured", "semantic") or the name of a data set;
what is said of a data set counts over what is said of its kind.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from configs.cache import cache_folder
from configs.experiment import Experiment
from configs.options import DataOptions, MethodOptions, OnlyWith, check_types, marks_of, option_name

E = TypeVar("E", bound=Experiment)
Changes = Mapping[str, Mapping[str, Any]]
"""Place -> field -> value."""
ANY_MODEL = "NAME"
"""Stands, after a colon, for any model of a library: `anomalib:NAME` for `anomalib:patchcore`."""


@dataclass(frozen=True, kw_only=True)
class MethodPreset:
    """Settings of a method.

    Attributes:
        options: its options, with its paper's values.
        on: what changes in them, by place.
        experiment: what changes in the experiment itself (layers, sizes), by place.
        ignores: options of the experiment that do nothing for it, beside those that follow from
            what it takes; setting one is refused.
        unfitted: models of a library that learn nothing from normal images: one head for all
            categories is what they always have.
    """

    options: MethodOptions
    on: Changes = field(default_factory=dict)
    experiment: Changes = field(default_factory=dict)
    ignores: frozenset[str] = frozenset()
    unfitted: frozenset[str] = frozenset()

    @property
    def ignored(self) -> frozenset[str]:
        """All options of the experiment that do nothing for it."""
        return self.ignores


@dataclass(frozen=True, kw_only=True)
class DataPreset:
    """Settings of a data set.

    Attributes:
        experiment: fields of an experiment on it: backbone, sizes, and where it lies; without that,
            it is built in the cache or needs no folder.
        options: its own options.
        has_synthetic: whether anomalies can be made of its normal images, to choose by.
    """

    experiment: Mapping[str, Any]
    options: DataOptions = field(default_factory=DataOptions)
    has_synthetic: bool = True


@dataclass(frozen=True)
class Catalogue(Generic[E]):
    """What a kind of experiment can be made of; the first of each is the default.

    Attributes:
        kind: of experiment.
        data_sets: by name.
        methods: by name; `LIBRARY:NAME` stands for every model of a library.
    """

    kind: type[E]
    data_sets: Mapping[str, DataPreset]
    methods: Mapping[str, MethodPreset]

    def method(self, name: str) -> MethodPreset:
        """Return the settings of a method or of a library's model.

        Raises:
            KeyError: there is none of that name.
        """
        library, colon, model = name.partition(":")
        return self.methods[f"{library}:{ANY_MODEL}" if colon and model else name]

    def compose(self, dataset: str, method: str) -> E:
        """Return the preset of a data set and a method."""
        data, preset = self.data_sets[dataset], self.method(method)
        places = (self.kind.task, dataset)
        changes = _changes(preset.experiment, places)
        fields = {"data_root": cache_folder(), **data.experiment, **changes}
        if data.experiment["crop_size"] is None and changes.get("crop_size"):
            fields |= {"image_size": changes["crop_size"], "crop_size": None}  # images stay whole
        if fields.get("select") == "synthetic" and not data.has_synthetic:
            fields["select"] = "last"
        named = {"model": method.partition(":")[2]} if ":" in method else {}
        options = dataclasses.replace(preset.options, **_changes(preset.on, places), **named)
        return self.kind(
            dataset=dataset, method_name=method, method=options, data=data.options, **fields
        )

    def from_json(self, values: dict[str, Any]) -> E:
        """Rebuild an experiment from config.json.

        Raises:
            ValueError: a field is unknown or missing, or a value is not allowed.
        """
        try:
            dataset, name = values["dataset"], values["method_name"]
            if dataset not in self.data_sets:
                raise ValueError(f"unknown data set {dataset!r}")
            if (task := task_of(values)) != self.kind.task:
                raise ValueError(f"a run on {task} data, which another script makes")
            experiment = self.kind.from_json(
                values,
                data=type(self.data_sets[dataset].options),
                method=type(self.method(name).options),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a configuration of this version: {error}") from error
        self.check(experiment)
        return experiment

    def check(self, experiment: E) -> None:
        """Check what an experiment asks of its data set and of its method.

        Raises:
            ValueError: it chooses by synthetic anomalies, and there are none; or it is to fit one
                head on all categories with a method that fits none.
        """
        model = experiment.method_name.partition(":")[2]
        if experiment.is_joint and model in self.method(experiment.method_name).unfitted:
            raise ValueError(
                f"--protocol multi-class has no meaning for {experiment.method_name}, which learns "
                "nothing from normal images: its scores are the same; leave it out"
            )
        can_be_made = self.data_sets[experiment.dataset].has_synthetic
        if experiment.select == "synthetic" and not can_be_made:
            raise ValueError(
                "--select synthetic makes semantic anomalies by rotation, and a turned digit is no "
                "anomaly (0, 8; 6 and 9): use --select last"
            )

    def idle_options(self, experiment: E, preset: E) -> list[tuple[str, str]]:
        """Return what was set beside a preset and does nothing: option, and why."""
        idle = [
            (option_name(name), f"for {experiment.method_name}")
            for name in sorted(self.method(experiment.method_name).ignored)
            # Options of the other kind of task are not even fields here.
            if hasattr(preset, name) and getattr(experiment, name) != getattr(preset, name)
        ]
        options = experiment.method
        for entry in dataclasses.fields(options):
            value = getattr(options, entry.name)
            for mark in marks_of(type(options), entry.name):
                if not isinstance(mark, OnlyWith) or value == getattr(preset.method, entry.name):
                    continue
                if not mark.holds(getattr(options, mark.option)):
                    needed = f"unless {option_name(mark.option, 'method.')} is {mark.words}"
                    idle.append((option_name(entry.name, "method."), needed))
        return idle


def task_of(values: Mapping[str, Any]) -> str:
    """Return the kind of task of a config.json: only structured experiments have patches."""
    return "structured" if "patch_size" in values else "semantic"


def with_options(method: MethodOptions, options: dict[str, Any]) -> MethodOptions:
    """Return a method's options with some of them, JSON values, changed.

    Raises:
        ValueError: an option is unknown, or a value is not allowed.
    """
    changes: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        changed = dataclasses.replace(method, **changes)
    except TypeError as error:
        raise ValueError(f"not options of this method: {error}") from error
    check_types(changed)
    return changed


def _changes(changes: Changes, places: tuple[str, str]) -> dict[str, Any]:
    """Return what is changed at a kind of task and at a data set, the latter over the former."""
    kind, dataset = places
    return {**changes.get(kind, {}), **changes.get(dataset, {})}
