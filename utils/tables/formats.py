"""The ways to print a table: Markdown, LaTeX, csv, JSON and the terminal."""

import csv
import io
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from utils.runs.files import write_text
from utils.tables.table import Table


def to_markdown(table: Table) -> str:
    """Return a GitHub table with its caption above and its notes below; bold is best."""
    wrap = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    heads = [markdown_text(table.corner)]
    for column in table.columns:
        parts = [column.name, column.group] if column.group else [column.name]
        heads.append("<br>".join(map(markdown_text, parts)))
    rows = [heads]
    for row, texts, marks in zip(table.rows, table.texts(), table.marks(), strict=True):
        cells = [wrap[m].format(markdown_text(t)) for t, m in zip(texts, marks, strict=True)]
        rows.append([markdown_text(row.label), *cells])
    widths, on_left = _widths(rows), _on_left(table)
    rule = "|".join(
        ":" + "-" * (width + 1) if left else "-" * (width + 1) + ":"
        for width, left in zip(widths, on_left, strict=True)
    )
    body = ["| " + " | ".join(_padded(row, widths, on_left)) + " |" for row in rows]
    notes = ["", *(f"- {markdown_text(note)}" for note in table.notes)] if table.notes else []
    lines = [markdown_text(table.caption), "", body[0], f"|{rule}|", *body[1:], *notes]
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    r"""Return a booktabs `tabular` for `\input`; the caption is a comment, notes come below."""
    wrap = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    heads = [latex_text(text) for text in (table.corner, *(c.name for c in table.columns))]
    head_lines = [" & ".join(heads) + r" \\"]
    if any(column.group for column in table.columns):
        spans, rules = [""], []
        for group, start, end in table.groups():
            spans.append(rf"\multicolumn{{{end - start}}}{{c}}{{{latex_text(group)}}}")
            if group:
                rules.append(rf"\cmidrule(lr){{{start + 2}-{end + 1}}}")
        head_lines = [" & ".join(spans) + r" \\", " ".join(rules), *head_lines]
    texts, marks = table.texts(), table.marks()
    body = []
    for block in table.blocks():
        body.append(r"\midrule")
        for r in block:
            cells = [
                wrap[mark].format(latex_text(text))
                for text, mark in zip(texts[r], marks[r], strict=True)
            ]
            body.append(" & ".join([latex_text(table.rows[r].label), *cells]) + r" \\")
    notes = [rf"{{\footnotesize {latex_text(note)}\par}}" for note in table.notes]
    places = "".join("l" if left else "r" for left in _on_left(table))
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            rf"% \caption{{{latex_text(table.caption)}}}",
            rf"\begin{{tabular}}{{@{{}}{places}@{{}}}}",
            r"\toprule",
            *head_lines,
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *([r"\par\smallskip", *notes] if notes else []),
            "",
        ]
    )


def to_csv(table: Table) -> str:
    """Return values not rounded, with deviation, seeds and categories where a column has any."""
    extras = []
    for c in range(len(table.columns)):
        cells = [row.cells[c] for row in table.rows]
        has_std = any(cell.std is not None for cell in cells)
        is_pooled = any(cell.num_seeds for cell in cells)
        extras.append(["_std"] * (has_std or is_pooled) + ["_num_seeds", "_categories"] * is_pooled)
    header = [table.corner.replace(" ", "_")]
    for column, extra in zip(table.columns, extras, strict=True):
        header += [column.key, *(column.key + suffix for suffix in extra)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        fields = [row.key]
        for cell, extra in zip(row.cells, extras, strict=True):
            values = {
                "_std": "" if cell.std is None else repr(cell.std),
                "_num_seeds": str(cell.num_seeds or ""),
                "_categories": "" if cell.found is None else f"{cell.found} of {cell.total}",
            }
            number = "" if cell.mean is None else repr(cell.mean)
            fields += [number if cell.text is None else cell.text, *(values[e] for e in extra)]
        writer.writerow(fields)
    return text.getvalue()


def to_text(table: Table) -> str:
    """Return the table for a terminal: aligned, the heads on three lines."""
    heads = [column.name.rpartition(" ")[::2] for column in table.columns]
    rows = [["", *(first for first, _ in heads)], [table.corner, *(last for _, last in heads)]]
    rows += [[row.label, *texts] for row, texts in zip(table.rows, table.texts(), strict=True)]
    widths = _widths(rows)
    banner = " " * widths[0]
    for group, start, end in table.groups():
        # A heading wider than its columns widens the first of them.
        space = sum(widths[start + 1 : end + 1]) + 2 * (end - start - 1)
        widths[start + 1] += max(0, len(group) + 4 - space)
        banner += "  " + f" {group} ".center(max(space, len(group) + 4), "-")
    printed = ["  ".join(_padded(row, widths, _on_left(table))) for row in rows]
    rule = "-" * len(banner)
    body = printed[:2]
    for block in table.blocks():
        body += [rule, *(printed[2 + r] for r in block)]
    wrapped = [
        textwrap.fill(note, 100, initial_indent="- ", subsequent_indent="  ")
        for note in table.notes
    ]
    lines = [textwrap.fill(table.caption, 100), "", banner, *body, rule, *wrapped]
    return "\n".join(line.rstrip() for line in lines) + "\n"


WRITERS = {".md": to_markdown, ".tex": to_latex, ".csv": to_csv, ".json": Table.to_json}


def write(table: Table, stem: Path, suffixes: Sequence[str] = tuple(WRITERS)) -> list[Path]:
    """Write a table atomically as `stem` with each suffix; return the paths."""
    paths = [stem.with_name(stem.name + suffix) for suffix in suffixes]
    for path, suffix in zip(paths, suffixes, strict=True):
        write_text(path, WRITERS[suffix](table))
    return paths


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


def _on_left(table: Table) -> list[bool]:
    """Tell which columns, the first of all among them, stand on the left."""
    return [True, *map(table.is_text, range(len(table.columns)))]


def _padded(row: Sequence[str], widths: Sequence[int], on_left: Sequence[bool]) -> list[str]:
    """Return the cells filled up to their widths."""
    spaces = [" " * (width - _width(text)) for text, width in zip(row, widths, strict=True)]
    return [
        text + space if left else space + text
        for text, space, left in zip(row, spaces, on_left, strict=True)
    ]


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
