"""From `script [DATASET] [METHOD] [--options]` to one frozen experiment."""

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

import tyro

from configs.backbones import with_backbone
from configs.earlier import upgraded
from configs.experiment import Experiment
from configs.presets import ANY_MODEL, Catalogue

E = TypeVar("E", bound=Experiment)


def parse(argv: Sequence[str] | None, catalogue: Catalogue[E], *, prog: str, description: str) -> E:
    """Parse a command line; errors end the program with a message and exit code 2.

    The two positional words choose the preset, `--from-run RUN` starts from a run's config.json
    instead, and every other option changes one field of it.

    Args:
        argv: words after the program's name; None for those of this process.
        catalogue: the data sets and methods that can be named.
        prog: the script, for messages.
        description: first line of --help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    datasets, methods = list(catalogue.data_sets), list(catalogue.methods)
    words, run = _take_option(words, "--from-run", prog)
    words, dataset, method = _take_positionals(words, catalogue, prog)
    if run is None:
        default = catalogue.compose(dataset or datasets[0], method or methods[0])
        _, backbone = _take_option(words, "--backbone", prog)
        _, layers = _take_option(words, "--layers", prog)
        if backbone is not None and "backbone" not in catalogue.method(default.method_name).ignored:
            try:
                default = with_backbone(default, backbone, names_layers=layers is not None)
            except ValueError as error:
                _refuse(prog, str(error))
    elif dataset or method:
        _refuse(prog, "--from-run brings its own data set and method; leave the words out")
    else:
        default = _read_config(catalogue, Path(run), prog)
    usage = (
        f"{description}\n\n"
        f"DATASET: {', '.join(datasets)} (default {datasets[0]}). "
        f"METHOD: {', '.join(methods)} (default {methods[0]}). "
        "Defaults below are those of "
        f"{default.dataset} {default.method_name}. --from-run RUN starts from a run's config.json."
    )
    experiment = tyro.cli(
        catalogue.kind,
        default=default,
        args=words,
        prog=f"{prog} [DATASET] [METHOD]",
        description=usage,
        config=(tyro.conf.AvoidSubcommands,),
    )
    try:
        catalogue.check(experiment)
    except ValueError as error:
        _refuse(prog, str(error))
    for option, why in catalogue.idle_options(experiment, default):
        _refuse(prog, f"{option} does nothing {why}; leave it out")
    return experiment


def _take_option(words: list[str], name: str, prog: str) -> tuple[list[str], str | None]:
    """Remove `name VALUE` or `name=VALUE` from the words and return the value."""
    for i, word in enumerate(words):
        if word.startswith(f"{name}="):
            return words[:i] + words[i + 1 :], word.partition("=")[2]
        if word == name:
            if i + 1 == len(words):
                _refuse(prog, f"{name} needs a value")
            return words[:i] + words[i + 2 :], words[i + 1]
    return words, None


def _take_positionals(
    words: list[str], catalogue: Catalogue[E], prog: str
) -> tuple[list[str], str | None, str | None]:
    """Remove the data set's and the method's name, wherever options do not claim them."""
    datasets, methods = list(catalogue.data_sets), list(catalogue.methods)
    types = _types_of_options(catalogue)
    found: list[str] = []
    rest: list[str] = []
    claims = 0.0  # how many of the next words belong to the last option
    for word in words:
        if word.startswith("--"):
            claims = 0 if "=" in word else _arity(word, types)
            rest.append(word)
        elif claims > 0:
            claims -= 1
            rest.append(word)
        elif word.startswith("-"):
            rest.append(word)
        else:
            found.append(word)
    dataset = found[0] if found else None
    if _is_method(dataset, methods) and dataset not in datasets:
        # `train_mvtec.py simplenet`: the data set may be left out.
        found.insert(0, datasets[0])
        dataset = None
    method = found[1] if len(found) > 1 else None
    if dataset is not None and dataset not in datasets:
        _refuse(prog, _unknown("data set", dataset, datasets))
    if method is not None and not _is_method(method, methods):
        _refuse(prog, _unknown("method", method, methods))
    if len(found) > 2:
        _refuse(prog, f"unexpected word {found[2]!r} after data set and method")
    return rest, dataset, method


def _is_method(word: str | None, methods: Sequence[str]) -> bool:
    """Tell whether a word names a method, or a model of a library among them."""
    library, _, model = (word or "").partition(":")
    return word in methods or (bool(model) and f"{library}:{ANY_MODEL}" in methods)


def _types_of_options(catalogue: Catalogue[E]) -> dict[str, Any]:
    """Return the type of each option of the experiment, and of every method and data set."""
    types = dict(get_type_hints(catalogue.kind))
    for prefix, presets in (("method", catalogue.methods), ("data", catalogue.data_sets)):
        for kind in {type(preset.options) for preset in presets.values()}:
            types |= {f"{prefix}.{field}": hint for field, hint in get_type_hints(kind).items()}
    return types


def _arity(option: str, types: Mapping[str, Any]) -> float:
    """Return how many words an option takes: 0 for switches, unbounded for lists."""
    name = option.lstrip("-").replace("-", "_")
    switches = {field for field, hint in types.items() if hint is bool}
    if name in {"", "help", *switches} or re.sub(r"(^|\.)no_", r"\1", name) in switches:
        return 0
    # The word after a misspelt option is its value, so that tyro names the option, not the word.
    return float("inf") if get_origin(types.get(name)) is tuple else 1


def _read_config(catalogue: Catalogue[E], run: Path, prog: str) -> E:
    try:
        values = json.loads((run / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a configuration: no JSON object")
        return catalogue.from_json(upgraded(values))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        _refuse(prog, f"--from-run {run}: config.json: {error}")


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"


def _refuse(prog: str, message: str) -> NoReturn:
    sys.stderr.write(f"error: {prog}: {message}\n")
    raise SystemExit(2)
