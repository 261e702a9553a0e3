"""Guards on the source: who imports whom, what importing does, which options are read."""

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from configs.anomalyncd import AnomalyNcdOptions
from configs.discovery import ContrastOptions, DiscoverOptions
from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from datasets.data_set import SemanticSet, StructuredSet, find_data_sets
from models.method import find_method, find_methods

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "configs", "datasets", "figures", "models", "pipeline", "utils")
# What the modules of each package may import of ours, itself apart: packages, or modules of them.
ARROWS: dict[str, set[str]] = {
    "configs": set(),
    "models": {"configs.anomalyncd", "configs.options", "configs.presets", "datasets.drawing"},
    "datasets": {"configs.options", "configs.presets", "configs.tiles"},
    "utils": {
        *("configs", "datasets.samples"),
        *("models.detector", "models.errors", "models.features.matmul"),
    },
    "figures": {"configs", "utils", "datasets.data_set", "datasets.reading", "datasets.samples"},
    "pipeline": {"configs", "models", "datasets", "utils"},
    "benchmarks": {"configs", "models", "datasets", "utils", "pipeline", "train_mvtec"},
    "scripts": {"configs", "models", "datasets", "utils", "pipeline"},
}
# Third-party packages that configs may import.
LIGHT = {"platformdirs", "tyro"}
MAX_LINES = 350
MAX_FILES = 16
MAX_PARAMETERS = 10

SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = [*SCRIPTS, *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))]
EVERYTHING = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree):
    """The modules the code imports, wherever in the file it does; `a.b` for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            # Of a package, that is a module; of a module, its name would not be.
            is_module = (ROOT / node.module.replace(".", "/")).with_suffix(".py").is_file()
            yield from (
                [node.module]
                if is_module
                else [f"{node.module}.{alias.name}" for alias in node.names]
            )


def imported_packages(tree):
    return {name.partition(".")[0] for name in imported_modules(tree)}


def test_the_guards_see_the_code():
    assert {name_of(path) for path in SCRIPTS} >= {
        "train_mvtec.py",
        "train_cifar10.py",
        "train_mnist.py",
    }
    assert len(SOURCES) > 30


@pytest.mark.parametrize("package", ARROWS)
def test_import_arrows_hold(package):
    """No arrow upwards, so no circle; and no script or test is imported as a library."""
    ours = {*PACKAGES, "tests", *(path.stem for path in SCRIPTS)}
    paths = SCRIPTS if package == "scripts" else sorted((ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        for name in imported_modules(tree_of(path)):
            if (top := name.partition(".")[0]) not in ours or top == package:
                continue
            allowed = any(f"{name}.".startswith(f"{arrow}.") for arrow in ARROWS[package])
            assert allowed, f"{name_of(path)} imports {name}"


def test_configs_import_light_things_only():
    """So that --help and a mistyped option answer at once, without torch."""
    for path in (ROOT / "configs").rglob("*.py"):
        found = imported_packages(tree_of(path)) - {"configs"}
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


PATH = re.compile(rf"\b(?:{'|'.join(PACKAGES)}|tests)/[\w/]+\.py\b")


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"],
    ids=name_of,
)
def test_files_that_texts_name_are_there(path):
    named = set(PATH.findall(path.read_text(encoding="utf-8")))
    assert not [name for name in named if not (ROOT / name).is_file()]


# Calls that may stand in an assignment of a module: they build a constant and touch nothing.
BUILDERS = {
    *("Annotated", "ParamSpec", "TypeVar", "tyro.constructors.PrimitiveConstructorSpec"),
    *(
        "Bound",
        "OnlyWith",
        "Method",
        "StructuredSet",
        "SemanticSet",
        "PairTransform",
        "Scoring",
        "Column",
    ),
    *("dataclasses.replace", "replace", "fields_marked"),
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


def is_for_types(node):
    """Whether it imports for annotations only."""
    return (
        isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
        and not node.orelse
        and all(isinstance(line, ast.Import | ast.ImportFrom) for line in node.body)
    )


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
                # A frozen dataclass of options; a method of a constant, as "a b".split().
                is_plain = name.endswith("Options") or isinstance(
                    getattr(call.func, "value", None), ast.Constant
                )
                assert name in allowed or is_plain, f"{where} calls {name} at import"
        elif not (is_main_guard(node) or is_docstring(node) or is_for_types(node)):
            assert isinstance(node, definitions), f"{where} runs at import"


def attributes_read(tree, owner):
    """Names that the code reads as `owner.name`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node.value) == owner
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


def read_by(kind, trees, *owners):
    """Names read as `owner.name`, and what the members read in that way read of themselves."""
    read = {name for tree in trees for owner in owners for name in attributes_read(tree, owner)}
    members, todo = members_of(kind), set(read)
    while todo:
        member = members.pop(todo.pop(), None)
        if member is not None:
            found = attributes_read(member, "self")
            read |= found
            todo |= found
    return read


def unread_fields(kind, trees, *owners):
    return {field.name for field in dataclasses.fields(kind)} - read_by(kind, trees, *owners)


@pytest.mark.parametrize("kind", [StructuredExperiment, SemanticExperiment])
def test_every_option_of_an_experiment_is_read(kind):
    """Read as `experiment.name` by the pipeline, or by a member of the experiment that it uses.

    A check in __post_init__ is not a use: an option that is checked and then ignored fails here.
    """
    trees = [tree_of(path) for path in (ROOT / "pipeline").rglob("*.py")]
    unread = unread_fields(kind, trees, "experiment", "finished.experiment")
    assert not unread, f"no code reads {sorted(unread)} of {kind.__name__}"


# What is read of the options of every method that has them.
OF_ALL = [ROOT / "models/building.py", ROOT / "models/features/feature_norm.py"]


def files_of(method):
    """The file of a method, and those below models/methods that it imports."""
    file = inspect.getfile(find_method(method).detector_class())
    found, todo = set(OF_ALL), [Path(file)]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for name in imported_modules(tree_of(path)):
            module = (ROOT / name.replace(".", "/")).with_suffix(".py")
            if name.startswith("models.methods.") and module.is_file():
                todo.append(module)
    return found


METHODS = sorted({*find_methods("structured"), *find_methods("semantic")})


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_is_read(method):
    trees = [tree_of(path) for path in files_of(method)]
    owners = ("options", "self.options", "detector.options", "tuning", "self.tuning")
    kind = type(find_method(method).options)
    unread = unread_fields(kind, trees, *owners, "detector.tuning")
    assert not unread, f"no code reads {sorted(unread)} of {kind.__name__}"


DISCOVERY = [
    *(ROOT / "pipeline/discovery").rglob("*.py"),
    *(ROOT / "models/discovery").rglob("*.py"),
    ROOT / "discover.py",
]


@pytest.mark.parametrize("kind", [DiscoverOptions, ContrastOptions, AnomalyNcdOptions])
def test_every_option_of_discovery_is_read(kind):
    owners = ("options", "self.options", "method", "self.contrast", "network.options")
    unread = unread_fields(kind, [tree_of(path) for path in DISCOVERY], *owners)
    assert not unread, f"no code reads {sorted(unread)} of {kind.__name__}"


DATA_SETS = [*find_data_sets(StructuredSet).values(), *find_data_sets(SemanticSet).values()]


def by_name(kinds):
    return sorted(set(kinds), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", by_name(type(one.options) for one in DATA_SETS))
def test_every_option_of_a_data_set_is_read(kind):
    unread = unread_fields(kind, [tree_of(Path(inspect.getfile(kind)))], "options")
    assert not unread, f"no code reads {sorted(unread)} of {kind.__name__}"


OPTIONS: set[type] = {
    *(type(one.options) for one in DATA_SETS),
    *(
        parent
        for kind in (StructuredExperiment, SemanticExperiment)
        for parent in kind.__mro__[:-1]
    ),
    *(parent for name in METHODS for parent in type(find_method(name).options).__mro__[:-1]),
    *(DiscoverOptions, ContrastOptions, AnomalyNcdOptions),
}


@pytest.mark.parametrize("kind", by_name(OPTIONS))
def test_every_option_has_a_help_text(kind):
    definition = ast.parse(inspect.getsource(kind)).body[0]
    for node, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        # Neither a constant of the class nor a text that is no option.
        if isinstance(node, ast.AnnAssign) and not re.search(
            r"ClassVar|Hidden|Suppress", ast.unparse(node.annotation)
        ):
            assert following is not None, node.target.id
            assert is_docstring(following), f"{node.target.id} has no help text"


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
        # The file of a method is run in two parts, by one call.
        allowed = {"exec"} if path == ROOT / "models/deferred.py" else set()
        for node, name in names_of_calls(tree):
            where = f"{name_of(path)}:{node.lineno}"
            assert name not in {"eval", "exec", "breakpoint"} - allowed, where


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_folders_are_not_crowded():
    count = Counter(name_of(path.parent) for path in SOURCES)
    assert count["models/methods"] > 3
    assert {name: n for name, n in count.items() if n > MAX_FILES and name != "figures"} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_take_few_parameters(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            number = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            assert number <= MAX_PARAMETERS, f"{name_of(path)}:{node.lineno} takes {number}"


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
