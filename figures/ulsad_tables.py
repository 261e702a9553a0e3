"""ULSAD's five data sets: published beside ours, and the two kinds of anomalies of MVTec LOCO.

python -m figures.ulsad_tables RUN [RUN ...] --out FILE

Writes FILE-1 (image AUROC, pixel AUROC and AUPRO on BTAD, MVTec AD, MVTec LOCO, MPDD and VisA) and
FILE-2 (MVTec LOCO: image AUROC of logical and of structural anomalies, their mean, of both pooled,
and sPRO), each as .png, .pdf, .md, .tex and .csv. Every (method, options, backbone, way of
selecting) of the runs is a row. Runs on other data have columns after the paper's.
"""

from collections.abc import Sequence
from pathlib import Path

from figures.shared.drawing import parser
from figures.shared.method_tables import OUR_PROTOCOL, data_notes, method_rows, own_rows
from figures.shared.own_results import Series, pool, unfinished_notes
from figures.shared.table_files import stem_of, write_table
from utils.cli import exits_cleanly
from utils.metrics.metrics import heading_of
from utils.tables.published import published_table
from utils.tables.table import Column, Row, Table

DATA = ("btad", "mvtec", "mvtec_loco", "mpdd", "visa")
SOURCE = "ULSAD listing"
METRICS = ("image_auroc", "pixel_auroc", "aupro")
OF_KINDS = (
    *("image_auroc_logical", "image_auroc_structural", "image_auroc_mean"),
    *("image_auroc", "spro"),
)
PUBLISHED = (
    "Published: the two numbers of the paper that are known here, by way of a listing of it. The "
    "released code reports the best of 200 evaluations on the test set, and leaves up to 31 test "
    "images of each category out."
)


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write both tables of the runs named on the command line; return the files written."""
    arguments = parser("figures.ulsad_tables", __doc__).parse_args(argv)
    notes = unfinished_notes(arguments.runs)
    series = [one for one in pool(arguments.runs) if one.is_structured]
    stem, paths = stem_of(arguments.out), []
    for number, table in enumerate((five_sets(series, notes), both_kinds(series, notes)), start=1):
        paths += write_table(table, stem.with_name(f"{stem.name}-{number}.png"))
    return paths


def five_sets(series: Sequence[Series], notes: Sequence[str] = ()) -> Table:
    """Build the table of all data sets."""
    others = [one.data for one in series if one.data not in DATA]
    columns = _columns([*DATA, *dict.fromkeys(others)], METRICS)
    caption = f"ULSAD: means over categories in percent. {PUBLISHED} {OUR_PROTOCOL}"
    return _table(caption, columns, series, notes)


def both_kinds(series: Sequence[Series], notes: Sequence[str] = ()) -> Table:
    """Build the table of logical and structural anomalies, of data sets that tell them apart."""
    telling = [one.data for one in series if any(OF_KINDS[0] in row for row in one.rows.values())]
    data = list(dict.fromkeys(["mvtec_loco", *telling]))
    caption = (
        f"MVTec LOCO: means over categories in percent. No published number is known here. "
        f"{OUR_PROTOCOL}"
    )
    return _table(caption, _columns(data, OF_KINDS), series, notes)


def _columns(data: Sequence[str], metrics: Sequence[str]) -> list[Column]:
    return [
        Column(f"{name} {metric}", heading_of(metric), name, metric, is_ours=name not in DATA)
        for name in data
        for metric in metrics
    ]


def _table(
    caption: str, columns: Sequence[Column], series: Sequence[Series], notes: Sequence[str]
) -> Table:
    published = method_rows(published_table(SOURCE), columns, _data_of)
    told = [row for row in published if any(cell.mean is not None for cell in row.cells)]
    rows = [*told, *own_rows(series, columns, _data_of)]
    below = ["-: missing.", *_incomplete(rows, columns), *data_notes(series, DATA), *notes]
    return Table("method", caption, tuple(columns), tuple(rows), tuple(below), "column", hole="-")


def _data_of(column: Column) -> str:
    return column.group


def _incomplete(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Name means over some of a data set's categories."""
    found = {
        row.label: dict.fromkeys(
            f"{column.group} ({cell.found} of {cell.total} categories)"
            for column, cell in zip(columns, row.cells, strict=True)
            if cell.found is not None
        )
        for row in rows
    }
    return [f"{label}: {', '.join(names)}." for label, names in found.items() if names]


if __name__ == "__main__":
    main()
