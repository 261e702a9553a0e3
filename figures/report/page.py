"""One page about a run: table, ROC curves, score histograms, and its worst mistakes as pictures.

python -m figures.report RUN [--out FILE]

Writes RUN/report.html, a single file below about 15 MB that needs no network and reads nothing but
itself: pictures are inside it, made smaller; what had to be left out is counted. The page is made
from the run folder; only the thumbnails come from the test images, where these are still in place.
Images are sorted by how wrong they are: an anomaly by the share of normal images that score higher,
a normal image by the share of anomalies that score lower. What discover.py found in the run is
shown too. A run that is not finished gives a report of what is there.
"""

import argparse
import base64
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from figures.report.charts import (
    SIDE,
    Chart,
    histogram_chart,
    roc_chart,
    selection_chart,
    step_chart,
)
from figures.report.kinds import CategoryKinds, Finding, kinds_of, read_findings, sheet_width
from figures.report.pictures import MAX_BYTES, Budget, Overlays, Picture, overlays_of, thumbnail
from figures.report.scores import LAST, Ranked, Scored, image_auroc, ranked, read_scores
from figures.report.tables import false_alarms, other_facts, results_table, unfinished_pairs
from figures.shared.run_log import LoggedRun, Pair, images_of, read_runs
from utils.cli import exits_cleanly
from utils.errors import UsageError
from utils.runs.files import corrupt, flat, read_object, write_text
from utils.runs.run import Run
from utils.tables.results import SELECT_LABELS

KINDS_SHARE = 1 / 3
"""Of the bytes of all pictures, at most, for those of kinds of defects."""
FEW_KINDS = 12  # whose sheets are open
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Hard:
    """A line of the list of the most wrong images."""

    image: Ranked
    picture: Picture | None
    remark: str


@dataclass(frozen=True)
class Category:
    """What the page shows of one category."""

    name: str
    charts: list[Chart]
    more_charts: list[Chart]
    missing: str
    overlays: Overlays
    hardest: list[Hard]
    kinds: list[str]
    disagreements: list[str]


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> Path:
    """Write the report of the run named on the command line; return its path."""
    parser = argparse.ArgumentParser(
        prog="python -m figures.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    parser.add_argument(
        "--images",
        type=int,
        default=20,
        metavar="N",
        help="listed images of each category, the most wrong first (default: %(default)s)",
    )
    parser.add_argument(
        "--thumbnails",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put a small picture of each listed image into the page",
    )
    arguments = parser.parse_args(argv)
    if arguments.images < 0:
        raise UsageError(f"--images {arguments.images}: must be 0 or more")
    out = arguments.out or arguments.run / "report.html"
    page = build(arguments.run, num_images=arguments.images, thumbnails=arguments.thumbnails)
    try:
        write_text(out, page)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); use --out") from error
    sys.stdout.write(f"{out}\n")
    return out


def build(folder: Path, *, num_images: int = 20, thumbnails: bool = True) -> str:
    """Return the page of a run folder.

    Args:
        folder: of the run, finished or not.
        num_images: listed images of each category.
        thumbnails: whether they get a small picture.

    Raises:
        RunError: the folder is no run, or a file of it is corrupt.
    """
    run = _read(folder)
    rows = run.run.rows()
    pairs = list(dict.fromkeys([*((row["category"], row["seed"]) for row in rows), *_logged(run)]))
    names = list(dict.fromkeys(category for category, _ in pairs))
    found, kinds_budget = _found(folder)
    share = (MAX_BYTES - kinds_budget.spent) // max(1, len(names))
    budgets = {name: Budget(share) for name in names}
    categories = [
        _category(
            run, name, [s for c, s in pairs if c == name], budgets[name], num_images, thumbnails
        )
        for name in names
    ]
    environment = folder / "environment.json"
    record = read_object(environment) if environment.exists() else {}
    return _render(
        title=f"{run.run.config['method_name']} on {images_of(run.run.config)}",
        folder=folder.name,
        facts=_facts(run.run.config, rows, record),
        config=flat(run.run.config),
        environment=flat(record),
        random_weights=run.run.config.get("weights") == "random",
        unfinished=unfinished_pairs(run.run.config, rows, pairs),
        table=results_table(folder, rows),
        categories=categories,
        strips=sorted(
            (strip for category in categories for strip in category.overlays.strips),
            key=lambda strip: strip.image.urgency,
        ),
        hardest=sorted(
            (hard for category in categories for hard in category.hardest),
            key=lambda hard: hard.image.urgency,
        ),
        kinds=sorted({kind for category in categories for kind in category.kinds}),
        several_seeds=len({seed for _, seed in pairs}) > 1,
        num_refused=sum(budget.num_refused for budget in budgets.values()),
        found=found,
        few_kinds=sum(len(one.kinds) for _, shown in found for one in shown) <= FEW_KINDS,
        num_kinds_refused=kinds_budget.num_refused,
        disagreements=[pair for category in categories for pair in category.disagreements],
        false_alarms=false_alarms(rows),
        other=other_facts(rows),
        side=SIDE,
    )


def _found(folder: Path) -> tuple[list[tuple[Finding, list[CategoryKinds]]], Budget]:
    """Return each finding of a run with what is shown of it, and what their pictures took."""
    findings = read_findings(folder / "discovery")
    num_bytes = int(MAX_BYTES * KINDS_SHARE)
    budget, width = Budget(num_bytes), sheet_width(findings, num_bytes)
    return [(finding, kinds_of(finding, width, budget)) for finding in findings], budget


def _render(**values: Any) -> str:
    """Return the page of what the template shows; all of it is data and gets escaped."""
    css, script = (_HERE.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    templates = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["zip"] = zip
    text = templates.get_template("page.html.jinja").render(
        css=css,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        **values,
    )
    # Names of files need not be valid UTF-8; what is not has no place in a page.
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(folder: Path) -> LoggedRun:
    """Read a run that may have logged nothing yet."""
    run = Run.read(folder)
    if absent := {"dataset", "method_name", "method"} - set(run.config):
        raise corrupt(folder / "config.json", f"no {', '.join(sorted(absent))} in it")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return LoggedRun(run, [], str(run.config["method_name"]))
    (logged,) = read_runs([folder])
    for number, record in enumerate(logged.records, start=1):
        if not _is_record(record):
            raise corrupt(path, f"record {number} is not one of a run")
    return logged


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("category"), str)
        and isinstance(record.get("seed"), int)
        and (
            record.get("event") not in ("selection", "chosen")
            or isinstance(record.get("options"), dict)
        )
    )


def _logged(run: LoggedRun) -> list[Pair]:
    return [(record["category"], record["seed"]) for record in run.records]


def _category(
    run: LoggedRun,
    name: str,
    seeds: Sequence[int],
    budget: Budget,
    num_images: int,
    thumbnails: bool,
) -> Category:
    """Gather what the page shows of a category."""
    scored = [one for seed in seeds if (one := read_scores(run.run, name, seed))]
    last = [one for seed in seeds if (one := read_scores(run.run, name, seed, LAST))]
    images = ranked(scored) if scored else []
    first = scored[0].seed if scored else seeds[0]
    drawn = run.run.config.get("overlays")
    drawn = drawn if isinstance(drawn, int) else 0
    overlays = overlays_of(run.run.overlays_folder(name, first), images, drawn, budget)
    hardest = []
    for image in images[:num_images]:
        picture, remark = thumbnail(Path(image.path), budget) if thumbnails else (None, "")
        hardest.append(Hard(image, picture, remark))
    charts, more, missing = _charts(run, name, scored, last)
    kinds = sorted({image.kind for image in images})
    wrong = _disagreements(run.run.rows(), scored)
    return Category(name, charts, more, missing, overlays, hardest, kinds, wrong)


def _charts(
    run: LoggedRun, name: str, scored: Sequence[Scored], last: Sequence[Scored]
) -> tuple[list[Chart], list[Chart], str]:
    """Return the charts of a category, those shown on demand, and why one is missing."""

    def of(event: str) -> dict[int, list[dict[str, Any]]]:
        return {
            seed: rs for (category, seed), rs in run.of_event(event).items() if category == name
        }

    charts: list[Chart] = []
    missing = "" if scored else "No scores were written yet."
    if scored and (chart := roc_chart(scored, last)):
        charts.append(chart)
    elif scored:
        missing = "No ROC curve: the test set has one class only."
    histograms = [histogram_chart(one) for one in scored]
    charts += histograms[:1]
    chosen = {seed: records[-1] for seed, records in of("chosen").items()}
    steps = of("step")
    curve = selection_chart(of("selection"), chosen)
    if curve is None:
        curve = step_chart(steps, "image_auroc", "image AUROC on the test set", percent=True)
        if curve is not None and run.run.config.get("select") != "best_test":
            curve.note = "Logged beside the training; it chose nothing."
    loss = step_chart(steps, "loss", "training loss", percent=False)
    charts += [chart for chart in (curve, loss) if chart is not None]
    return charts, histograms[1:], missing


def _facts(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return what stands at the head of the page."""
    select = str(config.get("select", "unknown"))
    seeds = sorted({row["seed"] for row in rows})
    commit = str(record.get("commit") or "unknown")[:12]
    if record.get("dirty"):
        commit += ", with uncommitted changes"
    versions = record.get("versions")
    named = versions.items() if isinstance(versions, dict) else ()
    facts = {
        "method": config["method_name"],
        "data set": ", ".join(
            str(part) for part in (images_of(config), config.get("protocol")) if part
        ),
        "backbone": config.get("backbone", "unknown"),
        "reported": SELECT_LABELS.get(select, select),
        "seeds": ", ".join(map(str, seeds)) or "none finished",
        "commit": commit,
        "device": " ".join(str(record[k]) for k in ("device", "device_name") if record.get(k)),
        "versions": ", ".join(f"{name} {version}" for name, version in named),
        "started": record.get("started", "unknown"),
        "command": record.get("command", "unknown (environment.json is missing)"),
    }
    if isinstance(continued := record.get("continued"), list):
        facts["continued"] = f"{len(continued)} x, see the environment below"
    return [(name, str(value)) for name, value in facts.items() if value]


def _disagreements(rows: Sequence[Mapping[str, Any]], scored: Sequence[Scored]) -> list[str]:
    """Name the pairs whose scores do not give the image AUROC of results.csv."""
    found = []
    for one in scored:
        own = [row for row in rows if (row["category"], row["seed"]) == (one.category, one.seed)]
        # Where a run reports two states, these are the scores of the other one than the last.
        own = [row for row in own if row["select"] != "last"] or own
        written = own[0].get("image_auroc") if own else None
        measured = image_auroc(one)
        if isinstance(written, (int, float)) and abs(measured - written) > 1e-6:  # false for nan
            found.append(f"{one.category}, seed {one.seed}")
    return found
