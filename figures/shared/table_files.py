"""A table of a paper's form, with our results in it, as PNG, PDF, Markdown, LaTeX and csv.

Published numbers are printed as in the paper. Ours are mean ± sample standard deviation over seeds;
a mean over fewer categories than the data set has says so and is not ranked. A hole is a dash.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from figures.shared.drawing import save_figure
from figures.shared.table_picture import draw
from utils.tables.formats import to_markdown, write
from utils.tables.table import Table

SUFFIXES = (".md", ".tex", ".csv")


def write_table(table: Table, out: Path) -> list[Path]:
    """Write FILE.png, FILE.pdf, FILE.md, FILE.tex and FILE.csv, print the table; return the paths.

    Args:
        table: to write.
        out: FILE, with one of these suffixes or none.
    """
    stem = stem_of(out)
    paths = save_figure(draw(table), stem.with_name(stem.name + ".png"))
    paths += write(table, stem, SUFFIXES)
    sys.stdout.write(to_markdown(table) + "".join(f"{path}\n" for path in paths))
    return paths


def write_by_data(tables: Mapping[str, Table], out: Path) -> list[Path]:
    """Write and print tables: the first as `out`, others with their data set after the name."""
    paths, stem = [], stem_of(out)
    for number, (data, table) in enumerate(tables.items()):
        suffix = "-" + re.sub(r"[^\w.-]+", "_", data).strip("_") if number else ""
        paths += write_table(table, stem.with_name(f"{stem.name}{suffix}.png"))
        sys.stdout.write("\n")
    return paths


def stem_of(out: Path) -> Path:
    """Return FILE without the suffix of something a table is written as."""
    return out.with_suffix("") if out.suffix in {".png", ".pdf", *SUFFIXES} else out
