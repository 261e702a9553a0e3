"""Tables with a line for each category and a column for each method: NoCo III, SimpleNet 1."""

from collections.abc import Sequence

from figures.shared.method_tables import OUR_PROTOCOL, data_notes
from figures.shared.own_results import Series, by_setting, describe, summarise
from utils.metrics.metrics import heading_of
from utils.tables.published import Key, published_table
from utils.tables.table import Cell, Column, Row, Table

_RANKED = "Best of a line in bold, second underlined, by the printed values; ties share"


def category_tables(
    source: str, series: Sequence[Series], metrics: Sequence[str], notes: Sequence[str] = ()
) -> dict[str, Table]:
    """Build the paper's table, and one of its form for each other data set of ours.

    Args:
        source: of `figures/published.csv`, a table by category of MVTec AD.
        series: ours.
        metrics: columns of each method, as in results.csv.
        notes: printed last.

    Returns:
        "mvtec", then our other data sets, each with its table.
    """
    published = published_table(source)
    others = dict.fromkeys(one.data for one in series if one.data != "mvtec")
    names = [_names(published), *(_own_names([s for s in series if s.data == o]) for o in others)]
    tables = {}
    for data, categories in zip(["mvtec", *others], names, strict=True):
        own = [one for one in series if one.data == data]
        shown = published if data == "mvtec" else {}
        tables[data] = _table(source, data, own, shown, categories, metrics, notes)
    return tables


def _table(
    source: str,
    data: str,
    own: Sequence[Series],
    published: dict[Key, float],
    categories: dict[str, list[str]],
    metrics: Sequence[str],
    notes: Sequence[str],
) -> Table:
    methods = list(dict.fromkeys(method for method, *_ in published))
    lines = [by_data[data] for by_data in by_setting(own).values()]
    columns = [_column(method, metric, metrics) for method in methods for metric in metrics]
    for number, one in enumerate(lines, start=1):
        name = f"{one.method} [{number}]"
        columns += [_column(name, metric, metrics, is_ours=True) for metric in metrics]
    rows = []
    for line, members in categories.items():
        cells = [
            Cell(published.get((method, "mvtec", line, metric)))
            for method in methods
            for metric in metrics
        ]
        total = None if line == "mean" else len(members)
        chosen = None if line == "mean" else members
        cells += [summarise(one, metric, chosen, total) for one in lines for metric in metrics]
        rows.append(Row(line, _label(line), tuple(cells), _block(line, categories)))
    what = " and ".join(heading_of(metric) for metric in metrics)
    if data == "mvtec":
        caption = f"{source}: {what} in percent on MVTec AD. Published: as printed."
    else:
        caption = f"In the form of {source}: {what} in percent on {data}; ours only."
    if own:
        together = "; ours compete whatever the protocol, incomplete means do not."
        caption = f"{caption} {OUR_PROTOCOL} {_RANKED}{together}"
    else:
        caption = f"{caption} {_RANKED}."
    key_notes = [f"[{i}] {describe([one])}" for i, one in enumerate(lines, start=1)]
    if data == "mvtec" and not own:
        key_notes.append("No run of ours is on mvtec.")
    hole_notes = _hole_notes(rows, columns)
    return Table(
        "category",
        caption,
        tuple(columns),
        tuple(rows),
        (*key_notes, *hole_notes, *data_notes(own), *notes),
        rank_along="row",
        hole="-",
    )


def _column(name: str, metric: str, metrics: Sequence[str], *, is_ours: bool = False) -> Column:
    key = name if len(metrics) == 1 else f"{name} {metric}"
    short = metric.removesuffix("_auroc")
    group, head = ("", name) if len(metrics) == 1 else (name, short)
    return Column(key, head, group, metric, is_ours=is_ours)


def _names(published: dict[Key, float]) -> dict[str, list[str]]:
    """Return the paper's lines, each with its categories: a group's mean comes after them."""
    lines: dict[str, list[str]] = {}
    group: list[str] = []
    for name in dict.fromkeys(category for _, _, category, _ in published):
        if name == "mean":
            lines[name] = [n for n in lines if not n.startswith("mean_")]
        elif name.startswith("mean_"):
            lines[name], group = group, []
        else:
            lines[name] = [name]
            group.append(name)
    return lines


def _own_names(series: Sequence[Series]) -> dict[str, list[str]]:
    names = list(dict.fromkeys(category for one in series for category, _ in one.rows))
    mean = {"mean": names} if series[0].num_categories > 1 else {}
    return {name: [name] for name in names} | mean


def _label(line: str) -> str:
    return line.replace("_", " ") if line.startswith("mean_") else line


def _block(line: str, categories: dict[str, list[str]]) -> str:
    """Name the lines between two rules: a group, its mean, the mean of all."""
    if line.startswith("mean"):
        return line
    return next((n for n, m in categories.items() if n.startswith("mean_") and line in m), "")


def _hole_notes(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """List, column by column, the lines without a number or over some of their categories."""
    notes = []
    for c, column in enumerate(columns):
        holes = [
            row.label if row.cells[c].mean is None else f"{row.label} (incomplete)"
            for row in rows
            if not row.cells[c].is_complete
        ]
        if len(holes) == len(rows):
            notes.append(f"-: missing: all of {column.key}.")
        elif holes:
            notes.append(f"-: missing of {column.key}: {', '.join(holes)}.")
    return notes
