"""Guards on the source: who imports whom, what importing does, which options are read."""

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from configs.methods import METHODS, SEMANTIC_ONLY

from configs.experiment import Experiment
from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from models import DETECTORS, build_detector, build_extractor, option_names
from tests.models.banks import Bank, Stages

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "configs", "datasets", "figures", "models", "utils")
# What each package may import of ours, itself apart; scripts, benchmarks and tests join them.
ARROWS: dict[str, set[str]] = {
    "configs": set(),
    "models": set(),
    "datasets": set(),
    "utils": set(),
    "figures": {"utils"},
    "benchmarks": {"configs", "models", "datasets", "utils", "figures", "train_mvtec"},
}
# What configs may import of others.
LIGHT = {"tyro"}
MAX_LINES = 350

SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = [*SCRIPTS, *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))]
EVERYTHING = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_packages(tree):
    """The first part of each module the code imports, wherever in the file it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            yield node.module.split(".")[0]


def test_the_guards_see_the_code():
    assert {name_of(path) for path in SCRIPTS} >= {
        "train_mvtec.py",
        "train_cifar10.py",
        "train_mnist.py",
    }
    assert len(SOURCES) > 30


@pytest.mark.parametrize("package", PACKAGES)
def test_import_arrows_hold(package):
    ours = {*PACKAGES, "tests", *(path.stem for path in SCRIPTS)}
    for path in (ROOT / package).rglob("*.py"):
        found = set(imported_packages(tree_of(path))) & ours
        assert found <= {package, *ARROWS[package]}, f"{name_of(path)} imports {found}"


def test_configs_import_light_things_only():
    """So that --help and a mistyped option answer at once, without torch."""
    for path in (ROOT / "configs").glob("*.py"):
        found = set(imported_packages(tree_of(path))) - {"configs"}
        others = {name for name in found if name not in sys.stdlib_module_names}
        assert others <= LIGHT, f"{name_of(path)} imports {others}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_packages_and_say_what_they_hold(package):
    """Without an __init__.py, an installed package called `datasets` would win over ours."""
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        init = folder / "__init__.py"
        assert init.is_file(), f"{name_of(folder)} has no __init__.py"
        assert ast.get_docstring(tree_of(init)), f"{name_of(init)} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_have_docstrings_and_telling_names(path):
    assert ast.get_docstring(tree_of(path))
    assert path.stem not in {"utils", "common", "misc", "helpers", "tools"}


# Calls that may stand in an assignment of a module: they build a constant and touch nothing.
BUILDERS = {
    *("Annotated", "ParamSpec", "TypeVar", "tyro.constructors.PrimitiveConstructorSpec"),
    *("dict", "frozenset", "len", "range", "set", "sorted", "str", "tuple", "fields", "get_args"),
    *("Path", "Path(__file__).resolve", "np.array", "np.ones", "re.compile", "torch.device"),
}


def calls_of(node):
    """Every call that running a statement makes, those inside functions and lambdas apart."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for part in [
            *node.decorator_list,
            *node.args.defaults,
            *filter(None, node.args.kw_defaults),
        ]:
            yield from calls_of(part)
        return
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls_of(child)


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_append(node):
    return isinstance(node, ast.Expr) and ".append(" in ast.unparse(node)


def own_builders(tree):
    """The module's own classes, and its functions that only compute a value."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.FunctionDef):
            body = [line for line in node.body if not is_docstring(line)]
            if all(isinstance(line, ast.Assign | ast.Return) or is_append(line) for line in body):
                yield node.name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_importing_a_module_does_nothing(path):
    tree = tree_of(path)
    definitions = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    allowed = {*BUILDERS, *own_builders(tree)}
    for node in tree.body:
        where = f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for call in calls_of(node):
                name = ast.unparse(call.func)
                # A frozen dataclass of configs; a method of a constant, as "a b".split().
                is_plain = name.endswith("Config") or isinstance(
                    getattr(call.func, "value", None), ast.Constant
                )
                assert name in allowed or is_plain, f"{where} calls {name} at import"
        elif not (is_main_guard(node) or is_docstring(node)):
            assert isinstance(node, definitions), f"{where} runs at import"


def attributes_read(tree, owner):
    """Names that the code reads as `owner.name`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    }


def members_of(kind):
    """name -> syntax tree of each method and property of a dataclass and those it inherits from."""
    members = {}
    for parent in reversed(kind.__mro__[:-1]):
        tree = ast.parse(inspect.getsource(parent))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "__post_init__":
                members[node.name] = node
    return members


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        (StructuredExperiment, ["train_mvtec.py"]),
        (SemanticExperiment, ["train_cifar10.py"]),
    ],
)
def test_every_option_of_an_experiment_is_read(kind, files):
    """Read as `experiment.name` by the script, or by a member of the experiment that it uses.

    A check in __post_init__ is not a use: an option that is checked and then ignored fails here.
    """
    read = set().union(*(attributes_read(tree_of(ROOT / name), "experiment") for name in files))
    members, todo = members_of(kind), set(read)
    while todo:
        member = members.pop(todo.pop(), None)
        if member is not None:
            found = attributes_read(member, "self")
            read |= found
            todo |= found
    unread = {field.name for field in dataclasses.fields(kind)} - read
    assert not unread, f"no code reads {sorted(unread)} of {kind.__name__}"


@pytest.mark.parametrize("kind", [Experiment, StructuredExperiment, SemanticExperiment])
def test_every_option_has_a_help_text(kind):
    definition = ast.parse(inspect.getsource(kind)).body[0]
    assert_fields_are_explained(definition, skip={"dataset", "method_name"})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_option_has_a_help_text(method):
    assert_fields_are_explained(ast.parse(inspect.getsource(type(METHODS[method]))).body[0])


def assert_fields_are_explained(definition, skip=frozenset()):
    for node, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and node.target.id not in skip:
            assert following is not None, node.target.id
            assert is_docstring(following), f"{node.target.id} has no help text"


def test_every_method_has_a_detector_and_every_detector_a_method():
    assert set(METHODS) == set(DETECTORS)


# Taken by build_detector itself, for every method.
OF_ALL_METHODS = {"solver", "feature_norm"}


@pytest.mark.parametrize("method", METHODS)
def test_method_options_are_the_detectors_parameters(method):
    options = dataclasses.asdict(METHODS[method])
    taken = set()
    for detector in DETECTORS[method].values():
        parameters = inspect.signature(detector.__init__).parameters.values()
        for parameter in parameters:
            assert parameter.kind is not parameter.VAR_KEYWORD, "**kwargs would swallow a typo"
        taken |= set(option_names(detector))
    assert set(options) - OF_ALL_METHODS == taken
    if method == "anomalib:NAME":
        return  # built where that library is installed: tests/models/test_anomalib_bridge.py
    short = {name: 1 for name in ("epochs", "pretrain_epochs", "prototypes") if name in options}
    for solver, detector in DETECTORS[method].items():
        changes = short | ({"solver": solver} if "solver" in options else {})
        if detector.takes == "images":
            network, side = ("lenet", 32) if method == "deep_svdd" else ("resnet10t", 48)
            weights = "auto" if method == "panda_ewc" else "random"  # whose classifier it needs
            network = "tf_efficientnet_lite0" if method == "panda_ewc" else network
            pooled = method in SEMANTIC_ONLY
            source = build_extractor(method, network, (1, 2), weights=weights, pooled=pooled)
            bank = Bank(torch.randint(0, 256, (6, 3, side, side)).byte())
        else:
            source, bank = Stages(3, 5), Bank(torch.randn(6, 8, 4, 4))
        head = build_detector(method, source, options | changes)
        head.fit(bank, generator=torch.Generator().manual_seed(0))
        maps, scores = head.score(bank.features[:2])
        assert (len(maps), maps.ndim) == (2, 3)
        assert scores is None or scores.shape == (2,)


def names_of_calls(tree):
    return [(node, ast.unparse(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_silent_failures_are_not_written(path):
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            where = f"{name_of(path)}:{node.lineno}"
            assert node.type is not None, f"{where}: a bare except catches an interrupt too"
            is_silent = all(isinstance(line, ast.Pass) for line in node.body)
            assert not is_silent, f"{where}: an error is passed over"
        if isinstance(node, ast.keyword) and node.arg == "type":
            assert ast.unparse(node.value) != "bool", f"{name_of(path)}: bool('False') is True"
    if path in SOURCES:
        for node, name in names_of_calls(tree):
            assert name not in {"eval", "exec", "breakpoint"}, f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


# A path below one of these is one machine's, not the reader's.
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|root|tmp|work|mnt|Users|private|scratch)/\w")


def tracked_files():
    """Files that git tracks or would; None where there is no checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_text_names_no_machine():
    files = tracked_files()
    if files is None:
        pytest.skip("not a git checkout")
    assert ROOT / "train_mvtec.py" in files
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = MACHINE_PATH.search(text)
        assert not found, f"{name_of(path)} names {found.group()}"


def test_the_guard_against_machine_paths_finds_them():
    for folder in ("home", "tmp", "root"):
        assert MACHINE_PATH.search(f'open("/{folder}' + '/me/data")')
    for text in (
        "/data/mvtec",
        "https://example.org/" + "home/page",
        "../tmp" + "/x",
        "~/work" + "/x",
    ):
        assert not MACHINE_PATH.search(text)


def test_no_compiled_or_large_file_is_tracked():
    files = tracked_files()
    if files is None:
        pytest.skip("not a git checkout")
    for path in files:
        assert path.suffix not in {".pyc", ".so", ".pth", ".safetensors"}, name_of(path)
        assert path.stat().st_size < 2_000_000, name_of(path)
