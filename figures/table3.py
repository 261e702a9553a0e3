"""NoCo's Table III: image AUROC of each category of MVTec AD, with ours beside.

python -m figures.table3 RUN [RUN ...] --out FILE

Writes FILE.png, FILE.pdf, FILE.md, FILE.tex and FILE.csv. Runs on other data (the demo textures, a
folder of one's own) give a table of the same form for each, FILE-<data set>.png and so on.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from figures.shared.category_tables import category_tables
from figures.shared.drawing import parser
from figures.shared.own_results import pool, unfinished_notes
from figures.shared.paper_table import PaperTable, stem_of
from utils.cli import exits_cleanly
from utils.errors import RunError


@exits_cleanly(RunError)
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the tables of the runs named on the command line; return the files written."""
    arguments = parser("figures.table3", __doc__).parse_args(argv)
    notes = unfinished_notes(arguments.runs)
    tables = category_tables("NoCo Table III", pool(arguments.runs), ["image_auroc"], notes)
    return write_by_data(tables, arguments.out)


def write_by_data(tables: Mapping[str, PaperTable], out: Path) -> list[Path]:
    """Write and print tables: the first as `out`, others with their data set after the name."""
    paths, stem = [], stem_of(out)
    for number, (data, table) in enumerate(tables.items()):
        suffix = "-" + re.sub(r"[^\w.-]+", "_", data).strip("_") if number else ""
        written = table.write(stem.with_name(f"{stem.name}{suffix}.png"))
        sys.stdout.write(table.to_markdown() + "".join(f"{path}\n" for path in written) + "\n")
        paths += written
    return paths


if __name__ == "__main__":
    main()
