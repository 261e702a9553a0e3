"""What a sweep consists of: training commands, and a job for each category and seed of one."""

import contextlib
import hashlib
import io
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.experiment import Experiment
from configs.options import Role, fields_marked
from configs.semantic import SemanticExperiment
from configs.sweep import SweepOptions
from datasets.samples import DataError
from pipeline.experiments import SCRIPTS, AnyExperiment, read_tasks
from utils.runs.merging import Pair
from utils.sweep.jobs import Job

SET_BY_THE_SWEEP = fields_marked(Experiment, Role.PART) | {"output"}
"""Options of the scripts that the sweep has itself."""
NOT_IN_A_SWEEP = frozenset({"run", "restart", "from-run", "help"})
"""Options of the scripts that would make jobs overwrite or repeat one another."""


class PlanError(Exception):
    """The sweep asks for something the scripts have not; the message says what and the way out."""


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

    def parse(self, words: Sequence[str]) -> AnyExperiment:
        """Parse a command of its script.

        Raises:
            PlanError: the script would refuse it.
        """
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                return SCRIPTS[self.script].parse(words)
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
        script, dataset = script_of(name)
        split = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        root = _data_root(options.data_roots, name, names)
        # What varies comes last, because the last of equal options counts.
        words = [dataset, *words[:split], *root, *extra, *words[split:]]
        _check_words(words)
        categories = _values_for(name, options.categories, names)
        found.append(Combination(title, script, tuple(words), tuple(categories), options.seeds))
    return found


def script_of(name: str) -> tuple[str, str]:
    """Return the script of a data set and its name there."""
    wanted, _, dataset = name.rpartition(":")
    data_sets = {script: list(one.catalogue().data_sets) for script, one in SCRIPTS.items()}
    scripts = [s for s, names in data_sets.items() if dataset in names and wanted in ("", s)]
    if not scripts:
        known = dict.fromkeys(itertools.chain(*data_sets.values()))
        raise PlanError(f"unknown data set {name!r} (known: {', '.join(known)})")
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


@dataclass(frozen=True)
class PlannedJob:
    """A job, the pairs it makes, and where.

    Attributes:
        job: the command.
        pairs: one; where a head is for all categories, each of them with the seed.
        folder: of the run that it makes.
    """

    job: Job
    pairs: tuple[Pair, ...]
    folder: Path


@dataclass(frozen=True)
class PlannedRun:
    """A combination with its categories, and its jobs: one for each head."""

    combination: Combination
    experiment: AnyExperiment
    categories: tuple[str, ...]
    jobs: tuple[PlannedJob, ...]

    @property
    def command(self) -> tuple[str, ...]:
        """The plain training command that makes the same run."""
        words = self.combination.command(self.experiment.output)
        return (f"{self.combination.script}.py", *words)


def plan(options: SweepOptions, extra: Sequence[str]) -> tuple[list[PlannedRun], dict[str, str]]:
    """Return the runs of a sweep, and the combinations left out, with the reason.

    Raises:
        PlanError: combinations cannot run, and `--skip-invalid` is not given.
    """
    needs_cuda = options.engine == "gpus" or options.gpus_per_task > 0
    if needs_cuda and any(word.partition("=")[0] == "--device" for word in extra):
        raise PlanError("--device is chosen by the engine here; leave it out")
    runs: dict[Path, PlannedRun] = {}
    left_out: dict[str, str] = {}
    listed: dict[tuple[object, ...], tuple[str, ...]] = {}
    for combination in combinations(options, extra):
        try:
            planned = plan_run(combination, options.output, listed, needs_cuda=needs_cuda)
        except (PlanError, DataError) as error:
            left_out[combination.title] = str(error)
        else:
            runs.setdefault(planned.experiment.run_folder, planned)  # two ways to write one run
    if left_out and not options.skip_invalid:
        lines = [f"  {title}\n    {reason}" for title, reason in left_out.items()]
        raise PlanError(
            "these combinations cannot run:\n" + "\n".join(lines) + "\nTake them out of the grid "
            "(--set names single combinations), or pass --skip-invalid to run the others."
        )
    if not runs:
        raise PlanError("no combination can run:\n" + "\n".join(left_out.values()))
    return list(runs.values()), left_out


def plan_run(
    combination: Combination,
    output: Path,
    listed: dict[tuple[object, ...], tuple[str, ...]],
    *,
    needs_cuda: bool,
) -> PlannedRun:
    """Check a combination and make its jobs; `listed` keeps categories that were looked up.

    Raises:
        PlanError: its script would refuse it.
        DataError: its data cannot be found.
    """
    experiment = combination.parse(combination.command(output))
    key = (
        *(combination.script, experiment.dataset, experiment.data_root, experiment.categories),
        *(experiment.data, isinstance(experiment, SemanticExperiment) and experiment.protocol),
    )
    if key not in listed:
        listed[key] = tuple(task.category for task in read_tasks(experiment))
    jobs = []
    # Seeds outside: the first seed of each category stores the features that the others read.
    for seed in combination.seeds:
        for categories in [listed[key]] if experiment.is_joint else [(c,) for c in listed[key]]:
            asked = combination.categories if experiment.is_joint else categories
            words = combination.words_for(asked, [seed], output / "jobs")
            if not any(word.partition("=")[0] == "--cache" for word in combination.words):
                words = (*words, "--cache", "disk")
            if seed != combination.seeds[0]:
                words = (*words, "--overlays", "0")  # of the first seed only, as in a plain run
            if needs_cuda:
                words = (*words, "--device", "cuda")
            folder = combination.parse(words).run_folder
            name = f"{combination.title}, {' and '.join(categories)}, seed {seed}"
            job = Job(name, combination.script, words, log=str(log_beside(folder)))
            pairs = tuple((category, seed) for category in categories)
            jobs.append(PlannedJob(job, pairs, folder))
    return PlannedRun(combination, experiment, listed[key], tuple(jobs))


def sweep_folder(options: SweepOptions, runs: Sequence[PlannedRun]) -> Path:
    """Return the folder for the lists of a sweep; the same grid always names the same one."""
    folders = "\n".join(str(run.experiment.run_folder.relative_to(options.output)) for run in runs)
    digest = hashlib.blake2b(folders.encode(), digest_size=4).hexdigest()
    return options.output / f"sweep-{options.name or digest}"


def log_beside(run_folder: Path) -> Path:
    """Return where the output of a job goes: a folder that is thrown away keeps its log."""
    return run_folder.with_name(f"{run_folder.name}.log")
