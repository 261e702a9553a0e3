import ast
from dataclasses import replace
from pathlib import Path

import pytest

import models.methods
from configs.options import MethodOptions
from models.detector import Detector
from models.method import OF_FEATURES, Method, find_method, find_methods, published_name
from tests.models.test_deferred import TINY

TASKS = ("structured", "semantic")
FOUND = {task: find_methods(task) for task in TASKS}
EVERY = FOUND["structured"] | FOUND["semantic"]
OWN = [name for name in EVERY if ":" not in name]


def files_with_a_method():
    (folder,) = models.methods.__path__
    for path in Path(folder).rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        targets = [t for line in body if isinstance(line, ast.Assign) for t in line.targets]
        if any(isinstance(target, ast.Name) and target.id == "METHOD" for target in targets):
            yield path


def test_every_file_with_a_method_is_one_by_its_name():
    names = sorted(path.stem for path in files_with_a_method())
    assert len(names) == len(set(names)) > 10
    assert sorted(name.partition(":")[0] for name in EVERY) == names


@pytest.mark.parametrize("task", TASKS)
def test_a_kind_of_task_has_its_methods_the_default_first(task):
    names = list(FOUND[task])
    assert names[0] == "noco"
    assert names[1:] == sorted(names[1:])
    assert all(task in method.tasks for method in FOUND[task].values())
    assert {name for name in EVERY if task in EVERY[name].tasks} == set(names)


def test_what_some_methods_are_for():
    assert "stpm" in FOUND["structured"].keys() - FOUND["semantic"].keys()
    assert {"panda", "deep_svdd"} <= FOUND["semantic"].keys() - FOUND["structured"].keys()
    assert "anomalib:NAME" in FOUND["structured"].keys() & FOUND["semantic"].keys()


def test_a_library_has_one_method_for_all_its_models():
    library = find_method("anomalib:patchcore")
    assert library.is_library
    assert library is find_method("anomalib:padim") is EVERY["anomalib:NAME"]
    assert library is not find_method("patchcore")
    assert [name for name, method in EVERY.items() if method.is_library] == ["anomalib:NAME"]


@pytest.mark.parametrize("name", ["knnn", "fine_tuning", "", ":knn"])
def test_a_name_without_a_file_of_its_own_is_a_key_error(name):
    with pytest.raises(KeyError):
        find_method(name)


@pytest.mark.parametrize("name", OWN)
def test_a_method_gives_the_class_of_its_detector(name):
    kind = EVERY[name].detector_class()
    assert isinstance(kind, type)
    assert issubclass(kind, Detector)
    assert kind is find_method(name).detector_class()


def test_published_names():
    assert published_name("patchcore") == "PatchCore"
    assert published_name("panda_ewc") == published_name("panda") == "PANDA"
    assert published_name("anomalib:stfpm") == published_name("stpm") == "STPM"
    assert published_name("anomalib:winclip") == published_name("knn") == ""


@pytest.mark.parametrize(
    ("takes", "features_count"),
    [({"features"}, True), ({"images"}, False), ({"features", "images"}, True)],
)
def test_without_features_the_options_of_their_extraction_do_nothing(takes, features_count):
    method = Method(
        detector=lambda: Detector,
        options=MethodOptions(),
        takes=frozenset(takes),
        ignores=frozenset({"weights"}),
    )
    idle = {"weights", "scale_on"} | (set() if features_count else OF_FEATURES)
    assert method.ignored == idle
    assert replace(method, scales_on_held_out=True).ignored == idle - {"scale_on"}


def test_a_new_file_is_a_new_method_in_any_folder(write_methods):
    semantic = TINY.replace("options=", 'tasks=frozenset({"semantic"}), options=')
    write_methods(
        tiny=TINY,
        folder__inner=semantic,
        helper="NO_METHOD = 3\n",
        talk='"""Of a METHOD."""\n\ndef made():\n    METHOD = 3\n    return METHOD\n',
    )
    new = {task: find_methods(task).keys() - FOUND[task].keys() for task in TASKS}
    assert new == {"structured": {"tiny"}, "semantic": {"tiny", "inner"}}
    names = list(find_methods("semantic"))
    assert names[0] == "noco"
    assert names[1:] == sorted(names[1:])
    assert find_method("inner").detector_class().__module__ == "models.methods.folder.inner"
    assert published_name("tiny") == "Tiny"


def test_a_method_that_is_none_is_named_by_its_file(write_methods):
    folder = write_methods(tiny="METHOD = 3\n")
    with pytest.raises(AssertionError, match=str(folder / "tiny.py")):
        find_method("tiny")


def test_methods_differ_from_one_another_by_replacing():
    """The way in which variants are declared keeps what a method needs."""
    plain = find_method("simplenet")
    variant = find_method("nc_disc")
    assert variant == replace(plain, options=variant.options, published_as="")
    assert variant.detector_class() is plain.detector_class()
