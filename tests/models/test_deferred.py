"""A method's file is run in two parts, in one namespace."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from models.method import find_method

TINY = '''"""Adds the channels."""

from dataclasses import dataclass

from torch import Tensor

from configs.options import FeatureOptions, Positive
from models.detector import Detector, FeatureShape
from models.method import Method
from models.training.epochs import epochs

POWER = 2.0
"""Of the sum."""


@dataclass(frozen=True, kw_only=True)
class TinyOptions(FeatureOptions):
    """Adds the channels."""

    power: Positive = POWER
    """Of the sum."""
    epochs: Positive = 1.0  # its own, not the imported one
    """Passes."""


class Tiny(Detector):
    """Adds the channels."""

    def __init__(self, features: FeatureShape, options: TinyOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, features: Tensor) -> Tensor:
        """Return the power of the sum."""
        return features.sum(dim=1) ** self.options.power


METHOD = Method(detector=lambda: Tiny, options=TinyOptions(), published_as="Tiny")
'''
AT_ONCE = {"POWER", "TinyOptions", "METHOD", "Positive", "dataclass"}
LATER = {"Tensor", "Detector", "FeatureShape", "Tiny"}


def module_of(name):
    return sys.modules[f"models.methods.{name}"]


def test_the_first_part_is_there_without_the_second(write_methods):
    write_methods(tiny=TINY)
    method = find_method("tiny")
    module = module_of("tiny")
    assert method is module.METHOD
    assert method.options.power == 2.0
    assert vars(module).keys() >= AT_ONCE
    assert not LATER & vars(module).keys()
    assert module.__doc__ == "Adds the channels."
    # What a debugger or a copy asks of any object runs nothing.
    assert not hasattr(module, "__wrapped__")
    assert not LATER & vars(module).keys()


@pytest.mark.parametrize("name", sorted(LATER))
def test_the_second_part_runs_when_one_of_its_names_is_asked_for(write_methods, name):
    write_methods(tiny=TINY)
    find_method("tiny")
    module = module_of("tiny")
    assert getattr(module, name) is vars(module)[name]
    assert vars(module).keys() >= LATER


def test_there_is_one_class_of_each_name(write_methods):
    write_methods(tiny=TINY)
    method = find_method("tiny")
    first = module_of("tiny")
    options = first.TinyOptions
    detector = method.detector_class()
    from models.methods.tiny import Tiny, TinyOptions

    from models.methods import tiny

    assert tiny is first
    assert detector is Tiny is first.Tiny is method.detector_class()
    assert type(method.options) is options is TinyOptions is first.TinyOptions
    assert find_method("tiny") is method


def test_a_file_that_was_imported_before_is_not_run_again(write_methods):
    write_methods(tiny=TINY)
    import models.methods.tiny as imported

    assert vars(imported).keys() >= LATER
    assert find_method("tiny") is imported.METHOD
    assert find_method("tiny").detector_class() is imported.Tiny


def test_a_name_that_neither_part_has_is_an_attribute_error(write_methods):
    write_methods(tiny=TINY)
    find_method("tiny")
    message = "module 'models.methods.tiny' has no attribute 'Huge'"
    with pytest.raises(AttributeError, match=message):
        _ = module_of("tiny").Huge
    with pytest.raises(ImportError, match="cannot import name 'Huge'"):
        from models.methods.tiny import Huge  # noqa: F401


CHILD = '''
from dataclasses import replace

from models.methods.tiny import METHOD as PARENT
from models.methods.tiny import Tiny, TinyOptions
from models.method import Method


class Child(Tiny):
    """Another."""


METHOD = replace(PARENT, detector=lambda: Child, options=TinyOptions(power=3.0))
'''


def test_a_file_takes_what_is_there_of_anothers_first_part(write_methods):
    write_methods(tiny=TINY, child=CHILD)
    method = find_method("child")
    child, tiny = module_of("child"), module_of("tiny")
    assert type(method.options) is tiny.TinyOptions
    assert "Child" not in vars(child)
    assert not LATER & vars(tiny).keys()
    assert issubclass(method.detector_class(), tiny.Tiny)
    assert child.Tiny is tiny.Tiny
    assert child.TinyOptions is tiny.TinyOptions


BROKEN = TINY.replace("class Tiny(", "NONE = 1 / len(Tensor())\n\n\nclass Tiny(")


def test_an_error_in_the_second_part_is_raised_again_when_asked_again(write_methods):
    write_methods(tiny=BROKEN)
    method = find_method("tiny")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            method.detector_class()
        with pytest.raises(ZeroDivisionError):
            _ = module_of("tiny").Tiny
    assert find_method("tiny") is method


def test_an_error_in_the_first_part_leaves_no_module(write_methods):
    folder = write_methods(tiny=TINY.replace("POWER = 2.0", "POWER = 1 / 0"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            find_method("tiny")
        assert "models.methods.tiny" not in sys.modules
    write_methods(tiny=TINY)
    assert find_method("tiny").options.power == 2.0
    assert module_of("tiny").__file__ == str(folder / "tiny.py")


def test_a_traceback_shows_the_line_of_the_file(write_methods):
    folder = write_methods(tiny=BROKEN)
    find_method("tiny")
    with pytest.raises(ZeroDivisionError) as caught:
        _ = module_of("tiny").Tiny
    last = caught.traceback[-1]
    assert str(last.path) == str(folder / "tiny.py")
    assert "NONE = 1 /" in str(last.statement)


def test_threads_that_ask_at_once_get_the_same_class(write_methods):
    slow = TINY.replace("class Tiny(", "time.sleep(0.2 + len(Tensor()))\n\n\nclass Tiny(")
    write_methods(tiny=f"import time\n{slow}")
    find_method("tiny")
    module = module_of("tiny")
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: module.Tiny, range(4)))
    assert found == {module.Tiny}
    assert time.perf_counter() - start < 0.7, "it ran once"


LIGHT = "from configs.options import MethodOptions\nfrom models.method import Method\n"
HEAVY = "import torch\nfrom torch import Tensor\n"
END = "METHOD = Method(detector=lambda: Tensor, options=MethodOptions())\n"


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("NEEDS = torch.pi > 3", True),
        ("NEEDS: Tensor | int = 3", 3),
        ("NEEDS = [torch.ones(n).sum().item() for n in range(3)]", [0, 1, 2]),
        ("def NEEDS(part: Tensor) -> None: ...", None),
        ("def NEEDS(*parts: Tensor) -> None: ...", None),
        ("def NEEDS(**parts: Tensor) -> None: ...", None),
        ("def NEEDS() -> Tensor: ...", None),
        ("def NEEDS(part=torch.pi): ...", None),
        ("@torch.no_grad()\ndef NEEDS(): ...", None),
        ("class NEEDS(Tensor): ...", None),
        ("class NEEDS:\n    Own = Tensor", None),
        ("TABLE = [torch.pi]\nNEEDS = TABLE", None),
        ("NEEDS = int(torch.pi)\nNEEDS += 1", 4),
        ("def made() -> int:\n    return int(torch.pi)\n\n\nNEEDS = made()", 3),
        ("import kornia as NEEDS", None),
        ("from models.detector import Detector as NEEDS", None),
    ],
)
def test_what_needs_a_name_of_the_second_part_waits_for_it(write_methods, statement, value):
    write_methods(tiny=f"{LIGHT}{HEAVY}{statement}\n{END}")
    method = find_method("tiny")
    module = module_of("tiny")
    assert "NEEDS" not in vars(module)
    method.detector_class()
    assert "NEEDS" in vars(module)
    assert value is None or value == module.NEEDS


@pytest.mark.parametrize(
    "statement",
    [
        "NEEDS = {n: n + 1 for n in range(3)}",
        "NEEDS = lambda: torch.pi",
        "def NEEDS(): return torch.pi",
        "class NEEDS:\n    size: int = 3\n    double: int = 2 * size",
        "class NEEDS:\n    def pi(self): return torch.pi",
        "import json as NEEDS",
    ],
)
def test_what_needs_no_such_name_runs_at_once(write_methods, statement):
    write_methods(tiny=f"{LIGHT}{HEAVY}{statement}\n{END}")
    find_method("tiny")
    assert "NEEDS" in vars(module_of("tiny"))
    assert "torch" not in vars(module_of("tiny"))
