"""What run folders logged, and how to tell several of them apart in a legend."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.options import Role, fields_marked
from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from utils.errors import RunError, UsageError
from utils.runs.files import corrupt, flat, read_records
from utils.runs.run import Run

Pair = tuple[str, int]
"""Category and seed."""
Curve = tuple[list[int], list[float]]
"""Steps (epochs), and a value after each."""


@dataclass(frozen=True)
class LoggedRun:
    """A run folder, read only.

    Attributes:
        run: its configuration and rows.
        records: the lines of metrics.jsonl, in order.
        label: method, and whatever sets it apart from the runs it was read with.
    """

    run: Run
    records: list[dict[str, Any]]
    label: str

    @property
    def title(self) -> str:
        """The label with the data set before it."""
        return f"{self.run.config['dataset']}, {self.label}"

    def of_event(self, event: str) -> dict[Pair, list[dict[str, Any]]]:
        """Return the records of an event, by category and seed."""
        found: dict[Pair, list[dict[str, Any]]] = defaultdict(list)
        for record in self.records:
            if record.get("event") == event:
                found[record["category"], record["seed"]].append(record)
        return dict(found)

    def curves(self, name: str) -> dict[Pair, Curve]:
        """Return steps (epochs) and values of what was logged after each, by category and seed.

        Steps without a value `name` are left out, and pairs without any.
        """
        return self._curves(self.of_event("step"), name)

    def selection_curves(self, name: str) -> dict[Pair, Curve]:
        """Return such curves of `--select synthetic`: of its fit with the options it then chose.

        That fit saw only the normals that were not held out.
        """
        try:
            chosen = {
                pair: rs[-1]["options"].items() for pair, rs in self.of_event("chosen").items()
            }
            fits = {
                pair: [r for r in records if r["options"].items() <= chosen[pair]]
                for pair, records in self.of_event("selection").items()
                if pair in chosen
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise self._corrupt_log("options", error) from error
        return self._curves(fits, name)

    def _curves(self, fits: dict[Pair, list[dict[str, Any]]], name: str) -> dict[Pair, Curve]:
        curves = {}
        for pair, records in fits.items():
            kept = [r for r in records if r.get(name) is not None]
            try:
                # An infinity is logged as text, which float reads.
                steps, values = [int(r["step"]) for r in kept], [float(r[name]) for r in kept]
            except (KeyError, TypeError, ValueError) as error:
                raise self._corrupt_log(name, error) from error
            if kept:
                curves[pair] = (steps, values)
        return curves

    def _corrupt_log(self, name: str, error: Exception) -> RunError:
        return corrupt(self.run.folder / "metrics.jsonl", f"{name}: {error!r}")


def options_without_effect() -> frozenset[str]:
    """Return the options that change which lines a table has, or what is done beside it."""
    kinds, roles = (StructuredExperiment, SemanticExperiment), (Role.PART, Role.BESIDE)
    marked = [fields_marked(kind, role) for kind in kinds for role in roles]
    return frozenset({"data_root"}).union(*marked)


def beside_the_method() -> frozenset[str]:
    """Return the options that do not change what a method is; some stand in a table's lines."""
    return options_without_effect() | {"dataset", "select", "grid"}


def images_of(config: Mapping[str, Any]) -> str:
    """Name the images of a run: folders of one's own by their last part."""
    if config["dataset"] != "folder":
        return str(config["dataset"])
    return f"folder {Path(str(config.get('data_root', ''))).name}"


def check_named_once(folders: Sequence[Path]) -> None:
    """Refuse a run folder that is named twice: it would be compared with itself.

    Raises:
        UsageError: one is.
    """
    known: set[Path] = set()
    for folder in folders:
        if folder.resolve() in known:
            raise UsageError(f"{folder}: the run is named twice")
        known.add(folder.resolve())


def read_runs(folders: Sequence[Path], *, same_but: Collection[str] = ()) -> list[LoggedRun]:
    """Read run folders and give them labels that differ.

    Args:
        folders: of the runs.
        same_but: options of the experiment that tell nothing apart: runs that differ in nothing
            else share a label.

    Raises:
        RunError: one is no run folder, or a file of it is corrupt.
    """
    runs = [read_named_run(folder) for folder in folders]
    configs = [
        {name: value for name, value in run.config.items() if name not in same_but} for run in runs
    ]
    labels = _labels(configs)
    if not same_but and len(set(labels)) < len(labels):
        labels = [f"{label} ({run.folder.name})" for label, run in zip(labels, runs, strict=True)]
    return [
        LoggedRun(run, _records(run.folder / "metrics.jsonl"), label)
        for run, label in zip(runs, labels, strict=True)
    ]


def read_named_run(folder: Path) -> Run:
    """Read a run folder whose config.json says what it is a run of.

    Raises:
        RunError: it is no run folder, or config.json names no data set or no method.
    """
    run = Run.read(folder)
    for name in ("dataset", "method_name"):
        if not isinstance(run.config.get(name), str):
            raise corrupt(folder / "config.json", f"{name} is {run.config.get(name)!r}")
    return run


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_records(path)
    for record in records:
        category, seed = record.get("category"), record.get("seed")
        if not isinstance(category, str) or not isinstance(seed, int):
            raise corrupt(path, f"a record of category {category!r}, seed {seed!r}")
    return records


def _labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return each run's method with the options in which it differs from others of that method."""
    leaves = [flat(config) for config in configs]
    labels = []
    for config, own in zip(configs, leaves, strict=True):
        same = [other for other in leaves if other["method_name"] == own["method_name"]]
        differing = [
            f"{key.removeprefix('method.').replace('_', ' ')} {value}".replace('"', "")
            for key, value in own.items()
            if len({other.get(key) for other in same}) > 1
        ]
        labels.append(", ".join([config["method_name"], *differing]))
    return labels
