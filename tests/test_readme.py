"""Every command that the pages and the scripts' docstrings show is one that parses."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import discover
from configs.sweep import sweep_options
from pipeline.experiments import SCRIPTS, Script

ROOT = Path(__file__).parents[1]
FRONT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
README = "\n".join([FRONT, *PAGES.values()])
GUIDE = (ROOT / "REPRODUCE.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(?:bash|sh|shell|console)\s*\n(.*?)^```", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def commands(block):
    """Words of each line of a shell block: comments, prompts and environment variables dropped."""
    joined = re.sub(r"\\\n\s*", " ", block)
    for line in joined.splitlines():
        for part in re.split(r"&&|;", line.removeprefix("$ ")):
            words = shlex.split(part, comments=True)
            while words and ASSIGNMENT.fullmatch(words[0]):
                words = words[1:]
            if words:
                yield words


def fenced(text):
    """Words of each command in the shell fences of a text."""
    return [words for block in FENCE.findall(text) for words in commands(block)]


def in_docstrings():
    """Words of each `python train_*.py` line in the docstring of a script."""
    found = []
    for script in sorted(ROOT.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        lines = [line for line in docstring.splitlines() if line.startswith("    python ")]
        found += commands("\n".join(line.strip() for line in lines))
    return found


def is_python(words):
    return re.search(r"(^|/)python[0-9.]*$", words[0]) is not None


def of_scripts(found):
    """Arguments of the `python train_*.py` commands, without anything behind a pipe."""
    for words in found:
        if is_python(words) and words[1:]:
            script = re.fullmatch(r"(train_\w+)\.py", words[1])
            if script:
                ends = [i for i, word in enumerate(words) if word in {"|", ">", "2>&1", "&"}]
                yield script[1], words[2 : ends[0] if ends else None]


def with_runs(name, arguments, tmp_path):
    """The arguments with an existing run in place of the one that --from-run names."""
    if "--from-run" not in arguments:
        return arguments
    place = arguments.index("--from-run") + 1
    dataset = {"train_mvtec": "mvtec", "train_cifar10": "cifar10", "train_mnist": "mnist"}[name]
    experiment = SCRIPTS[name].catalogue().compose(dataset, "noco")
    (tmp_path / "config.json").write_text(json.dumps(experiment.to_json()))
    return [*arguments[:place], str(tmp_path), *arguments[place + 1 :]]


class Parsed(Exception):  # noqa: N818  it ends a script that has parsed its command line
    pass


@pytest.fixture
def parse_only(monkeypatch, tmp_path):
    """Run a script up to the end of its parsing and return the experiment."""

    def run(name, arguments):
        found, parse = [], Script.parse

        def stop(script, words):
            found.append((script.name, parse(script, words)))
            raise Parsed

        monkeypatch.setattr(Script, "parse", stop)
        with pytest.raises(Parsed):
            importlib.import_module(name).main(with_runs(name, arguments, tmp_path))
        ((parsed_by, experiment),) = found
        assert parsed_by == name
        return experiment

    return run


def as_test(command):
    name, arguments = command
    return shlex.join([f"{name}.py", *arguments])


SHOWN = {
    as_test(command): command
    for command in of_scripts([*fenced(README), *in_docstrings(), *fenced(GUIDE)])
}


@pytest.mark.parametrize("command", SHOWN.values(), ids=SHOWN)
def test_command_parses(command, parse_only):
    assert parse_only(*command).dataset


def test_commands_of_each_script_are_shown():
    for found in (fenced(README), in_docstrings()):
        assert {name for name, _ in of_scripts(found)} == SCRIPTS.keys()


def test_a_wrong_command_would_be_found(parse_only):
    (command,) = of_scripts(
        commands("$ NOCO_CACHE=x python train_mvtec.py \\\n  visa --epochz 3  # no")
    )
    assert command == ("train_mvtec", ["visa", "--epochz", "3"])
    with pytest.raises(SystemExit):
        parse_only(*command)


DISCOVERIES = {
    shlex.join(words[1:]): words[2:]
    for words in [*fenced(README), *fenced(GUIDE), *in_docstrings()]
    if words[:2] == ["python", "discover.py"]
}


@pytest.mark.parametrize("words", DISCOVERIES.values(), ids=DISCOVERIES)
def test_command_of_discover_parses(words, monkeypatch):
    def stop(device):
        raise Parsed

    monkeypatch.setattr(discover, "require_device", stop)
    with pytest.raises(Parsed):
        discover.main(words)


def test_commands_of_discover_are_shown():
    assert {"--assign", "--maps", "anomalyncd"} <= {
        w for words in DISCOVERIES.values() for w in words
    }


MADE = {
    target
    for words in fenced(README)
    if words[0] == "make"
    for target in words[1:]
    if "=" not in target and not target.startswith("-")
}


def test_readme_sets_up_by_make():
    assert {"demo", "test"} <= MADE


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", sorted(MADE))
def test_make_target_exists(target):
    command = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_and_files_that_the_readme_runs_and_links_exist():
    for words in filter(is_python, fenced(README)):
        if words[1:2] == ["-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
        elif words[1:] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words
    for folder, text in [(ROOT, FRONT), *((path.parent, text) for path, text in PAGES.items())]:
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if not re.match(r"[a-z]+:", link):
                assert (folder / link).exists(), link


def test_the_front_page_is_short_and_names_every_other_page():
    assert len(FRONT.splitlines()) < 250
    for path in PAGES:
        assert f"](docs/{path.name})" in FRONT, path.name


FIGURES = [words[2:] for words in fenced(GUIDE) if words[1:2] == ["-m"]]


@pytest.mark.parametrize("words", FIGURES, ids=" ".join)
def test_figure_command_of_the_guide_parses(words, capsys, tmp_path, monkeypatch):
    """It gets as far as the run folders, which are not there; usage errors come before."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        importlib.import_module(words[0]).main(words[1:])
    message = capsys.readouterr().err
    assert "not a run folder" in message
    assert "usage" not in message


def test_the_guide_names_every_table_and_no_other_command():
    found = {words[0] for words in FIGURES}
    assert found >= {f"figures.{n}" for n in ("table2", "table3", "simplenet_tables", "figure1")}
    for words in fenced(GUIDE):
        if words[1:2] == ["sweep.py"]:
            assert sweep_options(words[2:])[0].datasets
        else:
            script = words[1] if words[0] == "python" else ""
            is_known = script == "-m" or re.fullmatch(r"(train_\w+|discover)\.py", script)
            assert words[0] == "make" or is_known, words
