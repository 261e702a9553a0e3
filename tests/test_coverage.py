"""The table of what is here of the papers' methods says what is true."""

import pytest

from models.method import find_method, find_methods
from tests.coverage import BLOCK, README, SOURCES, commands, is_native, rows, table
from utils.tables.published import published_table

ROWS = rows()


def test_the_readme_has_the_table_as_the_methods_declare_it():
    found = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert found == [table()], "python -m tests.coverage writes it"


def test_every_method_is_in_it():
    named = {command.split()[0] for row in ROWS for command in commands(row)}
    known = find_methods("structured") | find_methods("semantic")
    assert {name for name in known if ":" not in name} <= named


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['source']}-{row['name']}")
def test_a_row_names_what_is_there_or_why_it_is_not(row):
    assert row["source"] in SOURCES
    assert bool(row["here"]) != bool(row["why"])
    for command in commands(row):
        if command.startswith("discover.py"):
            continue
        method = find_method(command.split()[0])
        assert is_native(command) != (":" in command)
        option = command.partition("--method.")[2]
        assert not option or hasattr(method.options, option)


@pytest.mark.parametrize("table_name", ["NoCo Table II", "NoCo Table III"])
def test_every_method_of_a_published_table_has_a_row(table_name):
    source = table_name.split()[0]
    named = {name for row in ROWS if row["source"] == source for name in row["name"].split(", ")}
    assert {method for method, *_ in published_table(table_name)} <= named
