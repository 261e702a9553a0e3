"""Every method of the suite on several data sets, on one page.

    python -m benchmarks.comparison --embedded demo digits --short      # make compare-demo
    python -m benchmarks.comparison --data-root PARTS TILES --classes MY_CLASSES --seeds 0 1 2

It runs sweep.py over all methods, data sets and seeds, and figures.compare over what came out:
--output/comparison.html has the table, mean ranks with a critical-difference diagram, accuracy
against time and bars for each set. The same command continues. --data-root takes folders in the
layout of MVTec AD, --classes folders of classes, --embedded what needs no data.

With --short, networks are trained for seconds, some on small images, and three digits are classes:
their numbers then say that they run, not how good they are. Without, presets are untouched, which
takes days on a CPU and hours on a GPU. `saa` and the models of anomalib need what this suite cannot
bring, and are not run.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from models.method import find_method, find_methods

EMBEDDED = {"demo": "structured", "digits": "semantic"}
DIGITS = (0, 3, 8)
"""Normal classes of a short comparison."""
NOT_RUN = ("saa", "anomalib:NAME")
SMALL = "--image-size 96 --crop-size none"
SHORT = {
    "noco": "--method.epochs 20",
    "simplenet": "--method.epochs 10",
    "simplenet_released": "--method.epochs 3",
    "nc_disc": "--method.epochs 10",
    "padim": "--method.dims 100",
    "patchcore": "--method.coreset-ratio 0.01",
    "pni": "--method.epochs 1 --method.dist-size 256 --method.mlp-width 256",
    "stpm": "--method.epochs 2",
    "ulsad": "--method.epochs 1",
    "ulsad_released": "--method.epochs 1",
    "dfr": "--method.epochs 1",
    "uniad": "--method.epochs 2 --method.hidden 64 --method.feed-forward 128",
    "differnet": "--method.epochs 1 --method.width 64 --method.train-views 4 --method.test-views 4",
    "glow": "--method.epochs 5 --method.steps 4 --method.width 64",
    "glow_images": "--method.epochs 2 --method.levels 2 --method.steps 4 --method.width 32",
    "mspba": "--method.epochs 1 --method.samples-per-image 5 --image-size 127 --crop-size none",
    "autoencoder": "--method.epochs 1 --method.images-per-epoch 500 --method.width 16",
    "vae": "--method.epochs 1 --method.images-per-epoch 500 --method.width 16",
    "mnad": f"--method.epochs 1 --method.width 16 {SMALL}",
    "riad": f"--method.epochs 1 --method.width 8 {SMALL}",
    "draem": f"--method.epochs 1 --method.width 8 {SMALL}",
    "edgrec": f"--method.epochs 1 --method.width 8 {SMALL}",
    "memseg": f"--method.epochs 1 --method.steps-per-epoch 5 {SMALL}",
    "cutpaste": "--method.epochs 1 --method.steps-per-epoch 5 --image-size 64 --crop-size none",
    "ddad": "--method.epochs 1 --method.base-width 8 --method.start-step 50 "
    "--method.sampling-step 25 --image-size 32 --crop-size none",
    "deep_svdd": "--method.epochs 10 --method.pretrain-epochs 10",
    "panda": "--method.epochs 1",
    "panda_ewc": "--method.epochs 1",
    "mean_shifted": "--method.epochs 1",
}
"""What makes a method short enough for two cores; all others are."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep and write the page.

    Raises:
        SystemExit: the exit code of the part that failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-root", nargs="+", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--classes", nargs="+", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--embedded", nargs="+", choices=tuple(EMBEDDED), default=[])
    parser.add_argument("--methods", nargs="+", help="all by default")
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--short", action="store_true", help="seconds of training for networks")
    parser.add_argument("--jobs", default="1", help="processes")
    parser.add_argument("--output", type=Path, default=Path("results/comparison"))
    arguments, further = parser.parse_known_args(argv)
    words = words_of_sweep(arguments, further)
    if not words:
        parser.error("name data: --data-root, --classes or --embedded")
    done = subprocess.run([sys.executable, "sweep.py", *words], check=False)
    listed = arguments.output / "sweep-comparison" / "runs.txt"
    runs = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else []
    runs = [run for run in runs if run and (Path(run) / "results.csv").is_file()]
    if not runs:
        raise SystemExit(done.returncode or 1)
    page = ["-m", "figures.compare", *runs, "--out", str(arguments.output / "comparison")]
    drawn = subprocess.run([sys.executable, *page], check=False)
    raise SystemExit(done.returncode or drawn.returncode)


def words_of_sweep(arguments: argparse.Namespace, further: Sequence[str] = ()) -> list[str]:
    """Return the words after sweep.py; none where no data is named."""
    places = [(name, EMBEDDED[name], "") for name in arguments.embedded]
    places += [("train_mvtec:folder", "structured", str(root)) for root in arguments.data_root]
    places += [("train_cifar10:folder", "semantic", str(root)) for root in arguments.classes]
    sets = [
        " ".join([dataset, method, *options_of(method, root, arguments)])
        for dataset, task, root in places
        for method in find_methods(task)
        if method not in NOT_RUN and (arguments.methods is None or method in arguments.methods)
    ]
    if not sets:
        return []
    words = ["--set", *sets, "--seeds", *arguments.seeds]
    if arguments.jobs != "1":
        words += ["--jobs", arguments.jobs]
    if arguments.short and "digits" in arguments.embedded:
        words += ["--categories", *(f"digits={digit}" for digit in DIGITS)]
    words += ["--output", str(arguments.output), "--name", "comparison"]
    return [*words, "--", "--overlays", "0", *further]


def options_of(method: str, root: str, arguments: argparse.Namespace) -> list[str]:
    """Return the options of one method on one data set, as words of a shell."""
    known = find_method(method)
    words = ["--data-root", shlex.quote(root)] if root else []
    if "backbone" not in known.ignored:
        words += ["--backbone", arguments.backbone]
    if arguments.short and method in SHORT:
        words.append(SHORT[method])
    return words


if __name__ == "__main__":
    main()
