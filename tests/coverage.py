"""The README's table of what is here of the methods that papers name.

python -m tests.coverage    writes it into README.md

tests/coverage.csv has a row for each method of a source: what it is here, or why it is not. Whether
that is ours or a library's is read from the methods themselves.
"""

import csv
import re
from pathlib import Path

from models.method import find_method

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SOURCES = {
    "NoCo": "NoCo and its Tables II, III",
    "SimpleNet": "SimpleNet and its tables",
    "ULSAD": "ULSAD",
    "AnomalyNCD": "AnomalyNCD and its tables",
    "survey": "the survey",
    "ours": "ours, in none of them",
}
BLOCK = re.compile(r"(?<=<!-- coverage -->\n).*?(?=<!-- /coverage -->)", re.DOTALL)


def rows():
    """The rows of coverage.csv."""
    with (ROOT / "tests/coverage.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def commands(row):
    """What a row's method is here: methods of the training scripts, or one command of another."""
    words = row["here"].split()
    if "--method.sspcab" in words or words[:1] == ["discover.py"]:
        return [row["here"]]
    return words


def is_native(command):
    """Whether the suite has it itself, as a method's own declaration says."""
    name = command.split()[0]
    return name == "discover.py" or not find_method(name).is_library


def table():
    """The table, as Markdown."""
    lines = ["| named by | here | through anomalib | not here |", "| --- | --- | --- | --- |"]
    for source, title in SOURCES.items():
        ours = [row for row in rows() if row["source"] == source]
        cells: list[list[str]] = [[], [], []]
        for row in ours:
            found = commands(row)
            native = [f"`{c}`" for c in found if is_native(c)]
            bridged = [f"`{c.partition(':')[2]}`" for c in found if not is_native(c)]
            if native:
                cells[0].append(f"{row['name']} {' '.join(native)}")
            elif bridged:
                cells[1].append(f"{row['name']} {' '.join(bridged)}")
            else:
                cells[2].append(f"{row['name']}: {row['why']}")
        joined = ["; ".join(cell).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join([title, *joined])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda _: table(), text), encoding="utf-8")
