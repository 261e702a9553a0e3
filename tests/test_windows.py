"""Names of files and folders are ones that Windows takes too, by what pathlib knows of it."""

import re
import sys
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import pytest

from models.method import find_methods
from pipeline.experiments import semantic_catalogue, structured_catalogue
from utils.runs.files import file_stem
from utils.runs.predictions import map_name

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
HOSTILE = ["con", "NUL", "a:b", "what?", "x/y", "c\\d", "tail.", "tail ", "ä b", "aux.seed", "*"]


def is_reserved(name):
    if sys.version_info >= (3, 13):
        import ntpath

        return ntpath.isreserved(name)
    return PureWindowsPath(name).is_reserved()


def assert_taken(name):
    assert not FORBIDDEN.search(name), name
    assert not is_reserved(name), name
    assert not name.endswith((".", " ")), name
    assert PureWindowsPath("C:/runs", name).name == name


def test_what_is_forbidden_would_be_found():
    for name in ("con", "a:b", "tail.", "what?"):
        with pytest.raises(AssertionError):
            assert_taken(name)


@pytest.mark.parametrize("backbone", ["wide_resnet50_2.tv_in1k", "hf-hub:timm/resnet18.a1_in1k"])
@pytest.mark.parametrize("catalogue", [structured_catalogue(), semantic_catalogue()])
def test_run_folders(catalogue, backbone):
    for dataset in catalogue.data_sets:
        for method in (m.replace("NAME", "patchcore") for m in catalogue.methods):
            experiment = catalogue.compose(dataset, method)
            for part in replace(experiment, backbone=backbone).run_folder.parts[-2:]:
                assert_taken(part)


@pytest.mark.parametrize("category", HOSTILE)
def test_files_of_a_category(category):
    for suffix in (".npz", ".safetensors", ".json"):
        assert_taken(file_stem(category, 0, "-last") + suffix)
    stems = {file_stem(name, 0).casefold() for name in HOSTILE}
    assert len(stems) == len(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_maps_of_images(name):
    assert_taken(map_name(3, Path(f"{name}.png")) + ".png")


def test_methods_are_files_of_plain_names():
    for name in find_methods("structured") | find_methods("semantic"):
        assert re.fullmatch(r"[a-z0-9_]+(:NAME)?", name)
