"""NoCo's Table III: image AUROC of each category of MVTec AD, with ours beside.

python -m figures.table3 RUN [RUN ...] --out FILE

Writes FILE.png, FILE.pdf, FILE.md, FILE.tex and FILE.csv. Runs on other data (the demo textures, a
folder of one's own) give a table of the same form for each, FILE-<data set>.png and so on.
"""

from collections.abc import Sequence
from pathlib import Path

from figures.shared.category_tables import category_tables
from figures.shared.drawing import parser
from figures.shared.own_results import pool, unfinished_notes
from figures.shared.table_files import write_by_data
from utils.cli import exits_cleanly


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the tables of the runs named on the command line; return the files written."""
    arguments = parser("figures.table3", __doc__).parse_args(argv)
    notes = unfinished_notes(arguments.runs)
    tables = category_tables("NoCo Table III", pool(arguments.runs), ["image_auroc"], notes)
    return write_by_data(tables, arguments.out)


if __name__ == "__main__":
    main()
