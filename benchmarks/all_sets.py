"""Every method on several data sets, one table: who wins by default?

    python -m benchmarks.all_sets --sizes 224 320 --seeds 0 1 2 \
        --set "train_mvtec.py folder --data-root MY_IMAGES --categories tile" \
        --set "train_mvtec.py demo" --set "train_cifar10.py folder --data-root MY_CLASSES"

Each line of the table is a data set at an image size, each column a method under its preset, on the
same backbone. Methods without a random part run with one seed. `best possible` is the largest image
AUROC of `noco_cf` over the options of `CANDIDATES`, chosen on the test set: what its preset leaves
behind. Runs go to --output by the plain training commands, so that the same command continues, and
their features to the disk cache; times are from features in that cache, and with --jobs those of a
busy machine. Tables are printed and, as far as they are filled, written to OUTPUT/all_sets.md:
image AUROC, pixel AUROC, AUPRO, seconds of a fit, images/s (backbone and head), MB of the head.
"""

import argparse
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.runs.rows import read_rows

METHODS = {
    "PatchCore 1 %": "patchcore --method.coreset-ratio 0.01",
    "PatchCore 10 %": "patchcore --method.coreset-ratio 0.1",
    "PaDiM": "padim --method.dims 100",
    "kNN": "knn",
    "Mahalanobis": "mahalanobis",
    "nc_disc": "nc_disc",
    "before": "noco_exact --method.prototypes 32 --select synthetic",
    "noco_cf": "noco_cf",
}
"""Columns, and the words of each method. "before" is the preset that `noco_cf` had until it became
local; on classes it had one centre."""
WITHOUT_SEED = ("mahalanobis",)
STRUCTURED_ONLY = ("padim",)
CANDIDATES = (
    "--method.prototypes 1",
    "--method.prototypes 32",
    "--method.prototypes 512",
    "--method.ridge 0.03",
    "--method.ridge 0.3",
    "--method.filter flow",
    "--method.no-normaliser",
    "--method.context-weight 0",
    "--method.context-weight 0.5",
    "--method.top-share 0.0001",
)
"""Options of `noco_cf` beside its preset, one at a time."""
BEST = "best possible"
METRICS = ("image_auroc", "pixel_auroc", "aupro", "fit_seconds", "images/s", "head MB")
HEADINGS = ("image AUROC", "pixel AUROC", "AUPRO", "fit, s", "images/s", "head, MB")


@dataclass(frozen=True)
class Job:
    """A command, and the line and column of the table that it fills."""

    title: str
    column: str
    words: list[str]


Values = dict[str, tuple[float, float]]
"""Metric -> mean over categories and seeds, and standard deviation over seeds."""
Line = tuple[str, dict[str, Values]]
"""A data set at a size, and what each column has on it."""


def rows_of(words: Sequence[str]) -> list[dict[str, Any]]:
    """Run a training command, where it is not finished, and return its results."""
    done = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stderr[-2000:]}")
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("run folder: ")]
    return read_rows(Path(line.removeprefix("run folder: ")) / "results.csv")


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", required=True, dest="sets", help="a command")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="of structured images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--no-best", action="store_true", help="leave the candidates out")
    parser.add_argument("--jobs", type=int, default=1, help="commands side by side")
    parser.add_argument("--output", type=Path, default=Path("results/all_sets"))
    arguments = parser.parse_args(argv)
    jobs = [
        job
        for words in arguments.sets
        for size in (arguments.sizes if words.startswith("train_mvtec.py") else [None])
        for job in jobs_of(shlex.split(words), size, arguments)
    ]
    columns = [*arguments.methods, *([] if arguments.no_best else [BEST])]
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Values]] = {job.title: {} for job in jobs}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {pool.submit(rows_of, job.words): job for job in jobs}
        try:
            for done in as_completed(running):
                job = running[done]
                found[job.title][job.column] = values = measured(done.result())
                print(f"{job.title}, {job.column}: {values['image_auroc'][0]:.1f}", flush=True)
                text = tables([(title, with_best(has)) for title, has in found.items()], columns)
                (arguments.output / "all_sets.md").write_text(text, encoding="utf-8")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(text)


def jobs_of(words: Sequence[str], size: int | None, arguments: argparse.Namespace) -> list[Job]:
    """Return the commands of one data set at one image size, of all methods."""
    script, dataset, *options = words
    structured = script == "train_mvtec.py"
    title = " ".join([*(options[-1:] or [dataset]), *([f"{size} px"] if size else [])])
    common = [*options, "--backbone", arguments.backbone, "--cache", "disk", "--overlays", "0"]
    common += ["--output", str(arguments.output)]
    common += ["--image-size", str(size)] if size else []
    jobs = []
    for name in arguments.methods:
        method, *own = METHODS[name].split()
        if method in STRUCTURED_ONLY and not structured:
            continue
        if name == "before" and not structured:
            own = []
        seeds = map(str, arguments.seeds[:1] if method in WITHOUT_SEED else arguments.seeds)
        jobs.append(Job(title, name, [script, dataset, method, *own, *common, "--seeds", *seeds]))
    if not arguments.no_best:
        jobs += [
            Job(title, own, [script, dataset, "noco_cf", *own.split(), *common])
            for own in CANDIDATES
        ]
    return jobs


def with_best(found: dict[str, Values]) -> dict[str, Values]:
    """Add what the best of the preset and the candidates has in image AUROC."""
    tried = [found[name] for name in ("noco_cf", *CANDIDATES) if name in found]
    if not tried:
        return found
    return {**found, BEST: max(tried, key=lambda values: values["image_auroc"][0])}


def measured(rows: Sequence[dict[str, Any]]) -> Values:
    """Return mean over categories, and its standard deviation over seeds, of each metric."""
    values = [
        {
            **{name: 100 * _number(row[name]) for name in METRICS[:3]},
            "fit_seconds": _number(row["fit_seconds"]),
            "images/s": _number(row["num_test"])
            / (_number(row["pass_test_seconds"]) + _number(row["score_seconds"])),
            "head MB": _number(row["head_bytes"]) / 1e6,
            "seed": _number(row["seed"]),
        }
        for row in rows
        if row["select"] != "best_test"
    ]
    found = {}
    for name in METRICS:
        seeds = sorted({value["seed"] for value in values})
        means = [statistics.fmean(v[name] for v in values if v["seed"] == s) for s in seeds]
        has_spread = len(means) > 1 and not any(map(math.isnan, means))
        spread = statistics.stdev(means) if has_spread else math.nan
        found[name] = (statistics.fmean(means), spread)
    return found


def tables(lines: Sequence[Line], columns: Sequence[str]) -> str:
    """Return a Markdown table of each metric, with the means of columns that lack no data set."""
    parts = []
    for metric, heading in zip(METRICS, HEADINGS, strict=True):
        parts.append(f"\n{heading}\n\n| data | {' | '.join(columns)} |")
        parts.append("| --- |" + " ---: |" * len(columns))
        means: dict[str, list[float]] = {column: [] for column in columns}
        for title, found in lines:
            cells = []
            for column in columns:
                mean, spread = found.get(column, {}).get(metric, (math.nan, math.nan))
                cells.append("" if math.isnan(mean) else _text(mean, spread))
                means[column].append(mean)
            parts.append(f"| {title} | {' | '.join(cells)} |")
        # A set without masks has no pixel metric of any method.
        kept = [i for i in range(len(lines)) if any(not math.isnan(means[c][i]) for c in columns)]
        overall = [statistics.fmean(means[c][i] for i in kept) for c in columns if kept]
        cells = ["" if math.isnan(value) else _text(value, math.nan) for value in overall]
        parts.append(f"| mean | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _text(mean: float, spread: float) -> str:
    return f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


if __name__ == "__main__":
    main()
