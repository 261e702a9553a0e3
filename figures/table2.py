"""NoCo's Table II: methods against data sets, mean image AUROC, with ours beneath.

python -m figures.table2 RUN [RUN ...] --out FILE

Writes FILE.png, FILE.pdf, FILE.md, FILE.tex and FILE.csv. Every (method, options, backbone, way of
selecting) of the runs is a row; runs of the same that differ in categories or seeds alone are put
together. Data sets that the paper does not have come after its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from figures.shared.drawing import parser
from figures.shared.method_tables import (
    OUR_PROTOCOL,
    RANKED,
    data_notes,
    hole_notes,
    method_rows,
    own_rows,
)
from figures.shared.own_results import Series, papers_data, pool, unfinished_notes
from figures.shared.table_files import write_table
from utils.cli import exits_cleanly
from utils.tables.published import published_table
from utils.tables.table import Column, Row, Table


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the table of the runs named on the command line; return the files written."""
    options = parser("figures.table2", __doc__)
    options.add_argument(
        "--rank", choices=RANKED, default="all", help="who competes (default: %(default)s)"
    )
    arguments = options.parse_args(argv)
    notes = unfinished_notes(arguments.runs)
    table = table2(pool(arguments.runs), rank=arguments.rank, notes=notes)
    return write_table(table, arguments.out)


def table2(series: Sequence[Series], *, rank: str = "all", notes: Sequence[str] = ()) -> Table:
    """Build the table.

    Args:
        series: ours.
        rank: a key of RANKED.
        notes: printed last.
    """
    published = published_table("NoCo Table II")
    data = {
        **dict.fromkeys(papers_data(structured=False), "semantic"),
        **dict.fromkeys(papers_data(structured=True), "structured"),
    }
    for one in sorted(series, key=lambda one: one.is_structured):
        kind = "structured" if one.is_structured else "semantic"
        data.setdefault(one.data, f"{kind}, ours only")
    columns = [
        Column("trainable_millions", "trainable, M", "", "trainable", is_ranked=False),
        *(
            Column(name, name, group, is_ours=group.endswith("ours only"))
            for name, group in data.items()
        ),
    ]
    rows = method_rows(published, columns)
    ours = own_rows(series, columns)
    if rank == "published":
        ours = [_unranked(row) for row in ours]
    caption = (
        "NoCo Table II: mean image AUROC in percent and trainable parameters in millions. "
        f"Published: as printed. {OUR_PROTOCOL} {RANKED[rank]} Trainable parameters of ours: the "
        "mean of the structured and the semantic head, where there are both, as the paper's 3.7."
    )
    below = (*hole_notes(rows, ours, columns, list(data)), *data_notes(series), *notes)
    return Table("method", caption, tuple(columns), (*rows, *ours), below, "column", hole="-")


def _unranked(row: Row) -> Row:
    """Keep a row out of the ranking."""
    return replace(row, cells=tuple(replace(cell, is_ranked=False) for cell in row.cells))


if __name__ == "__main__":
    main()
