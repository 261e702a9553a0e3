"""A run folder made by someone else is data: a bad one gives an error that names it, never code."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train_mvtec
from figures import compare, loss_curve
from figures.compare import lines_of, read_runs_by_data
from figures.shared.run_log import read_runs
from pipeline.experiments import structured_catalogue
from tests.scripts.runs import refusal
from utils.errors import RunError
from utils.runs.run import Run
from utils.runs.scores import TestScores

CONFIG = structured_catalogue().compose("folder", "noco").to_json()
METRICS = {"image_auroc": 0.9, "pixel_auroc": 0.8, "aupro": 0.7}
ROW = {"category": "wood", "seed": 0, "select": "last", **METRICS, "fit_seconds": 1.5}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """The file that a payload would make; nothing may have made it."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload does not work"
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture
def folder(tmp_path):
    """A small whole run."""
    folder = tmp_path / "run"
    run = open_run(folder)
    for step in (1, 2):
        run.log("wood", 0, event="step", step=step, loss=1.0 / step, image_auroc=0.5)
    scores = TestScores(
        paths=["a", "b"], labels=[0, 1], scores=[0.1, 0.9], defects=["good", "hole"]
    )
    run.save_scores("wood", 0, scores)
    run.save_head("wood", 0, {"r": torch.ones(3)}, {"category": "wood"})
    run.finish({("wood", 0): [ROW]})
    return folder


def read_all(folder):
    """All readers of a run folder."""
    run = Run.read(folder)
    run.rows()
    run.load_scores("wood", 0)
    run.load_head("wood", 0)
    (logged,) = read_runs([folder])
    assert logged.title
    for name in ("loss", "image_auroc"):
        logged.curves(name)
        logged.selection_curves(name)
    ((name, (logged,)),) = read_runs_by_data([folder]).items()
    lines_of(logged, name)


def open_run(folder):
    return Run.open(
        folder, CONFIG, categories=["wood"], seeds=[0], command=["train_mvtec.py"], device="cpu"
    )


def assert_refused(folder, name, capsys):
    with pytest.raises(RunError) as caught:
        read_all(folder)
    assert str(folder / name) in str(caught.value)
    for figure in (compare, loss_curve):
        try:
            figure.main([str(folder), "--out", str(folder.parent / "figure.png")])
        except SystemExit as exit_:
            assert exit_.code == 2  # noqa: PT017  (a figure that needs less may be drawn)
            message = capsys.readouterr().err
            assert message.startswith("error: ")
            assert str(folder) in message


def test_the_whole_run_is_read(folder):
    read_all(folder)
    assert open_run(folder).pending("wood") == []


NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000
DEEP = '{"a":' * 600 + "1" + "}" * 600
CONFIGS = {
    "no JSON": "import os",
    "no object": "[1]",
    "null": "null",
    "nested": NESTED,
    "deep": DEEP,
    "huge number": '{"seed": ' + "9" * 10_000 + "}",
    "no method": json.dumps({"dataset": "folder"}),
    "no data set": json.dumps({"method_name": "noco"}),
    "method is no text": json.dumps(CONFIG | {"method_name": ["noco"]}),
    "data set is no text": json.dumps(CONFIG | {"dataset": {"a": 1}}),
    "bytes": b"\xff\xfe\x00",
    "pickle": pickle.dumps({"dataset": "folder"}),
    "empty": "",
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_config(folder, content, capsys):
    write(folder / "config.json", content)
    assert_refused(folder, "config.json", capsys)
    with pytest.raises(RunError, match=str(folder)):
        open_run(folder)
    assert str(folder) in refusal(capsys, train_mvtec.main, "--from-run", folder)


FOREIGN = {
    "unknown field": {"command": "rm -rf /"},
    "where to write": {"output": "/etc"},
    "name of the run": {"run": "../../elsewhere"},
    "deletes": {"restart": True},
    "no path": {"data_root": 5},
    "wrong type": {"image_size": "big"},
    "number as text": {"blur_sigma": "4"},
    "huge": {"image_size": -(10**30)},
    "nan": {"blur_sigma": float("nan")},
    "unknown data set": {"dataset": "../../x"},
    "unknown method": {"method_name": "os.system"},
    "nested": {"method": {"epochs": {"a": [1]}}},
    "options are a list": {"method": [1, 2]},
    "option nobody has": {"method": {"__class__": "x"}},
    "options of its data are text": {"data": "csv"},
    "option its data have not": {"data": {"split": "csv"}},
    "layers are text": {"layers": "23"},
    "seeds are text": {"seeds": ["0"]},
    "categories are numbers": {"categories": [1]},
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_from_run_takes_no_foreign_config(folder, change, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    before = sorted(tmp_path.rglob("*"))
    message = refusal(capsys, train_mvtec.main, "--from-run", folder)
    assert message.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


HEADER = ",".join(ROW)
RESULTS = {
    "formula": f"{HEADER}\nwood,0,last,=cmd(),0.8,0.7,1.5\n",
    "text": f"{HEADER}\nwood,0,last,high,0.8,0.7,1.5\n",
    "no columns": "category,seed,select\nwood,0,last\n",
    "huge integer": f"{HEADER}\nwood,0,last,{'9' * 5000},0.8,0.7,1.5\n",
    "huge seed": f"{HEADER}\nwood,{'9' * 5000},last,0.9,0.8,0.7,1.5\n",
    "huge field": f"{HEADER}\n{'x' * 200_000},0,last,0.9,0.8,0.7,1.5\n",
    "garbage": "\x00\x01\x02",
    "pickle": pickle.dumps(ROW) + b"\n",
    "empty": "",
    "blank": "\n",
}


def records(**changes):
    record = {"category": "wood", "seed": 0, "event": "step", "step": 1, "loss": 0.5} | changes
    return json.dumps(record) + "\n"


LOGS = {
    "no JSON": "hello\n{}\n",
    "no object": "[1]\n",
    "no category": '{"event": "step"}\n',
    "category is a list": records(category=["wood"]),
    "seed is text": records(seed="0"),
    "step is text": records(step="one"),
    "loss is text": records(loss="=cmd()"),
    "loss is a list": records(loss=[1]),
    "options are a list": records(event="chosen", options=[1]),
    "options are missing": records(event="chosen"),
    "nested": NESTED + "\n{}\n",
}


@pytest.mark.parametrize(
    ("name", "content"),
    [("results.csv", x) for x in RESULTS.values()] + [("metrics.jsonl", x) for x in LOGS.values()],
    ids=[*RESULTS, *LOGS],
)
def test_results_and_metrics(folder, name, content, capsys):
    write(folder / name, content)
    assert_refused(folder, name, capsys)


def zipped(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def bad_heads(marker):
    """name -> content of files in a head's place."""
    torch_file = io.BytesIO()
    torch.save({"r": Payload(marker)}, torch_file)
    entry = {"r": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    return {
        "pickle": pickle.dumps(Payload(marker)),
        "torch.save": torch_file.getvalue(),
        "zip": zipped("data.pkl", pickle.dumps(Payload(marker))),
        "garbage": bytes(range(256)),
        "empty": b"",
        "huge header": struct.pack("<Q", 2**62) + b"{}",
        "header beyond the end": struct.pack("<Q", 5000) + b"{}",
        "huge tensor": with_header(entry),
        "unknown type": with_header({"r": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}),
        "offsets outside": with_header(
            {"r": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}
        ),
        "nested header": struct.pack("<Q", len(NESTED)) + NESTED.encode(),
    }


def with_header(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


def test_every_cut_of_a_head_is_refused(folder):
    path = Run.read(folder).head_path("wood", 0)
    content = path.read_bytes()
    for stop in range(len(content)):
        path.write_bytes(content[:stop])
        with pytest.raises(RunError, match="corrupt"):
            Run.read(folder).load_head("wood", 0)


def bad_scores(marker):
    """name -> content of files in the place of scores."""
    objects, single = io.BytesIO(), io.BytesIO()
    payload = np.array([Payload(marker)], dtype=object)
    np.savez(objects, path=payload, label=[0], score=[0.5], defect=["good"])
    np.save(single, np.ones(3))
    claim = io.BytesIO()
    claimed = {"descr": "<f8", "fortran_order": False, "shape": (2**50,)}
    np.lib.format.write_array_header_1_0(claim, claimed)
    text = b"{'descr': __import__('pathlib').Path('executed').touch(), 'shape': (1,)}"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    return {
        "object arrays": objects.getvalue(),
        "pickle": pickle.dumps(Payload(marker)),
        "one array": single.getvalue(),
        "huge shape": zipped("score.npy", claim.getvalue()),
        "code in a header": zipped("score.npy", header),
        "garbage": bytes(range(256)),
        "empty": b"",
    }


@pytest.mark.parametrize(
    ("bad", "name"), [(bad, name) for bad in (bad_heads, bad_scores) for name in bad(Path("x"))]
)
def test_heads_and_scores(folder, marker, bad, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = Run.read(folder)
    path = run.head_path("wood", 0) if bad is bad_heads else run.scores_path("wood", 0)
    path.write_bytes(bad(marker)[name])
    with pytest.raises(RunError, match="corrupt") as caught:
        read_all(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "results.csv", "metrics.jsonl", "scores", "heads"])
def test_links_and_folders_in_place_of_files(folder, name):
    """Not even a folder where a file should be ends in a traceback of the script."""
    path = folder / name
    path.rename(folder / "away")
    path.mkdir() if "." in name else path.write_text("")
    with pytest.raises((RunError, OSError), match=str(folder)):
        read_all(folder)
