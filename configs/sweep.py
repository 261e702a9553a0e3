"""The command line of a sweep, and the training commands it stands for."""

import contextlib
import io
import itertools
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from configs.command_line import parse
from configs.experiment import Experiment
from configs.methods import SEMANTIC_METHODS, STRUCTURED_METHODS
from configs.semantic import COLOUR, GREY, semantic_experiment
from configs.structured import DATASETS as STRUCTURED
from configs.structured import structured_experiment


class PlanError(Exception):
    """The sweep asks for something the scripts have not; the message says what and the way out."""


@dataclass(frozen=True)
class Script:
    """What a training script gives to `configs.command_line.parse`."""

    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    compose: Callable[[str, str], Experiment]


SCRIPTS: dict[str, Script] = {
    "train_mvtec": Script(tuple(STRUCTURED), STRUCTURED_METHODS, structured_experiment),
    "train_cifar10": Script(tuple(COLOUR), SEMANTIC_METHODS, semantic_experiment),
    "train_mnist": Script(tuple(GREY), SEMANTIC_METHODS, semantic_experiment),
}

SET_BY_THE_SWEEP = frozenset({"categories", "seeds", "output"})
"""Options of the scripts that the sweep has itself."""
NOT_IN_A_SWEEP = frozenset({"run", "restart", "from-run", "help"})
"""Options of the scripts that would make jobs overwrite or repeat one another."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """A grid of data sets, methods and options, each with all its categories and seeds."""

    datasets: tuple[str, ...] = ()
    """Data sets, e.g. demo digits; `folder` is train_mvtec:folder or train_cifar10:folder."""
    methods: tuple[str, ...] = ("noco",)
    """Methods, e.g. noco noco_cf knn."""
    options: tuple[str, ...] = ()
    """Options to vary, e.g. method.norm=0.5,1,4 layers="2 3,1 2 3": all combinations are run."""
    sets: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Single combinations beside the grid, e.g. "demo simplenet --method.sigma 0.05"."""
    categories: tuple[str, ...] = ()
    """Categories or normal classes; all by default. demo=brick names one of a single data set."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; a job is one category and one seed."""
    data_roots: tuple[str, ...] = ()
    """Folders of the data sets, e.g. mvtec=/data/mvtec visa=/data/VisA."""
    skip_invalid: bool = False
    """Leave out combinations that no script can run, and list them, instead of stopping."""

    output: Path = Path("results")
    """Run folders are made below it; on a Ray cluster all machines must share it."""
    name: str = ""
    """Of the folder for logs and lists, <output>/sweep-<name>; by default a digest of the grid."""
    engine: Literal["local", "gpus", "ray"] = "local"
    """In this process (or --jobs processes), on the CUDA devices of this machine, or on a Ray
    cluster, whose machines must have this code, the data and --output under the same paths."""
    jobs: int | None = None
    """Processes (local), processes for each device (gpus), or tasks at a time (ray)."""
    gpus: tuple[str, ...] = ()
    """CUDA devices to use (gpus), e.g. 0 1; all by default."""
    ray_address: str = "local"
    """auto for the cluster this machine is in, host:port, or local to start Ray here."""
    gpus_per_task: float = 0.0
    """CUDA devices each task claims (ray): 1, or 0.5 for two tasks on a device."""
    dry_run: bool = False
    """List the jobs and run nothing."""

    def __post_init__(self) -> None:
        if not self.datasets and not self.sets:
            raise ValueError("--datasets needs at least one data set, or --set a combination")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs {self.jobs} must be at least 1")
        if Path(self.name).name != self.name:
            raise ValueError(f"--name {self.name!r} must be a plain name; see also --output")
        for option, is_given, engine in (
            ("--gpus", bool(self.gpus), "gpus"),
            ("--ray-address", self.ray_address != "local", "ray"),
            ("--gpus-per-task", self.gpus_per_task != 0, "ray"),
        ):
            if is_given and self.engine != engine:
                raise ValueError(f"{option} is for --engine {engine}")
        if not 0 <= self.gpus_per_task < float("inf"):
            raise ValueError(f"--gpus-per-task {self.gpus_per_task} must be 0 or above")


def sweep_options(argv: Sequence[str]) -> tuple[SweepOptions, tuple[str, ...]]:
    """Parse the command line of a sweep; errors end the program with a message and exit code 2.

    Returns:
        The options, and the words after `--`, which every training command gets.
    """
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    description = (
        "A grid of data sets, methods and options as independent jobs, one for each category and "
        "seed. What follows after -- goes to every training command."
    )
    options = tyro.cli(SweepOptions, args=words[:place], prog="sweep.py", description=description)
    return options, tuple(words[place + 1 :])


@dataclass(frozen=True)
class Combination:
    """A data set, a method and options: one run with all its categories and seeds.

    Attributes:
        title: what the user sees of it; two runs never share it.
        script: module of its script.
        words: of the command, without categories, seeds and output.
        categories: asked for; none for all.
        seeds: of the run.
    """

    title: str
    script: str
    words: tuple[str, ...]
    categories: tuple[str, ...]
    seeds: tuple[int, ...]

    def command(self, output: Path) -> tuple[str, ...]:
        """Return the words of the one command that runs all of it."""
        return self.words_for(self.categories, self.seeds, output)

    def words_for(
        self, categories: Sequence[str], seeds: Sequence[int], output: Path
    ) -> tuple[str, ...]:
        """Return the words of a command for some of it."""
        chosen = ("--categories", *categories) if categories else ()
        seeds_words = ("--seeds", *map(str, seeds))
        return (*self.words, *chosen, *seeds_words, "--output", str(output))

    def parse(self, words: Sequence[str]) -> Experiment:
        """Parse a command of its script.

        Raises:
            PlanError: the script would refuse it.
        """
        script = SCRIPTS[self.script]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                return parse(
                    words,
                    compose=script.compose,
                    datasets=script.datasets,
                    methods=script.methods,
                    prog=f"{self.script}.py",
                    description="",
                )
        except SystemExit:
            raise PlanError(_reason(said.getvalue())) from None


def combinations(options: SweepOptions, extra: Sequence[str]) -> list[Combination]:
    """Return the combinations of the grid, then those of `--set`.

    Args:
        options: of the sweep.
        extra: words that every command gets.

    Raises:
        PlanError: a data set is unknown, or an option is malformed or the sweep's own.
    """
    grid = [
        [dataset, method, *itertools.chain(*point)]
        for dataset in options.datasets
        for method in options.methods
        for point in itertools.product(*map(_axis, options.options))
    ]
    sets = [shlex.split(text) for text in options.sets]
    if any(not words or words[0].startswith("-") for words in sets):
        raise PlanError('--set takes a data set, a method and options: "demo simplenet"')
    names = {words[0] for words in [*grid, *sets]}
    found = []
    for name, *words in [*grid, *sets]:
        title = shlex.join([name, *words])
        script, dataset = _script_of(name)
        split = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        root = _data_root(options.data_roots, name, names)
        # What varies comes last, because the last of equal options counts.
        words = [dataset, *words[:split], *root, *extra, *words[split:]]
        _check_words(words)
        categories = _values_for(name, options.categories, names)
        found.append(Combination(title, script, tuple(words), tuple(categories), options.seeds))
    return found


def _script_of(name: str) -> tuple[str, str]:
    """Return the script of a data set and its name there."""
    wanted, _, dataset = name.rpartition(":")
    scripts = [
        script
        for script, entry in SCRIPTS.items()
        if dataset in entry.datasets and wanted in ("", script)
    ]
    if not scripts:
        known = [dataset for entry in SCRIPTS.values() for dataset in entry.datasets]
        raise PlanError(f"unknown data set {name!r} (known: {', '.join(dict.fromkeys(known))})")
    if len(scripts) > 1:
        ways = " or ".join(f"{script}:{dataset}" for script in scripts)
        raise PlanError(f"{dataset!r} is a data set of several scripts: say {ways}")
    return scripts[0], dataset


def _axis(item: str) -> list[list[str]]:
    """Return the words of each value of `OPTION=VALUE,VALUE`."""
    name, _, values = item.removeprefix("--").partition("=")
    if not name or not all(value.strip() for value in values.split(",")):
        raise PlanError(f"--options {item!r} must be OPTION=VALUE,VALUE, as method.norm=0.5,1,4")
    return [_option(name, value) for value in values.split(",")]


def _option(name: str, value: str) -> list[str]:
    if value in ("True", "False"):  # a switch; no option takes these words
        head, dot, last = name.rpartition(".")
        return [f"--{head}{dot}{'' if value == 'True' else 'no-'}{last}"]
    return [f"--{name}", *shlex.split(value)]


def _values_for(dataset: str, items: Sequence[str], datasets: set[str]) -> list[str]:
    """Return the items of one data set: those without a name, and those with its own."""
    values = []
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or name not in datasets:
            values.append(item)
        elif name == dataset:
            values.append(value)
    return values


def _data_root(items: Sequence[str], dataset: str, datasets: set[str]) -> list[str]:
    roots = _values_for(dataset, items, datasets)
    unnamed = [item for item in items if item.partition("=")[0] not in datasets]
    if unnamed and len(datasets) > 1:
        known = " or ".join(sorted(datasets))
        raise PlanError(f"--data-roots {unnamed[0]!r} must be DATASET=FOLDER, with {known}")
    if len(roots) > 1:
        raise PlanError(f"--data-roots gives {dataset} two folders: {', '.join(roots)}")
    return ["--data-root", *roots] if roots else []


def _check_words(words: Sequence[str]) -> None:
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("_", "-")
        if word.startswith("--") and name in SET_BY_THE_SWEEP:
            raise PlanError(
                f"--{name} is the sweep's own option: put it before -- and outside --set"
            )
        if word == "-h" or (word.startswith("--") and name in NOT_IN_A_SWEEP):
            raise PlanError(f"{word} has no place in a sweep; the same command continues a sweep")


def _reason(said: str) -> str:
    """Return what a script said when it refused a command, without frame and hints."""
    text = re.sub("[\u2500-\u257f]|-{5,}", " ", said)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    if said.startswith("error: "):
        return lines[0].partition(": ")[2].partition(": ")[2]
    # tyro: a heading, a rule, the message, another rule and help.
    body = " ".join(lines[1:]).strip() if lines else ""
    return re.split(r"Argument helptext|Perhaps you meant|For full helptext", body)[0].strip()
