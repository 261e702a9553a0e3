"""A finished results table and the four ways to print it: Markdown, LaTeX, csv and terminal."""

import csv
import io
import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from utils.runs.files import write_text


@dataclass(frozen=True)
class Cell:
    """A number in percent: None is a blank, NaN is printed as a dash."""

    mean: float | None
    std: float | None = None

    def __str__(self) -> str:
        if self.mean is None:
            return ""
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Column:
    """One metric of a group of columns: `key` names it in the csv, `group` and `name` in print."""

    key: str
    group: str
    name: str
    has_std: bool


@dataclass(frozen=True)
class Line:
    """One category, or one mean over categories: `key` in the csv, `label` in print."""

    key: str
    label: str
    cells: tuple[Cell, ...]
    is_mean: bool = False


@dataclass(frozen=True)
class Table:
    """A results table, categories first, then the means."""

    caption: str
    header: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def to_markdown(self) -> str:
        """Return a GitHub table with its caption above and its notes below."""
        rows = [["category", *(f"{column.name}<br>{column.group}" for column in self.header)]]
        rows += [[markdown_text(line.label), *map(str, line.cells)] for line in self.lines]
        widths = _widths(rows)
        rule = "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])])
        body = ["| " + " | ".join(_padded(row, widths)) + " |" for row in rows]
        notes = ["", *(f"- {markdown_text(note)}" for note in self.notes)] if self.notes else []
        lines = [markdown_text(self.caption), "", body[0], f"|{rule}|", *body[1:], *notes]
        return "\n".join(lines) + "\n"

    def to_latex(self) -> str:
        r"""Return a booktabs `tabular` for `\input`; the caption is a comment, notes come below."""
        groups, rules = [""], []
        for group, start, end in neighbours(column.group for column in self.header):
            groups.append(rf"\multicolumn{{{end - start}}}{{c}}{{{latex_text(group)}}}")
            rules.append(rf"\cmidrule(lr){{{start + 2}-{end + 1}}}")
        heads = ["category", *(latex_text(column.name) for column in self.header)]
        body: list[str] = []
        for _is_mean, lines in groupby(self.lines, key=lambda line: line.is_mean):
            body += [r"\midrule"]
            body += [_latex_row([line.label, *map(str, line.cells)]) for line in lines]
        notes = [rf"{{\footnotesize {latex_text(note)}\par}}" for note in self.notes]
        return "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                rf"% \caption{{{latex_text(self.caption)}}}",
                rf"\begin{{tabular}}{{@{{}}l{'r' * len(self.header)}@{{}}}}",
                r"\toprule",
                " & ".join(groups) + r" \\",
                " ".join(rules),
                " & ".join(heads) + r" \\",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                *([r"\par\smallskip", *notes] if notes else []),
                "",
            ]
        )

    def to_csv(self) -> str:
        """Return percent, not rounded: `<group>_<metric>` and, over several seeds, its `_std`."""
        names = ["category"]
        for column in self.header:
            names += [column.key, f"{column.key}_std"] if column.has_std else [column.key]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for line in self.lines:
            fields = [line.key]
            for column, cell in zip(self.header, line.cells, strict=True):
                values = (cell.mean, cell.std) if column.has_std else (cell.mean,)
                fields += ["" if value is None else repr(value) for value in values]
            writer.writerow(fields)
        return text.getvalue()

    def to_text(self) -> str:
        """Return the table for a terminal: aligned, the heads on three lines."""
        heads = [column.name.rpartition(" ")[::2] for column in self.header]
        rows = [["", *(first for first, _ in heads)], ["category", *(last for _, last in heads)]]
        rows += [[line.label, *map(str, line.cells)] for line in self.lines]
        widths = _widths(rows)
        banner = " " * widths[0]
        for group, start, end in neighbours(column.group for column in self.header):
            # A heading wider than its columns widens the first of them.
            space = sum(widths[start + 1 : end + 1]) + 2 * (end - start - 1)
            widths[start + 1] += max(0, len(group) + 4 - space)
            banner += "  " + f" {group} ".center(max(space, len(group) + 4), "-")
        printed = ["  ".join(_padded(row, widths)) for row in rows]
        rule = "-" * len(banner)
        body = printed[:2]
        for _, lines in groupby(
            zip(self.lines, printed[2:], strict=True), key=lambda pair: pair[0].is_mean
        ):
            body += [rule, *(text for _, text in lines)]
        wrapped = [
            textwrap.fill(note, 100, initial_indent="- ", subsequent_indent="  ")
            for note in self.notes
        ]
        lines_out = [textwrap.fill(self.caption, 100), "", banner, *body, rule, *wrapped]
        return "\n".join(line.rstrip() for line in lines_out) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write table.md, table.tex and table.csv atomically and return their paths."""
        texts = {"md": self.to_markdown(), "tex": self.to_latex(), "csv": self.to_csv()}
        for extension, text in texts.items():
            write_text(folder / f"table.{extension}", text)
        return [folder / f"table.{extension}" for extension in texts]


def neighbours(groups: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return (group, first column, end column) of each run of columns with one heading."""
    found = []
    for group, columns in groupby(enumerate(groups), key=lambda pair: pair[1]):
        places = [place for place, _ in columns]
        found.append((group, places[0], places[-1] + 1))
    return found


def _width(text: str) -> int:
    """Return how many terminal columns a text takes: East Asian wide letters two, accents none."""
    return sum(
        0
        if unicodedata.combining(letter)
        else 2
        if unicodedata.east_asian_width(letter) in "WF"
        else 1
        for letter in text
    )


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(_width, column)) for column in zip(*rows, strict=True)]


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return the first cell padded on the right, the others on the left."""
    spaces = [" " * (width - _width(text)) for text, width in zip(row, widths, strict=True)]
    return [row[0] + spaces[0], *(s + text for s, text in zip(spaces[1:], row[1:], strict=True))]


def markdown_text(text: str) -> str:
    """Return text as it stands in Markdown, on one line."""
    text = re.sub(r"[\\`*\[\]<>|]", r"\\\g<0>", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # an underscore within a word is harmless


_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "…": r"\ldots{}",
    # After the \\ of the line before, these two would be read as its argument.
    "[": "{[}",
    "*": "{*}",
    "\0": "{}",
}


def latex_text(text: str) -> str:
    """Return text as it stands in LaTeX, on one line."""
    # Two hyphens, as in an option's name, would be set as one dash: {} goes between them.
    text = re.sub("-(?=-)", "-\0", " ".join(text.split()))
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(latex_text, cells)) + r" \\"
