import itertools
import json
import math
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.errors import RunError
from utils.runs import environment
from utils.runs import run as runs
from utils.runs.files import file_stem
from utils.runs.rows import read_rows, write_rows
from utils.runs.run import Run
from utils.runs.scores import TestScores

ROOT = Path(__file__).parents[3]
CONFIG = {"dataset": "mvtec", "method": {"name": "noco", "norm": 1.0}, "layers": [1, 2]}
CATEGORIES = ("bottle", "cable")
SEEDS = (0, 1)


def open_run(folder, config=CONFIG, categories=CATEGORIES, seeds=SEEDS, **options):
    return Run.open(
        folder,
        config,
        categories=categories,
        seeds=seeds,
        command=["train_mvtec.py", "mvtec", "a b"],
        device="cpu",
        **options,
    )


@pytest.fixture
def run(tmp_path):
    return open_run(tmp_path)


def scores_of(**changes):
    fields = {"paths": ["a.png"], "labels": [0], "scores": [0.1], "defects": ["good"]}
    return TestScores(**fields | changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def row(category, seed, select="last", image_auroc=0.5, **extra):
    key = {"category": category, "seed": seed, "select": select}
    return {**key, "image_auroc": image_auroc, **extra}


def metric_lines(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_new_run_records_config_and_environment(tmp_path):
    run = open_run(tmp_path / "mvtec-noco" / "main")
    assert json.loads((run.folder / "config.json").read_text()) == CONFIG
    record = json.loads((run.folder / "environment.json").read_text())
    assert record["command"] == "train_mvtec.py mvtec 'a b'"
    assert set(record["versions"]) == {"python", "torch", "torchvision", "timm", "numpy"}
    assert record["device"] == "cpu"
    assert record["cpu_count"] >= 1
    assert record["threads"] == torch.get_num_threads()
    assert record["started"].endswith("+00:00")
    assert run.rows() == []
    assert run.pending("bottle") == [0, 1]


def test_continues_after_the_last_finished_pair(tmp_path, run):
    run.finish({("bottle", 0): [row("bottle", 0)]})
    again = open_run(tmp_path)
    assert again.pending("bottle") == [1]
    assert again.pending("cable") == [0, 1]
    record = json.loads((tmp_path / "environment.json").read_text())
    assert len(record["continued"]) == 1


def test_scores_and_head_without_rows_leave_a_pair_unfinished(tmp_path, run):
    run.save_scores("bottle", 0, scores_of())
    run.save_head("bottle", 0, {"r": torch.zeros(1)}, {})
    assert open_run(tmp_path).pending("bottle") == [0, 1]


def test_finished_run_opened_again_leaves_every_file_alone(tmp_path):
    run = open_run(tmp_path, categories=("bottle",), seeds=(0,))
    run.log("bottle", 0, loss=1.0)
    run.finish({("bottle", 0): [row("bottle", 0)]})
    before = contents(tmp_path)
    assert open_run(tmp_path, categories=("bottle",), seeds=(0,)).pending("bottle") == []
    assert contents(tmp_path) == before


def test_another_config_is_refused_by_key_and_nothing_is_lost(tmp_path, run):
    run.log("bottle", 0, loss=1.0)
    run.finish({("bottle", 0): [row("bottle", 0)]})
    before = contents(tmp_path)
    other = {"dataset": "mvtec", "method": {"name": "noco", "norm": 8.0}, "precision": "fp32"}
    with pytest.raises(RunError) as caught:
        open_run(tmp_path, config=other)
    _, *differences, ways_out = str(caught.value).splitlines()
    assert [line.strip() for line in differences] == [
        "method.norm: 1.0 there, 8.0 now",
        "layers: [1, 2] there, absent now",
        'precision: absent there, "fp32" now',
    ]
    assert "--run" in ways_out
    assert "--restart" in ways_out
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("there", "now", "same"),
    [
        (1, 1, True),
        (1, 1.0, False),
        (1, True, False),
        (math.nan, math.nan, True),
        ((1,), [1], True),
        (Path("data"), "data", True),
    ],
)
def test_config_values_are_the_same_when_they_print_the_same(tmp_path, there, now, same):
    open_run(tmp_path, config={"x": there})
    if same:
        open_run(tmp_path, config={"x": now})
    else:
        with pytest.raises(RunError, match="another configuration"):
            open_run(tmp_path, config={"x": now})


def test_restart_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    run = open_run(tmp_path, categories=("a/b",), seeds=(0,))
    run.log("a/b", 0, loss=1.0)
    run.save_scores("a/b", 0, scores_of())
    run.save_head("a/b", 0, {"r": torch.zeros(1)}, {}, suffix="-last")
    run.finish({("a/b", 0): [row("a/b", 0)]})
    overlays, stem = run.overlays_folder("a/b", 0), file_stem("a/b", 0)
    tables = [f"table.{suffix}" for suffix in ("md", "tex", "csv", "json")]
    online = [f"online/{stem}.csv", f"online/{stem}.png", f"data/{stem}.json"]
    for name in (
        f"overlays/{stem}/samples.png",
        f"calibration/{stem}.json",
        *tables,
        *online,
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    mine = ["notes.txt", "table.txt", "scores/mine.npz", "heads/x-seed0.pt", "overlays/x/y.png"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    again = open_run(tmp_path, config={"other": 1}, categories=("a/b",), seeds=(0,), restart=True)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("[!.]*") if p.is_file()}
    assert left == {*mine, "config.json", "environment.json"}
    assert again.pending("a/b") == [0]
    assert not overlays.exists()
    assert not (tmp_path / "online").exists()


def test_restart_keeps_what_the_user_put_beside_the_online_curves(tmp_path):
    open_run(tmp_path)
    (tmp_path / "online").mkdir()
    for name in ("bottle-seed0.csv", "notes.txt", ".bottle-seed1.csv.0123abcd.tmp"):
        (tmp_path / "online" / name).write_text("")
    open_run(tmp_path, restart=True)
    assert [path.name for path in (tmp_path / "online").iterdir()] == ["notes.txt"]


def test_kill_leftovers(tmp_path, run):
    """A temporary file, a cut line and lines of an unfinished pair disappear; all else stays."""
    run.log("bottle", 0, epoch=1, loss=0.25)
    run.finish({("bottle", 0): [row("bottle", 0)]})
    run.log("bottle", 1, epoch=1, loss=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"category": "bottle", "seed": 0, "lo')
    (tmp_path / "scores").mkdir()
    leftovers = [".results.csv.0123abcd.tmp", "scores/.bottle-seed1.npz.0123abcd.tmp"]
    for name in [*leftovers, ".mine.tmp"]:
        (tmp_path / name).write_text("half")
    again = open_run(tmp_path)
    assert metric_lines(again) == [{"category": "bottle", "seed": 0, "epoch": 1, "loss": 0.25}]
    assert not any((tmp_path / name).exists() for name in leftovers)
    assert (tmp_path / ".mine.tmp").exists()
    again.log("bottle", 1, epoch=1)
    assert len(metric_lines(again)) == 2


def test_process_killed_while_writing_leaves_the_old_file(tmp_path, run):
    run.finish({("bottle", 0): [row("bottle", 0, image_auroc=0.75)]})
    code = f"""
        import os
        from pathlib import Path
        from utils.runs.files import atomic_path
        with atomic_path(Path({str(tmp_path)!r}) / "results.csv") as temporary:
            temporary.write_text("category,seed,sel")
            os._exit(9)
    """
    root = Path(runs.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root).returncode == 9
    assert len(list(tmp_path.glob(".results.csv.*.tmp"))) == 1
    assert open_run(tmp_path).rows() == [row("bottle", 0, image_auroc=0.75)]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_reader_of_the_old_file_never_sees_a_mixture(tmp_path, run):
    run.finish({("bottle", 0): [row("bottle", 0)]})
    old = (tmp_path / "results.csv").read_text()
    with (tmp_path / "results.csv").open() as file:
        run.finish({("bottle", 1): [row("bottle", 1)]})
        assert file.read() == old
    assert len(run.rows()) == 2


def test_failed_write_leaves_the_old_file_and_no_leftover(run):
    path = run.save_head("bottle", 0, {"r": torch.ones(2)}, {})
    with pytest.raises(TypeError):
        run.save_head("bottle", 0, {"r": torch.zeros(2)}, {"epoch": 3})  # metadata is text
    state, _ = run.load_head("bottle", 0)
    assert torch.equal(state["r"], torch.ones(2))
    assert [entry.name for entry in path.parent.iterdir()] == ["bottle-seed0.safetensors"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"dataset": '),
        ("config.json", "[]"),
        ("environment.json", "{"),
        ("results.csv", ""),
        ("results.csv", "category,seed,select,image_auroc\nbottle,0,last,0.98"),
        ("results.csv", "category,seed,select,image_auroc\nbottle,0,last\n"),
        ("results.csv", "category,seed,select,image_auroc\nbottle,zero,last,0.5\n"),
        ("results.csv", "category,seed,select,image_auroc\nbottle,0,lst,0.5\n"),
        ("results.csv", 'category,seed,select,image_auroc\n"bottle,0,last,0.5\n'),
        ("results.csv", "category,image_auroc\nbottle,0.5\n"),
        ("results.csv", "category,seed,select\n" + "bottle,0,last\n" * 2),
        ("metrics.jsonl", 'half a line\n{"category": "bottle", "seed": 0}\n'),
    ],
)
def test_corrupt_file_is_named(tmp_path, name, content):
    open_run(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match="corrupt") as caught:
        open_run(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    open_run(tmp_path, restart=True)


def test_results_without_a_config_are_refused(tmp_path):
    open_run(tmp_path).finish({("bottle", 0): [row("bottle", 0)]})
    (tmp_path / "config.json").unlink()
    with pytest.raises(RunError, match=r"config\.json is missing"):
        open_run(tmp_path)


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        open_run(tmp_path / "file")


def test_rows_keep_the_requested_order(run):
    for category, seed in [("cable", 1), ("bottle", 1), ("cable", 0), ("bottle", 0)]:
        selects = ("last", "best_test")
        run.finish({(category, seed): [row(category, seed, select) for select in selects]})
    order = [(entry["category"], entry["seed"], entry["select"]) for entry in run.rows()]
    assert order == [(c, s, x) for c in CATEGORIES for s in SEEDS for x in ("last", "best_test")]


def test_pairs_of_an_earlier_request_stay_after_the_others(tmp_path):
    open_run(tmp_path, seeds=(0,)).finish({("bottle", 0): [row("bottle", 0)]})
    run = open_run(tmp_path, seeds=(1,))
    run.finish({("cable", 1): [row("cable", 1)]})
    pairs = [(entry["category"], entry["seed"]) for entry in run.rows()]
    assert pairs == [("cable", 1), ("bottle", 0)]


LETTERS = st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    st.lists(
        st.tuples(st.floats(allow_nan=True, allow_infinity=True), st.integers(), st.text(LETTERS))
    )
)
def test_values_read_back_to_the_bit(tmp_path, values):
    path = tmp_path / "results.csv"
    rows = []
    for seed, (number, count, text) in enumerate(values):
        rows.append(row(text, seed, image_auroc=number, num_test=count, note=f"x{text}"))
    columns = ["category", "seed", "select", "image_auroc", "num_test", "note"]
    write_rows(path, columns, rows)
    read = read_rows(path)
    assert len(read) == len(rows)
    for old, new in zip(rows, read, strict=True):
        assert math.isnan(old["image_auroc"]) == math.isnan(new["image_auroc"])
        if not math.isnan(old["image_auroc"]):
            bits = [struct.pack("<d", entry["image_auroc"]) for entry in (old, new)]
            assert bits[0] == bits[1]
        assert type(new["num_test"]) is int
        for name in ("category", "seed", "select", "num_test", "note"):
            assert new[name] == old[name]


def test_numpy_numbers_and_number_like_categories(tmp_path):
    run = open_run(tmp_path, categories=("3",), seeds=(0,))
    value = np.float32(0.1)
    run.finish(
        {("3", 0): [row("3", 0, image_auroc=value, num_test=np.int64(7), pixel_auroc=math.nan)]}
    )
    (read,) = run.rows()
    assert read["category"] == "3"
    assert read["image_auroc"] == float(value)
    assert read["num_test"] == 7
    assert math.isnan(read["pixel_auroc"])


@pytest.mark.parametrize("value", [True, None, torch.tensor(1.0), [1]])
def test_values_a_csv_cannot_hold_are_refused(run, value):
    with pytest.raises(TypeError, match="epoch"):
        run.finish({("bottle", 0): [row("bottle", 0, epoch=value)]})
    assert run.rows() == []


@pytest.mark.parametrize("text", ["1", "-3", "0.5", "1e-3", "nan", "inf", "-inf", "a\rb"])
def test_text_that_would_read_back_as_something_else_is_refused(run, text):
    with pytest.raises(ValueError, match="remark"):
        run.finish({("bottle", 0): [row("bottle", 0, remark=text)]})


def test_finish_refuses_what_is_not_one_row_per_select_of_the_pair(run):
    for rows in (
        [],
        [row("bottle", 0), row("bottle", 0)],
        [row("bottle", 0, "first")],
        [row("bottle", 1)],
        [row("cable", 0)],
    ):
        with pytest.raises(ValueError, match="bottle"):
            run.finish({("bottle", 0): rows})
    run.finish({("bottle", 0): [row("bottle", 0)]})
    with pytest.raises(ValueError, match="finished already"):
        run.finish({("bottle", 0): [row("bottle", 0)]})
    with pytest.raises(RunError, match="aupro"):
        run.finish({("bottle", 1): [row("bottle", 1, aupro=0.5)]})
    with pytest.raises(ValueError, match="not requested"):
        run.finish({("grid", 0): [row("grid", 0)]})


def test_log_writes_nan_as_null(run):
    run.log("bottle", 0, loss=math.nan, r=np.float32("nan"), high=math.inf, low=-math.inf)
    run.log(
        "bottle", 0, empty_masks=["ü/1.png"], nested={"loss": [math.nan]}, n=np.int64(3), ok=True
    )
    key = {"category": "bottle", "seed": 0}
    assert metric_lines(run) == [
        {**key, "loss": None, "r": None, "high": "inf", "low": "-inf"},
        {**key, "empty_masks": ["ü/1.png"], "nested": {"loss": [None]}, "n": 3, "ok": True},
    ]


def test_scores_come_back(tmp_path, run):
    scores = torch.tensor([1e-6, 1e6], dtype=torch.float64)
    maps = torch.rand(2, 3, 4, requires_grad=True)
    given_ = {"paths": [tmp_path / "ü.png", "b/c.png"], "labels": [0, 1], "defects": ["good", "裂"]}
    run.save_scores("bottle", 0, scores_of(scores=scores, maps=maps, **given_))
    run.save_scores("bottle", 0, scores_of(scores=scores.float(), **given_), suffix="-last")
    read = run.load_scores("bottle", 0)
    assert read["path"].tolist() == [str(tmp_path / "ü.png"), "b/c.png"]
    assert read["label"].tolist() == [0, 1]
    assert read["defect"].tolist() == ["good", "裂"]
    assert read["score"].dtype == np.float64
    assert read["score"].tolist() == scores.tolist()
    assert np.array_equal(read["map"], maps.detach().numpy())
    last = Run.read(tmp_path).load_scores("bottle", 0, "-last")
    assert last["score"].dtype == np.float32
    assert "map" not in last


def test_scores_without_the_optional_arrays_are_read(run):
    path = run.save_scores("bottle", 0, scores_of(norms=[1.0], angles=[0.1]))
    assert {"norm", "angle"} < set(run.load_scores("bottle", 0))
    np.savez_compressed(path, path=["a.png"], label=[1], score=[0.5], defect=["hole"])
    assert set(run.load_scores("bottle", 0)) == {"path", "label", "score", "defect"}


def test_scores_of_unequal_length_are_refused(run):
    with pytest.raises(ValueError, match="lengths differ"):
        run.save_scores("bottle", 0, scores_of(labels=[0, 1]))


def test_head_comes_back(tmp_path, run):
    weight = torch.randn(3, 4, dtype=torch.float16)
    state = {"weight": weight.T, "shared": weight, "r": torch.tensor(1e-5, requires_grad=True)}
    run.save_head("bottle", 0, state, {"backbone": "lite0"}, suffix="-pixel")
    read, metadata = Run.read(tmp_path).load_head("bottle", 0, "-pixel")
    assert metadata == {"backbone": "lite0"}
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())


def test_missing_and_corrupt_artefacts_are_named(run):
    for path_of, load in ((run.head_path, run.load_head), (run.scores_path, run.load_scores)):
        with pytest.raises(RunError, match="bottle"):
            load("bottle", 0)
        path = path_of("bottle", 0)
        path.parent.mkdir()
        path.write_bytes(b"half")
        with pytest.raises(RunError, match="corrupt"):
            load("bottle", 0)


def test_reading_never_writes(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        Run.read(tmp_path)
    open_run(tmp_path).finish({("bottle", 0): [row("bottle", 0)]})
    run = Run.read(tmp_path)
    assert run.config == CONFIG
    assert run.rows() == [row("bottle", 0)]
    for write in (
        lambda: run.log("bottle", 0, loss=1.0),
        lambda: run.finish({("bottle", 1): [row("bottle", 1)]}),
        lambda: run.save_head("bottle", 0, {}, {}),
    ):
        with pytest.raises(ValueError, match="not requested"):
            write()


ODD_NAMES = [
    "a/b", "a b", "a_b", "a\\b", "..", ".", "", "~", "a~b", "grün", "裂纹" * 60, "x" * 300, "-x",
    "a\nb", "con", "%2F", "a-seed0", "a", "A", "\udcff",
]  # fmt: skip


def test_file_names_are_safe_distinct_and_plain_where_they_can_be(tmp_path):
    stems = [file_stem(*key) for key in itertools.product(ODD_NAMES, (-1, 0, 10), ("", "-last"))]
    assert len(set(stems)) == len(stems)
    for stem in stems:
        (tmp_path / f".{stem}.safetensors.0123abcd.tmp").write_text("")
        path = tmp_path / f"{stem}.safetensors"
        path.write_text("")
        assert path.parent == tmp_path
        assert not stem.startswith(".")
    assert file_stem("metal_nut", 0) == "metal_nut-seed0"
    with pytest.raises(ValueError, match="suffix"):
        file_stem("a", 0, "last")


@pytest.mark.parametrize("category", [name for name in ODD_NAMES[:-1] if len(name) < 99])
def test_odd_category_goes_all_the_way(tmp_path, category):
    run = open_run(tmp_path, categories=(category, "cable"), seeds=(0,))
    run.log(category, 0, loss=1.0)
    run.save_scores(category, 0, scores_of(scores=[0.5]))
    run.save_head(category, 0, {"r": torch.ones(1)}, {})
    run.finish({(category, 0): [row(category, 0)]})
    again = open_run(tmp_path, categories=(category, "cable"), seeds=(0,))
    assert again.pending(category) == []
    assert again.rows() == [row(category, 0)]
    assert metric_lines(again)[0]["category"] == category
    assert again.load_scores(category, 0)["score"].tolist() == [0.5]
    open_run(tmp_path, restart=True)
    assert not (tmp_path / "scores").exists()


def test_a_category_that_is_no_utf8_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(RunError, match="is no UTF-8"):
        open_run(tmp_path, categories=("cable", ODD_NAMES[-1]))
    assert not list(tmp_path.iterdir())


HOLD = """
import sys
from pathlib import Path
from utils.runs.lock import lock_run
lock = lock_run(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_works_on_is_refused_until_that_ends(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"another process works .*process {process.pid} on"):
            open_run(tmp_path)
        process.kill()
    first = open_run(tmp_path)
    assert open_run(tmp_path).folder == first.folder  # this process may take it again


def test_category_with_a_carriage_return_is_refused_before_any_work(tmp_path):
    with pytest.raises(RunError, match="rename"):
        open_run(tmp_path, categories=("a\rb",))


def test_repeated_categories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        open_run(tmp_path, categories=("a", "a"))


def test_another_commit_is_reported_when_finished_pairs_are_kept(tmp_path, monkeypatch, capsys):
    def at(commit):
        record = {"commit": commit, "dirty": False}
        monkeypatch.setattr(runs, "environment_record", lambda *_: dict(record))
        return open_run(tmp_path)

    at("a" * 40)
    at("b" * 40)
    assert capsys.readouterr().err == ""  # nothing finished: nothing is mixed
    at("b" * 40).finish({("bottle", 0): [row("bottle", 0)]})
    capsys.readouterr()
    at("c" * 40)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert all(10 * commit in warning for commit in "abc")
    at(None)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_and_dirty_flag(tmp_path):
    def git(*arguments):
        names = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(
            ["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True
        )

    assert environment._git_state(tmp_path) == (None, None)
    git("init")
    assert environment._git_state(tmp_path) == (None, None)  # no commit yet
    (tmp_path / "inner").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = environment._git_state(tmp_path)
    assert len(commit) == 40
    assert not dirty
    (tmp_path / "file").write_text("2")
    assert environment._git_state(tmp_path) == (commit, True)
    assert environment._git_state(tmp_path / "inner") == (None, None)


def test_a_gpu_is_described_by_what_its_numbers_depend_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(environment, "_driver", lambda: "570.86")
    found = environment.environment_record(["train"], "cuda:0")
    assert (found["device_name"], found["capability"], found["driver"]) == (
        *("Some Card", "9.0", "570.86"),
    )
    assert found["fp32_products"] in {"none", "ieee", "tf32"}  # none: of PyTorch
    assert found["fp32_convolutions"] in {"none", "ieee", "tf32"}
    assert "cuda" not in environment.environment_record(["train"], "cpu")


def test_a_machine_without_nvidia_smi_has_no_driver(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment._driver() is None


def test_rows_of_an_earlier_version_get_the_columns_that_came_later(tmp_path):
    run = open_run(tmp_path / "run")
    first, second, third, _ = itertools.product(CATEGORIES, SEEDS)
    run.finish({first: [row(*first, image_ap=0.25)]})
    run.finish({second: [row(*second, peak_bytes=7, image_ap=0.5)]})
    earlier, later = run.rows()
    assert list(earlier)[3:] == list(later)[3:] == ["image_auroc", "image_ap", "peak_bytes"]
    assert math.isnan(earlier["peak_bytes"])
    assert (earlier["image_ap"], later["peak_bytes"]) == (0.25, 7)
    run.finish({third: [row(*third, image_ap=0.5)]})  # merged from a run of an earlier version
    assert sum(math.isnan(one["peak_bytes"]) for one in run.rows()) == 2
