"""Rows and notes of tables with a line for each method: NoCo's Table II, SimpleNet's Table 5."""

from collections.abc import Callable, Collection, Sequence

from datasets.data_set import num_categories
from figures.shared.own_results import (
    Series,
    by_setting,
    describe,
    incomplete_seeds,
    papers_data,
    summarise,
    trainable,
)
from utils.tables.table import Cell, Column, Row

RANKED = {
    "all": "Best in bold, second underlined, by the printed values of published methods and of "
    "ours together, whatever the protocol; ties share; incomplete means take no part.",
    "published": "Best in bold, second underlined, among published methods only; ties share.",
}
OUR_PROTOCOL = (
    "Ours: the mean over categories for each seed, then mean ± sample standard deviation over n "
    'seeds; "last" reports the last epoch, "synthetic" the epoch chosen on synthetic anomalies '
    'made of normal training images, "best on test (optimistic)" the maximum over evaluations on '
    "the test set, which is what the papers' released code reports."
)


def method_rows(
    published: dict[tuple[str, str, str, str], float],
    columns: Sequence[Column],
    data_of: Callable[[Column], str] = lambda column: column.key,
) -> list[Row]:
    """Return a row for each published method, in the paper's order.

    Args:
        published: a table of the paper.
        columns: of the table.
        data_of: the data set of a column.
    """
    rows = []
    for method in dict.fromkeys(key[0] for key in published):
        cells = [
            Cell(
                published.get((method, "-", "-", "trainable_params_millions"))
                if column.metric == "trainable"
                else published.get((method, data_of(column), "mean", column.metric))
            )
            for column in columns
        ]
        rows.append(Row(method, method, tuple(cells), "published"))
    return rows


def own_rows(
    series: Sequence[Series],
    columns: Sequence[Column],
    data_of: Callable[[Column], str] = lambda column: column.key,
) -> list[Row]:
    """Return a row for each of our settings, in the order of the run folders.

    Args:
        series: ours.
        columns: of the table.
        data_of: the data set of a column.
    """
    rows = []
    for by_data in by_setting(series).values():
        label = describe(by_data.values())
        cells = []
        for column in columns:
            if column.metric == "trainable":
                cells.append(Cell(trainable(by_data.values())))
            elif data_of(column) in by_data:
                cells.append(summarise(by_data[data_of(column)], column.metric))
            else:
                cells.append(Cell(None))
        rows.append(Row(label, f"ours: {label}", tuple(cells), "ours", is_ours=True))
    return rows


def hole_notes(
    rows: Sequence[Row], ours: Sequence[Row], columns: Sequence[Column], data: Sequence[str]
) -> list[str]:
    """List the cells without a number, and those over some of the categories.

    Args:
        rows: published methods.
        ours: our rows.
        columns: of the table.
        data: keys of the columns that ours should fill.
    """
    notes = []
    missing = {
        row.key: [
            column.name
            for column, cell in zip(columns, row.cells, strict=True)
            if cell.mean is None and not column.is_ours
        ]
        for row in rows
    }
    listed = "; ".join(f"{key}: {', '.join(names)}" for key, names in missing.items() if names)
    if listed:
        notes.append(f"-: missing. Not printed in the paper: {listed}.")
    lacking = {
        row.label: [
            f"{column.name}{_part(cell)}"
            for column, cell in zip(columns, row.cells, strict=True)
            if column.key in data and not cell.is_complete
        ]
        for row in ours
    }
    nowhere = [name for name in data if all(name in names for names in lacking.values())]
    if nowhere and ours:
        notes.append(f"No run of ours is on {', '.join(nowhere)}.")
    for label, names in lacking.items():
        if listed := ", ".join(name for name in names if name not in nowhere):
            notes.append(f"{label}: missing {listed}.")
    return notes


def data_notes(series: Sequence[Series], papers: Collection[str] = ()) -> list[str]:
    """Name data sets the papers lack, seeds that are left out, and random backbones.

    Args:
        series: ours.
        papers: data sets of the table's paper; those of NoCo's by default.
    """
    notes = []
    papers = papers or {*papers_data(structured=True), *papers_data(structured=False)}
    foreign = dict.fromkeys(one.data for one in series if one.data not in papers)
    if foreign:
        counted = [name for name in foreign if not num_categories(name)]
        text = f"Not data sets of the paper: {', '.join(foreign)}; nothing published compares."
        if counted:
            text += f" Their categories are those that any of the runs names: {', '.join(counted)}."
        notes.append(text)
    for one in series:
        if seeds := incomplete_seeds(one):
            listed = ", ".join(map(str, seeds))
            notes.append(
                f"{describe([one])} on {one.data}: seeds {listed} lack categories and are left out."
            )
    if any(one.has_random_weights for one in series):
        names = dict.fromkeys(describe([one]) for one in series if one.has_random_weights)
        notes.append(f"RANDOM BACKBONE WEIGHTS, which measure no method: {'; '.join(names)}.")
    return notes


def _part(cell: Cell) -> str:
    return "" if cell.found is None else f" ({cell.found} of {cell.total} categories)"
