"""A table of a paper with our results in it: ranked, and written as PNG, PDF, Markdown, LaTeX, csv.

Published numbers are printed as in the paper. Ours are mean ± sample standard deviation over seeds;
a mean over fewer categories than the data set has says so and is not ranked. A hole is a dash.
"""

import csv
import io
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from figures.shared.drawing import save_figure
from figures.shared.own_results import Cell
from figures.shared.table_picture import draw
from utils.runs.files import write_text
from utils.tables.table import latex_text, markdown_text, neighbours

Mark = Literal["best", "second", ""]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: in the csv.
        group: heading over neighbouring columns; "" for none.
        name: heading.
        metric: what it holds; where rows are ranked, only cells of one metric compete.
        is_ours: filled from run folders only.
        is_ranked: whether its best value means anything.
    """

    key: str
    group: str
    name: str
    metric: str = "image_auroc"
    is_ours: bool = False
    is_ranked: bool = True


@dataclass(frozen=True)
class Row:
    """A row of a table: `key` in the csv, `label` in print; a rule sets blocks apart."""

    key: str
    label: str
    cells: tuple[Cell, ...]
    block: str = ""
    is_ours: bool = False


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper.

    Attributes:
        corner: heading of the first column.
        caption: above it.
        columns: in order.
        rows: in order.
        notes: below it.
        rank_along: which cells compete: those of a column, or those of a row and one metric.
    """

    corner: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    rank_along: Literal["column", "row"] = "column"

    def texts(self) -> list[list[str]]:
        """Return each cell as printed."""
        return [
            [text_of(cell, column) for cell, column in zip(row.cells, self.columns, strict=True)]
            for row in self.rows
        ]

    def marks(self) -> list[list[Mark]]:
        """Mark the best and the second best of what competes, by the values as printed.

        Equal values share their mark; a number without a competitor has none.
        """
        competing: dict[tuple[int, str], list[tuple[int, int, float]]] = {}
        for r, row in enumerate(self.rows):
            for c, (cell, column) in enumerate(zip(row.cells, self.columns, strict=True)):
                if (
                    column.is_ranked
                    and cell.is_ranked
                    and cell.is_complete
                    and cell.mean is not None
                ):
                    place = (c, "") if self.rank_along == "column" else (r, column.metric)
                    competing.setdefault(place, []).append((r, c, float(f"{cell.mean:.1f}")))
        marks: list[list[Mark]] = [["" for _ in self.columns] for _ in self.rows]
        for cells in competing.values():
            ranks = sorted({value for *_, value in cells}, reverse=True)
            for r, c, value in cells if len(cells) > 1 else []:
                marks[r][c] = "best" if value == ranks[0] else ""
                if len(ranks) > 1 and value == ranks[1]:
                    marks[r][c] = "second"
        return marks

    def groups(self) -> list[tuple[str, int, int]]:
        """Return (group, first column, end column) of neighbours with one heading."""
        return neighbours(column.group for column in self.columns)

    def blocks(self) -> list[list[int]]:
        """Return the rows between rules."""
        return [
            [place for place, _ in rows]
            for _, rows in groupby(enumerate(self.rows), key=lambda pair: pair[1].block)
        ]

    def to_markdown(self) -> str:
        """Return a GitHub table with caption and notes; bold is best, underlined second."""
        wrap = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
        heads = [self.corner]
        for column in self.columns:
            parts = [column.name, column.group] if column.group else [column.name]
            heads.append("<br>".join(map(markdown_text, parts)))
        lines = [f"| {' | '.join(heads)} |", f"| :-- |{' --: |' * len(self.columns)}"]
        for row, texts, marks in zip(self.rows, self.texts(), self.marks(), strict=True):
            cells = [wrap[mark].format(text) for text, mark in zip(texts, marks, strict=True)]
            lines.append(f"| {' | '.join([markdown_text(row.label), *cells])} |")
        notes = ["", *(f"- {markdown_text(note)}" for note in self.notes)] if self.notes else []
        return "\n".join([markdown_text(self.caption), "", *lines, *notes]) + "\n"

    def to_latex(self) -> str:
        r"""Return a booktabs `tabular` for `\input`; the caption is a comment, notes come below."""
        wrap = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
        heads = [latex_text(text) for text in (self.corner, *(c.name for c in self.columns))]
        head_lines = [" & ".join(heads) + r" \\"]
        if any(column.group for column in self.columns):
            spans, rules = [""], []
            for group, start, end in self.groups():
                spans.append(rf"\multicolumn{{{end - start}}}{{c}}{{{latex_text(group)}}}")
                if group:
                    rules.append(rf"\cmidrule(lr){{{start + 2}-{end + 1}}}")
            head_lines = [" & ".join(spans) + r" \\", " ".join(rules), *head_lines]
        texts, marks = self.texts(), self.marks()
        body = []
        for block in self.blocks():
            body.append(r"\midrule")
            for r in block:
                cells = [
                    wrap[mark].format(latex_text(text))
                    for text, mark in zip(texts[r], marks[r], strict=True)
                ]
                body.append(" & ".join([latex_text(self.rows[r].label), *cells]) + r" \\")
        notes = [rf"{{\footnotesize {latex_text(note)}\par}}" for note in self.notes]
        return "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                rf"% \caption{{{latex_text(self.caption)}}}",
                rf"\begin{{tabular}}{{@{{}}l{'r' * len(self.columns)}@{{}}}}",
                r"\toprule",
                *head_lines,
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                *([r"\par\smallskip", *notes] if notes else []),
                "",
            ]
        )

    def to_csv(self) -> str:
        """Return values not rounded; where ours stand also deviation, seeds and categories."""
        ours = [any(row.cells[c].num_seeds for row in self.rows) for c in range(len(self.columns))]
        header = [self.corner.replace(" ", "_")]
        for column, has_ours in zip(self.columns, ours, strict=True):
            extra = ("_std", "_num_seeds", "_categories") if has_ours else ()
            header += [column.key, *(column.key + suffix for suffix in extra)]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for row in self.rows:
            fields = [row.key]
            for cell, has_ours in zip(row.cells, ours, strict=True):
                fields.append("" if cell.mean is None else repr(cell.mean))
                if has_ours:
                    part = "" if cell.found is None else f"{cell.found} of {cell.total}"
                    std = "" if cell.std is None else repr(cell.std)
                    fields += [std, str(cell.num_seeds or ""), part]
            writer.writerow(fields)
        return text.getvalue()

    def write(self, out: Path) -> list[Path]:
        """Write FILE.png, FILE.pdf, FILE.md, FILE.tex and FILE.csv atomically; return them.

        Args:
            out: FILE, with one of these suffixes or none.
        """
        texts = {".md": self.to_markdown(), ".tex": self.to_latex(), ".csv": self.to_csv()}
        stem = stem_of(out)
        picture = draw(
            caption=self.caption,
            heads=[self.corner, *(column.name for column in self.columns)],
            groups=self.groups(),
            labels=[row.label for row in self.rows],
            texts=self.texts(),
            marks=self.marks(),
            blocks=self.blocks(),
            our_rows=[r for r, row in enumerate(self.rows) if row.is_ours],
            our_columns=[c for c, column in enumerate(self.columns) if column.is_ours],
            notes=self.notes,
        )
        paths = save_figure(picture, stem.with_name(stem.name + ".png"))
        for suffix, text in texts.items():
            paths.append(stem.with_name(stem.name + suffix))
            write_text(paths[-1], text)
        return paths


def text_of(cell: Cell, column: Column) -> str:
    """Print a cell: `99.2`, `97.1 ± 0.2`, `97.1 (3 of 15)`, or a dash where there is nothing."""
    if cell.mean is None:
        return "-"
    is_small = column.metric == "trainable" and 0 < cell.mean < 0.1
    text = f"{cell.mean:.2g}" if is_small else f"{cell.mean:.1f}"
    if cell.found is not None:
        reason = "no seed complete" if cell.found == cell.total else f"{cell.found} of {cell.total}"
        return f"{text} ({reason})"
    return text if cell.std is None else f"{text} ± {cell.std:.1f}"


def stem_of(out: Path) -> Path:
    """Return FILE without the suffix of something a table is written as."""
    return out.with_suffix("") if out.suffix in {".png", ".pdf", ".md", ".tex", ".csv"} else out
