"""The tables of a finding, written and read again."""

import pytest

from utils.discovery.files import (
    ASSIGNMENTS,
    ImageRow,
    RegionRow,
    read_assignments,
    read_images,
    write_assignments,
    write_images,
)
from utils.errors import RunError

IMAGES = [
    ImageRow("a, b/1.png", "kind 2", 0.25, 2, 3.5, "crack"),
    ImageRow("c.png", "good", None, 0, 1.0, ""),
]
REGIONS = [RegionRow("c.png", 0, "kind 1", 1.0, 1, 2.5, 40, -3.5, 0.0, 20.0, 23.5, "00001_0")]


def test_tables_are_read_as_they_were_written(tmp_path):
    write_images(tmp_path, IMAGES)
    write_assignments(tmp_path, REGIONS)
    assert read_images(tmp_path) == IMAGES
    assert read_assignments(tmp_path) == REGIONS
    first = (tmp_path / ASSIGNMENTS).read_text().splitlines()[0]
    assert first.startswith("image,region,kind,confidence")


def test_a_table_that_is_cut_names_the_line(tmp_path):
    write_assignments(tmp_path, REGIONS * 2)
    path = tmp_path / ASSIGNMENTS
    path.write_text(path.read_text()[:-30])
    with pytest.raises(RunError, match="record 3"):
        read_assignments(tmp_path)
    path.write_text("image,kind\n")
    with pytest.raises(RunError, match="columns"):
        read_assignments(tmp_path)
    with pytest.raises(RunError, match=r"run discover\.py"):
        read_images(tmp_path)
