"""evaluate.py gives a run's own table again, to the last digit, and says where it cannot."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import evaluate
import train_mnist
import train_mvtec
from tests.datasets.trees import draw_mvtec_category
from utils.metrics.metrics import metric_names
from utils.runs.files import read_rows
from utils.runs.run import Run

IMAGES = (
    *("--backbone", "tf_efficientnet_lite0", "--image-size", "48", "--crop-size", "none"),
    *("--workers", "0", "--overlays", "0"),
)
METHODS = {
    "noco": ("--method.epochs", "3", "--method.learning-rate", "1e-2", "--select", "best_test"),
    "noco_cf": (
        *("--method.time", "10", "100", "--grid", "prototypes=1,2", "--seeds", "0", "1"),
        *("--method.feature-norm", "std"),
    ),
    "knn": ("--method.max-positions", "500"),
    "patchcore": ("--method.coreset-ratio", "0.1"),
    "stpm": ("--method.epochs", "1", "--layers", "1", "2"),
}
DIGITS = (
    *("digits", "noco", "--image-size", "32", "--method.epochs", "1", "--categories", "0", "7"),
    *("--seeds", "0", "1", "--workers", "0", "--overlays", "0"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in ("cloth", "wood"):
        draw_mvtec_category(root, name, num_train=8, num_good=4, num_defective=3)
    return root


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """Method -> run folder, made when asked for."""
    output, made = tmp_path_factory.mktemp("runs"), {}

    def run(method):
        if method not in made:
            arguments = ["folder", method, "--data-root", str(root), "--output", str(output)]
            made[method] = train_mvtec.main([*arguments, *IMAGES, *METHODS[method]])
        return made[method]

    return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return train_mnist.main([*DIGITS, "--output", str(tmp_path_factory.mktemp("digits"))])


def again(folder, *words):
    return evaluate.main([str(folder), "--workers", "0", *map(str, words)])


def assert_equal_table(folder, path):
    recorded, evaluated = read_rows(folder / "results.csv"), read_rows(path)
    assert len(recorded) == len(evaluated)
    for old, new in zip(recorded, evaluated, strict=True):
        assert [old[k] for k in ("category", "seed", "select")] == [
            new[k] for k in ("category", "seed", "select")
        ]
        assert [repr(old[k]) for k in metric_names()] == [repr(new[k]) for k in metric_names()]
        assert (new["metric_difference"], new["score_difference"]) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_structured_runs_are_equal(runs, method, capsys):
    folder = runs(method)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert again(folder) == 0
    rows = read_rows(folder / "results.csv")
    said = capsys.readouterr().out
    assert said.count(":  equal") == len(rows)
    assert "evaluated again" in said
    assert_equal_table(folder, folder / "evaluation.csv")
    if method == "noco":  # last, and best by image and by pixel
        assert {row["select"] for row in rows} == {"last", "best_test"}
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    after.pop(folder / "evaluation.csv")
    before.pop(folder / "evaluation.csv", None)
    assert after == before


def test_semantic_runs_are_equal(digits, tmp_path):
    assert again(digits, "--out", tmp_path / "new/again.csv") == 0
    assert_equal_table(digits, tmp_path / "new/again.csv")
    assert not (digits / "evaluation.csv").exists()


def test_images_may_have_moved(runs, root, tmp_path):
    moved = shutil.copytree(root, tmp_path / "moved")
    folder = runs("knn")
    assert again(folder, "--data-root", moved, "--out", tmp_path / "again.csv") == 0
    assert_equal_table(folder, tmp_path / "again.csv")


def test_differences_are_said(runs, tmp_path, capsys):
    folder = shutil.copytree(runs("knn"), tmp_path / "run")
    path = folder / "heads/wood-seed0.safetensors"
    state, (_, metadata) = load_file(path), Run.read(folder).load_head("wood", 0)
    save_file({name: 2 * tensor for name, tensor in state.items()}, path, metadata=metadata)
    capsys.readouterr()
    assert again(folder) == 1
    said = capsys.readouterr().out
    assert "cloth  seed 0  last:  equal" in said
    assert "wood  seed 0  last:  DIFFERENT, metrics by up to" in said
    row = read_rows(folder / "evaluation.csv")[1]
    saved = Run.read(folder).load_scores("wood", 0)["score"]
    assert row["score_difference"] > 0.01 * np.abs(saved).max()


@pytest.mark.parametrize("what", ["fewer images", "no images", "no config", "pickled scores"])
def test_what_cannot_be_evaluated_ends_with_a_message(runs, root, tmp_path, capsys, what):
    folder = shutil.copytree(runs("knn"), tmp_path / "run")
    (folder / "evaluation.csv").unlink(missing_ok=True)
    data = shutil.copytree(root, tmp_path / "data")
    if what == "fewer images":
        next((data / "wood/test/good").iterdir()).unlink()
    elif what == "no images":
        shutil.rmtree(data)
    elif what == "no config":
        (folder / "config.json").unlink()
    else:
        np.savez(folder / "scores/wood-seed0.npz", label=np.array([{}], dtype=object))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        again(folder, "--data-root", data)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert not (folder / "evaluation.csv").exists()


def test_random_backbones_are_gone(root, tmp_path, capsys):
    words = ("--backbone", "resnet10t", "--weights", "random", "--output", str(tmp_path))
    folder = train_mvtec.main(
        ["folder", "knn", "--data-root", str(root), "--categories", "wood", *IMAGES, *words]
    )
    with pytest.raises(SystemExit) as stop:
        again(folder)
    assert stop.value.code == 2
    assert "its backbone had random weights" in capsys.readouterr().err


def test_unfinished_runs_show_what_there_is(digits, tmp_path, capsys):
    folder = shutil.copytree(digits, tmp_path / "run")
    lines = (folder / "results.csv").read_text().splitlines(keepends=True)
    (folder / "results.csv").write_text("".join(lines[:-1]))
    assert again(folder) == 0
    assert "unfinished" in capsys.readouterr().out
    assert len(read_rows(folder / "evaluation.csv")) == 3
    assert json.loads((folder / "config.json").read_text())["categories"] == ["0", "7"]
