"""Every method of the suite on several data sets, on one page.

    python -m benchmarks.comparison --data-sets demo digits --budget short      # make compare-demo
    python -m benchmarks.comparison --data-root PARTS TILES --classes MY_CLASSES --seeds 0 1 2
    python -m benchmarks.comparison --data-sets mvtec=/data/mvtec mnist=/data/mnist

It runs sweep.py over all methods, data sets and seeds, and figures.compare over what came out:
--output/comparison.html has the table, mean ranks with a critical-difference diagram, accuracy
against time and bars for each set. The same command continues; another one with the same --output
writes a new page, of its own runs. What failed is left out of the page, and the exit code is 1.
Options that are not listed below go to the training scripts, and count more than those of a budget:
--image-size 256.

With the budget `presets` nothing is changed, which takes days on a CPU and hours on a GPU. With
`minutes`, what trains a network does so for about a minute on a GPU, and with `short` for seconds
on a CPU, partly on small images; of digits three are then normal classes. Numbers of such a method
say what it does with so much, not how good it is. `saa` and the models of anomalib need what this
suite cannot bring, and are not run.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.method import find_method, find_methods
from pipeline.planning import PlanError, script_of
from utils.cli import exits_cleanly, stopped_as_interrupted

DIGITS = (0, 3, 8)
"""Normal classes of digits, with a smaller budget."""
WITH_DIGITS = ("digits", "mnist")
SOME_FAILED = 1
"""Exit code of a sweep that has done what it could."""
EMBEDDED = ("demo", "digits")
NOT_RUN = ("saa", "anomalib:NAME")
WHOLE = "--image-size 224 --crop-size none"
SMALL = "--image-size 96 --crop-size none"
SHORT = {
    "noco": "--method.epochs 20",
    "simplenet": "--method.epochs 10",
    "simplenet_released": "--method.epochs 3",
    "nc_disc": "--method.epochs 10",
    "padim": "--method.dims 100",
    "patchcore": "--method.coreset-ratio 0.01",
    "pni": f"--method.epochs 1 --method.dist-size 256 --method.mlp-width 256 {WHOLE}",
    "stpm": "--method.epochs 2",
    "ulsad": "--method.epochs 1",
    "ulsad_released": "--method.epochs 1",
    "dfr": "--method.epochs 1",
    "uniad": "--method.epochs 2 --method.hidden 64 --method.feed-forward 128",
    "differnet": "--method.epochs 1 --method.width 64 --method.train-views 4 "
    f"--method.test-views 4 {WHOLE}",
    "glow": "--method.epochs 5 --method.steps 4 --method.width 64",
    "glow_images": "--method.epochs 2 --method.levels 2 --method.steps 4 --method.width 32",
    "mspba": "--method.epochs 1 --method.samples-per-image 5 --image-size 127 --crop-size none",
    "autoencoder": "--method.epochs 1 --method.images-per-epoch 500 --method.width 16",
    "vae": "--method.epochs 1 --method.images-per-epoch 500 --method.width 16",
    "mnad": f"--method.epochs 1 --method.width 16 {SMALL}",
    "riad": f"--method.epochs 1 --method.width 8 {SMALL}",
    "draem": f"--method.epochs 1 --method.width 8 --method.discriminator-width 8 {SMALL}",
    "edgrec": f"--method.epochs 1 --method.width 8 {SMALL}",
    "memseg": f"--method.epochs 1 --method.steps-per-epoch 5 {SMALL}",
    "cutpaste": "--method.epochs 1 --method.steps-per-epoch 5 --image-size 64 --crop-size none",
    "ddad": "--method.epochs 1 --method.base-width 16 --method.start-step 50 "
    "--method.sampling-step 25 --image-size 32 --crop-size none",
    "deep_svdd": "--method.epochs 10 --method.pretrain-epochs 10",
    "panda": "--method.epochs 1",
    "panda_ewc": "--method.epochs 1",
    "mean_shifted": "--method.epochs 1",
}
"""What makes a method short enough for two cores; all others are."""
MINUTES = {
    "structured": {
        "stpm": "--method.epochs 30",
        "pni": f"--method.epochs 5 {WHOLE}",
        "ulsad": "--method.epochs 10",
        "ulsad_released": "--method.epochs 10",
        "dfr": "--method.epochs 10",
        "uniad": "--method.epochs 15",
        "differnet": "--method.epochs 24 --method.train-views 4 --method.test-views 4",
        "glow": "--method.epochs 5 --method.warmup-epochs 1",
        "autoencoder": "--method.epochs 20",
        "vae": "--method.epochs 20",
        "mnad": "--method.epochs 5",
        "riad": "--method.epochs 3",
        "draem": "--method.epochs 5",
        "edgrec": "--method.epochs 5",
        "memseg": "--method.epochs 10",
        "cutpaste": "--method.epochs 2",
        "ddad": "--method.epochs 6 --method.base-width 32",
        "mspba": SHORT["mspba"],
    },
    "semantic": {
        "simplenet": "--method.epochs 20",
        "simplenet_released": "--method.epochs 20",
        "nc_disc": "--method.epochs 20",
        "uniad": "--method.epochs 5",
        "differnet": "--method.epochs 24",
        "glow": "--method.epochs 10 --method.warmup-epochs 1",
        "glow_images": "--method.epochs 3 --method.levels 2 --method.steps 8 --method.width 128",
        "autoencoder": "--method.epochs 3",
        "vae": "--method.epochs 3",
        "mnad": "--method.epochs 1 --method.batch-size 32",
        "riad": "--method.epochs 1 --method.batch-size 32",
        "cutpaste": "--method.epochs 1",
        "ddad": "--method.epochs 3 --method.base-width 16",
        "deep_svdd": "--method.epochs 20 --method.pretrain-epochs 20",
        "panda": "--method.epochs 2",
        "panda_ewc": "--method.epochs 2",
        "mean_shifted": "--method.epochs 2",
    },
}
"""What makes a fit last about a minute on a GPU with other work; all others last no longer."""
BUDGETS: dict[str, dict[str, dict[str, str]]] = {
    "presets": {"structured": {}, "semantic": {}},
    "minutes": MINUTES,
    "short": {"structured": SHORT, "semantic": SHORT},
}
"""Budget -> task -> method -> options."""


@exits_cleanly(PlanError)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep and write the page.

    Raises:
        SystemExit: the exit code of the part that failed.
    """
    parser = command_line()
    arguments, further = parser.parse_known_args(argv)
    places = places_of(arguments)
    if not places:
        parser.error("name data: --data-root, --classes or --data-sets")
    words = words_of_sweep(places, methods_for(places, arguments.methods), arguments, further)
    code = code_of(["sweep.py", *words])
    if code not in (0, SOME_FAILED) or arguments.dry_run:
        raise SystemExit(code)
    listed = arguments.output / "sweep-comparison" / "runs.txt"
    runs = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else []
    runs = [run for run in runs if run and (Path(run) / "results.csv").is_file()]
    if not runs:
        raise SystemExit(code or SOME_FAILED)
    page = ["-m", "figures.compare", *runs, "--out", str(arguments.output / "comparison")]
    drawn = code_of(page)
    if code and not drawn:
        sys.stderr.write("the page lacks the runs of jobs that failed; their list is above\n")
    raise SystemExit(code or drawn)


def command_line() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what is not known goes to the scripts
    )
    layout = "folders in the layout of MVTec AD, the categories below them"
    parser.add_argument(
        "--data-root", nargs="+", type=Path, default=[], metavar="FOLDER", help=layout
    )
    parser.add_argument(
        "--classes", nargs="+", type=Path, default=[], metavar="FOLDER", help="of classes"
    )
    known = "what the suite knows by name: demo, digits, mvtec=/data/mvtec; papers stand beside"
    parser.add_argument("--data-sets", nargs="+", default=[], metavar="NAME[=FOLDER]", help=known)
    some = "some of a data set's: NAME, or SET=NAME where there are several"
    parser.add_argument("--categories", nargs="+", default=[], metavar="NAME", help=some)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="all by default")
    parser.add_argument("--seeds", nargs="+", default=["0"], metavar="SEED", help="(default: 0)")
    parser.add_argument(
        "--backbone", default="tf_efficientnet_lite0", help="of all (default: %(default)s)"
    )
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="presets", help="of training")
    parser.add_argument("--jobs", type=positive, default=1, help="processes (default: 1)")
    parser.add_argument("--skip-invalid", action="store_true", help="leave out what is refused")
    parser.add_argument("--dry-run", action="store_true", help="list the jobs alone")
    where = "runs, and comparison.html (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("results/comparison"), help=where)
    return parser


def code_of(words: Sequence[str]) -> int:
    """Run a script of the suite and return its exit code; an interrupt is passed on to it."""
    # In a session of its own it gets no signal but ours, and has the time to end its processes.
    process = subprocess.Popen([sys.executable, *words], start_new_session=True)
    with stopped_as_interrupted():
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def positive(text: str) -> int:
    """Read a number of processes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


@dataclass(frozen=True)
class Place:
    """A data set: as sweep.py calls it, which task it is, and its folder, "" where it has none."""

    name: str
    task: str
    root: str


def places_of(arguments: argparse.Namespace) -> list[Place]:
    """Return the data sets of a command line.

    Raises:
        PlanError: a name is unknown, one of several scripts, or there twice, or has a folder and
            needs none.
    """
    places = []
    for words in arguments.data_sets:
        name, _, root = words.partition("=")
        script, _ = script_of(name)
        if root and name in EMBEDDED:
            raise PlanError(
                f"--data-sets {words}: {name} takes no folder; name a data set of yours"
            )
        places.append(Place(name, "structured" if script == "train_mvtec" else "semantic", root))
    places += [Place("train_mvtec:folder", "structured", str(x)) for x in arguments.data_root]
    places += [Place("train_cifar10:folder", "semantic", str(x)) for x in arguments.classes]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise PlanError(f"{place.root or place.name} is named twice")
    return places


def methods_for(places: Sequence[Place], asked: Sequence[str] | None) -> list[str]:
    """Return the methods that are asked for, of those that run on some of the data; all of None.

    Raises:
        PlanError: one is unknown there, or not run here.
    """
    known = [
        method
        for method in dict.fromkeys(m for place in places for m in find_methods(place.task))
        if method not in NOT_RUN
    ]
    if unknown := [method for method in asked or () if method not in known]:
        raise PlanError(
            f"--methods {unknown[0]}: not run here on this data; known are {', '.join(known)}"
        )
    return [method for method in known if asked is None or method in asked]


def words_of_sweep(
    places: Sequence[Place],
    methods: Sequence[str],
    arguments: argparse.Namespace,
    further: Sequence[str] = (),
) -> list[str]:
    """Return the words after sweep.py.

    What a budget leaves as it is comes first: it takes the least time.
    """
    shortened, quoted = BUDGETS[arguments.budget], [shlex.quote(word) for word in further]
    sets = [
        # The last of equal options counts.
        " ".join([place.name, method, *options_of(method, place, arguments), *quoted])
        for method in sorted(methods, key=lambda m: any(m in shortened[p.task] for p in places))
        for place in places
        if method in find_methods(place.task)
    ]
    words = ["--set", *sets, "--seeds", *arguments.seeds]
    if arguments.jobs > 1:
        words += ["--jobs", str(arguments.jobs)]
    categories = list(arguments.categories)
    if arguments.budget != "presets" and not categories:
        digits = [place.name for place in places if place.name in WITH_DIGITS]
        categories = [f"{name}={digit}" for name in digits for digit in DIGITS]
    if categories:
        words += ["--categories", *categories]
    words += ["--output", str(arguments.output), "--name", "comparison"]
    switches = ("--skip-invalid", arguments.skip_invalid), ("--dry-run", arguments.dry_run)
    words += [switch for switch, is_on in switches if is_on]
    return [*words, "--", "--overlays", "0"]


def options_of(method: str, place: Place, arguments: argparse.Namespace) -> list[str]:
    """Return the options of one method on one data set, as words of a shell."""
    words = ["--data-root", shlex.quote(place.root)] if place.root else []
    if "backbone" not in find_method(method).ignored:
        words += ["--backbone", arguments.backbone]
    shortened = BUDGETS[arguments.budget][place.task]
    return [*words, shortened[method]] if method in shortened else words


if __name__ == "__main__":
    main()
