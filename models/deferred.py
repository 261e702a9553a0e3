"""Runs the file of a method in two parts: what its METHOD needs at once, the rest when asked for.

The command line needs the options of every method and the detector of none, but both stand in one
file, and a detector needs torch, whose import takes seconds. So a statement runs at once if every
name that running it looks up is there: imports of the standard library and of `configs`, classes of
options, constants, METHOD (whose `lambda: Knn` looks Knn up when it is called). All others, in
their order, run when the module is first asked for a name that it has not yet. Either part runs in
the module's own namespace: there is one class of each name, and a plain `import` of the file gives
the same module.
"""

import ast
import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS = "models.methods"
"""The package whose files are run so."""
LIGHT = ("configs", "models.errors", "models.method")
"""Modules of ours, and packages of such, that need no torch."""
_COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def load(name: str, path: Path) -> types.ModuleType:
    """Return a module below `METHODS`, its first part run, or all of it where it was imported.

    Args:
        name: dotted, of the module.
        path: of its file.
    """
    if name in sys.modules:
        return sys.modules[name]
    parent = importlib.import_module(name.rpartition(".")[0])
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _Loader(path).exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    setattr(parent, name.rpartition(".")[2], module)
    return module


def complete(name: str) -> None:
    """Run the second part of a module, if it has not run yet."""
    module = sys.modules[name]
    if isinstance(module, _TwoPartModule):
        module.run_rest()


class _TwoPartModule(types.ModuleType):
    """A module that runs its second part when it is asked for a name that it has not."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._rest: list[ast.stmt] = []
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        with self._lock:  # another thread may be at it
            if not name.startswith("__"):
                self.run_rest()
        if name in self.__dict__:
            return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def run_rest(self) -> None:
        """Run the second part; nothing where it has run."""
        with self._lock:
            rest, self._rest = self._rest, []
            try:
                _run(rest, self)
            except BaseException:
                self._rest = rest
                raise


class _Loader(importlib.abc.Loader):
    """Runs the first part of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return the empty module."""
        return _TwoPartModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run what can run without torch, and keep the rest."""
        assert isinstance(module, _TwoPartModule)
        tree = ast.parse(self._path.read_text(encoding="utf-8"), filename=str(self._path))
        module.__doc__ = ast.get_docstring(tree)
        rest: list[ast.stmt] = []
        later: set[str] = set()  # names that the second part binds, perhaps again
        for statement in tree.body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a text about the constant above
            if left := _run_now(statement, module, later):
                rest.append(left)
                later.update(_bound(left))
        module._rest = rest


def _run(statements: list[ast.stmt], module: types.ModuleType) -> None:
    code = compile(ast.Module(statements, []), module.__file__ or "", "exec")
    exec(code, module.__dict__)  # the file is one of this package


def _run_now(statement: ast.stmt, module: types.ModuleType, later: set[str]) -> ast.stmt | None:
    """Run a statement if that can be done at once; return what is left to run of it."""
    if isinstance(statement, ast.ImportFrom) and _is_below_methods(statement.module):
        return _bind_what_is_there(statement, module)
    if later.intersection(_bound(statement)) or not _can_run(statement, module, later):
        return statement
    try:
        _run([statement], module)
    except NameError:  # a function that it calls looks up what is not there yet
        return statement
    return None


def _can_run(statement: ast.stmt, module: types.ModuleType, later: set[str]) -> bool:
    for node in ast.walk(statement):
        if isinstance(node, ast.Import) and not all(_is_light(a.name) for a in node.names):
            return False
        if isinstance(node, ast.ImportFrom) and not _is_light(node.module or ""):
            return False
    there = module.__dict__.keys() - later
    return all(name in there or hasattr(builtins, name) for name in _looked_up(statement))


def _is_light(name: str) -> bool:
    ours = any(name == light or name.startswith(f"{light}.") for light in LIGHT)
    return ours or name.partition(".")[0] in sys.stdlib_module_names


def _is_below_methods(name: str | None) -> bool:
    return (name or "").startswith(f"{METHODS}.")


def _bind_what_is_there(
    statement: ast.ImportFrom, module: types.ModuleType
) -> ast.ImportFrom | None:
    """Take what the first part of another method's file has; return the import of the rest."""
    assert statement.module is not None
    spec = importlib.util.find_spec(statement.module)
    assert spec is not None, statement.module
    assert spec.origin is not None, statement.module
    other = load(statement.module, Path(spec.origin))
    left = []
    for alias in statement.names:
        if alias.name in other.__dict__:
            module.__dict__[alias.asname or alias.name] = other.__dict__[alias.name]
        else:
            left.append(alias)
    return ast.copy_location(ast.ImportFrom(statement.module, left, 0), statement) if left else None


def _looked_up(node: ast.AST) -> Iterator[str]:
    """Yield the names that running a piece of code looks up outside of it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        # The body runs when it is called.
        parts: list[ast.AST] = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        if not isinstance(node, ast.Lambda):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            every += filter(None, [node.args.vararg, node.args.kwarg])
            parts += [*node.decorator_list, *filter(None, [node.returns])]
            parts += [argument.annotation for argument in every if argument.annotation]
        for part in parts:
            yield from _looked_up(part)
        return
    if isinstance(node, ast.Name):
        if not isinstance(node.ctx, ast.Store):
            yield node.id
        return
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    inside = {name for child in ast.iter_child_nodes(node) for name in _looked_up(child)}
    if isinstance(node, ast.ClassDef):
        inside -= {n for part in node.body for n in _bound(part)}
    elif isinstance(node, _COMPREHENSION):
        inside -= set(_bound(node))
    yield from inside


def _bound(node: ast.AST) -> Iterator[str]:
    """Yield the names that a piece of code binds where it stands, not inside of a function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0]
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Lambda | _COMPREHENSION):
            yield from _bound(child)
