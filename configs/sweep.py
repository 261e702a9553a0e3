"""The command line of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


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
