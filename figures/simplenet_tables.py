"""SimpleNet's Tables 1 to 5, published beside ours.

python -m figures.simplenet_tables RUN [RUN ...] --out FILE

Writes FILE-1 (image and pixel AUROC of each category), FILE-2 (stages), FILE-3 (adaptor and loss),
FILE-4 (backbones) and FILE-5 (CIFAR-10), each as .png, .pdf, .md, .tex and .csv. Which line of
Tables 2 to 4 a run belongs to is read from its configuration. Runs on other data than the paper's
have columns that name it, and in Table 1 a table of the same form, FILE-1-<data set>.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures.shared.category_tables import category_tables
from figures.shared.drawing import parser
from figures.shared.method_tables import (
    OUR_PROTOCOL,
    RANKED,
    data_notes,
    hole_notes,
    method_rows,
    own_rows,
)
from figures.shared.own_results import describe, is_structured, pool, summarise, unfinished_notes
from figures.shared.table_files import stem_of, write_by_data
from utils.cli import exits_cleanly
from utils.tables.published import published_table
from utils.tables.table import Cell, Column, Row, Table

FAMILY = ("simplenet", "simplenet_released", "nc_disc")
"""Methods with an adaptor and a discriminator."""
METRICS = {"image_auroc": "image", "pixel_auroc": "pixel"}
_ADAPTORS = {"linear": "linear adaptor", "mlp": "complex adaptor", "none": "no adaptor"}


def stages(config: dict[str, Any]) -> str | None:
    """Return the line of Table 2, as "2+3"; None where something else is not the paper's."""
    if not _is_plain(config["method"]):
        return None
    return "stages " + "+".join(map(str, config["layers"]))


def adaptor_or_loss(config: dict[str, Any]) -> str | None:
    """Return the line of Table 3; None where the stages are not the paper's."""
    if config["layers"] != [2, 3]:
        return None
    adaptor, loss = _ADAPTORS[config["method"]["adaptor"]], config["method"]["loss"]
    if loss == "truncated_l1":
        return adaptor
    return "cross-entropy" if adaptor == "linear adaptor" else f"{adaptor}, cross-entropy"


def backbone(config: dict[str, Any]) -> str | None:
    """Return the line of Table 4; None where something else is not the paper's."""
    if config["layers"] != [2, 3] or not _is_plain(config["method"]):
        return None
    return str(config["backbone"]).partition(".")[0]


@dataclass(frozen=True)
class Ablation:
    """A table whose lines are variants of SimpleNet.

    Attributes:
        title: of the caption.
        corner: heading of the first column.
        factor: the line of a run, from its configuration.
        options: what the factor speaks for, dotted.
    """

    title: str
    corner: str
    factor: Callable[[dict[str, Any]], str | None]
    options: tuple[str, ...]


ABLATIONS = {
    2: Ablation("features of which stages", "stages", stages, ("layers",)),
    3: Ablation(
        "adaptor, and loss of the discriminator",
        "variant",
        adaptor_or_loss,
        ("method.adaptor", "method.loss"),
    ),
    4: Ablation("backbones", "backbone", backbone, ("backbone",)),
}


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the tables of the runs named on the command line; return the files written."""
    options = parser("figures.simplenet_tables", __doc__)
    options.add_argument(
        "--tables", nargs="+", type=int, choices=range(1, 6), default=range(1, 6), metavar="N",
        help="which of the five (default: all)",
    )  # fmt: skip
    arguments = options.parse_args(argv)
    folders, paths = arguments.runs, []
    for number in arguments.tables:
        tables = build(number, folders)
        stem = stem_of(arguments.out)
        paths += write_by_data(tables, stem.with_name(f"{stem.name}-{number}.png"))
    return paths


def build(number: int, folders: Sequence[Path]) -> dict[str, Table]:
    """Return a table by its number; Table 1 comes with one for each other data set."""
    notes = unfinished_notes(folders)
    if number == 1:
        structured = [one for one in pool(folders) if one.is_structured]
        return category_tables("SimpleNet Table 1", structured, list(METRICS), notes)
    if number == 5:
        return {"cifar10": cifar10_table(folders, notes)}
    return {"mvtec": ablation_table(number, folders, notes)}


def ablation_table(number: int, folders: Sequence[Path], notes: Sequence[str]) -> Table:
    """Build Table 2, 3 or 4.

    Ours are columns: one pair for each (data set, method, further options, way of selecting).
    """
    table = ABLATIONS[number]
    published = published_table(f"SimpleNet Table {number}")

    def factor(config: dict[str, Any]) -> str | None:
        if config["method_name"] not in FAMILY or not is_structured(config):
            return None
        return table.factor(config)

    series = pool(folders, factor=factor, factor_options=table.options)
    ours: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in series:
        ours.setdefault((one.data, *one.setting), {})[one.factor] = one
    columns = [
        Column(f"published_{metric}", name, "published, mvtec", metric)
        for metric, name in METRICS.items()
    ]
    for i, (data, *_) in enumerate(ours, start=1):
        columns += [
            Column(f"[{i}] {data} {metric}", name, f"[{i}] {data}", metric, is_ours=True)
            for metric, name in METRICS.items()
        ]
    methods = dict.fromkeys(method for method, *_ in published)
    printed = [method.removeprefix("SimpleNet ") for method in methods]
    further = [one.factor for one in series if one.factor not in printed]
    rows = []
    for line in dict.fromkeys([*printed, *further]):
        cells = [Cell(published.get((f"SimpleNet {line}", "mvtec", "mean", m))) for m in METRICS]
        for lines in ours.values():
            cells += [summarise(lines[line], m) if line in lines else Cell(None) for m in METRICS]
        block = "printed" if line in printed else "further"
        rows.append(Row(line, line.removeprefix("stages "), tuple(cells), block))
    caption = (
        f"SimpleNet Table {number}: {table.title}; mean image and pixel AUROC in percent. "
        f"Published: WideResNet50 unless named, on MVTec AD. {OUR_PROTOCOL} Best of each column in "
        "bold, second underlined, by the printed values; ties share."
    )
    legend = [
        f"[{i}] {data}: {describe(lines.values())}"
        for i, ((data, *_), lines) in enumerate(ours.items(), start=1)
    ]
    if not ours:
        legend.append("No run of ours belongs here.")
    lacking: dict[str, list[str]] = {}
    for i, lines in enumerate(ours.values(), start=1):
        if holes := ", ".join(row.label for row in rows if row.key not in lines):
            lacking.setdefault(holes, []).append(f"[{i}]")
    missing = [f"-: missing in {', '.join(names)}: {holes}." for holes, names in lacking.items()]
    return Table(
        table.corner,
        caption,
        tuple(columns),
        tuple(rows),
        (*legend, *missing, *data_notes(series), *notes),
        "column",
        hole="-",
    )


def cifar10_table(folders: Sequence[Path], notes: Sequence[str]) -> Table:
    """Build Table 5: CIFAR-10, one class against the rest; other class data beside it."""
    published = published_table("SimpleNet Table 5")
    series = [one for one in pool(folders) if not one.is_structured]
    data = list(dict.fromkeys(["cifar10", *(one.data for one in series)]))
    columns = [
        Column(name, name, "" if name == "cifar10" else "ours only", is_ours=name != "cifar10")
        for name in data
    ]
    rows, ours = method_rows(published, columns), own_rows(series, columns)
    caption = (
        "SimpleNet Table 5: mean image AUROC in percent over ten one-class tasks of CIFAR-10. "
        f"Published: as printed (IGD is printed as 83.68). {OUR_PROTOCOL} {RANKED['all']}"
    )
    holes = hole_notes(rows, ours, columns, data)
    return Table(
        "method",
        caption,
        tuple(columns),
        (*rows, *ours),
        (*holes, *data_notes(series), *notes),
        "column",
        hole="-",
    )


def _is_plain(method: dict[str, Any]) -> bool:
    return bool(method["adaptor"] == "linear" and method["loss"] == "truncated_l1")


if __name__ == "__main__":
    main()
