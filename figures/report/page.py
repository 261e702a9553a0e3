"""One page about a run, or about several on the same images side by side.

python -m figures.report RUN [RUN ...] [--out FILE]

Writes RUN/report.html, a single file below about 15 MB that needs no network and reads nothing but
itself: pictures are inside it, made smaller; what had to be left out is counted. The page is made
from the run folder; only the thumbnails come from the test images, where these are still in place.
It has the table, ROC curves, score histograms with a threshold that can be moved, near-duplicates,
and the worst mistakes as pictures. Images are sorted by how wrong they are: an anomaly by the share
of normal images that score higher, a normal image by the share of anomalies that score lower. What
discover.py found in the run is shown too. A run that is not finished gives a report of what is
there. Several runs must be on one data set, with a finished category in common: the page begins
with their numbers, ROC curves, and the images that they rank most differently.
"""

import argparse
import base64
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from figures.report.charts import SIDE
from figures.report.pictures import MAX_BYTES, Budget
from figures.report.sections import Limits, sections_of
from figures.report.thresholds import MAX_DATA
from figures.report.together import side_by_side
from figures.shared.run_log import LoggedRun, check_named_once, read_runs
from utils.cli import exits_cleanly
from utils.errors import UsageError
from utils.runs.files import corrupt, write_text
from utils.runs.run import Run

TOGETHER_SHARE = 1 / 10
"""Of the bytes of all pictures, at most, for those of several runs together."""
_HERE = Path(__file__).parent


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> Path:
    """Write the report of the runs named on the command line; return its path."""
    parser = argparse.ArgumentParser(
        prog="python -m figures.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN/report.html; needed for several runs"
    )
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
    runs = arguments.runs
    if arguments.images < 0:
        raise UsageError(f"--images {arguments.images}: must be 0 or more")
    check_named_once(runs)
    if len(runs) > 1 and arguments.out is None:
        raise UsageError("several runs: name the file of their page with --out FILE")
    out = arguments.out or runs[0] / "report.html"
    page = build(runs, num_images=arguments.images, thumbnails=arguments.thumbnails)
    try:
        write_text(out, page)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); use --out") from error
    sys.stdout.write(f"{out}\n")
    return out


def build(folders: Sequence[Path], *, num_images: int = 20, thumbnails: bool = True) -> str:
    """Return the page of one run folder or of several.

    Args:
        folders: of the runs, finished or not.
        num_images: listed images of each category.
        thumbnails: whether they get a small picture.

    Raises:
        RunError: a folder is no run, a file of it is corrupt, or runs are on other images.
    """
    runs = _read(folders)
    num_bytes, together = MAX_BYTES, None
    if len(runs) > 1:
        budget = Budget(int(MAX_BYTES * TOGETHER_SHARE))
        together = side_by_side(runs, budget, num_images=num_images, thumbnails=thumbnails)
        num_bytes -= budget.spent
    limits = Limits(num_images, thumbnails, num_bytes // len(runs), MAX_DATA // len(runs))
    sections = [
        sections_of(run, limits, prefix=f"run{number}-" if together else "")
        for number, run in enumerate(runs, start=1)
    ]
    categories = list(dict.fromkeys(one.name for run in sections for one in run.categories))
    kinds = sorted({kind for run in sections for one in run.categories for kind in one.kinds})
    return _render(runs=sections, together=together, categories=categories, kinds=kinds)


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
    templates.globals["side"] = SIDE
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    text = templates.get_template("page.html.jinja").render(
        css=css,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        **values,
    )
    # Names of files need not be valid UTF-8; what is not has no place in a page.
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(folders: Sequence[Path]) -> list[LoggedRun]:
    """Read runs; one alone may have logged nothing yet."""
    for folder in folders:
        config = Run.read(folder).config
        if absent := {"dataset", "method_name", "method"} - set(config):
            raise corrupt(folder / "config.json", f"no {', '.join(sorted(absent))} in it")
    if len(folders) == 1 and not (folders[0] / "metrics.jsonl").is_file():
        run = Run.read(folders[0])
        return [LoggedRun(run, [], str(run.config["method_name"]))]
    runs = read_runs(folders)
    for logged in runs:
        for number, record in enumerate(logged.records, start=1):
            if not _is_record(record):
                path = logged.run.folder / "metrics.jsonl"
                raise corrupt(path, f"record {number} is not one of a run")
    return runs


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
