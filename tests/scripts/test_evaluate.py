"""Methods find plain defects, and evaluate.py gives their tables again, to the last digit."""

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import evaluate
from tests.datasets.trees import draw_mvtec_category
from tests.scripts.runs import refusal, train
from utils.metrics.metrics import metric_names
from utils.runs.rows import read_rows
from utils.runs.run import Run

METHODS = {
    "noco": (
        *("--method.epochs", "3", "--method.learning-rate", "1e-2", "--method.batch-size", "4"),
        *("--select", "best_test"),
    ),
    "noco_exact": (
        *("--method.time", "10", "100", "--grid", "prototypes=1,2", "--seeds", "0", "1"),
        *("--method.feature-norm", "std"),
    ),
    "knn": ("--method.max-positions", "500"),
    "patchcore": ("--method.coreset-ratio", "0.5", "--save-maps"),
    "padim": ("--method.dims", "20"),
    "mahalanobis": ("--method.feature-norm", "l2_per_layer"),
    "stpm": (
        *("--method.epochs", "12", "--method.batch-size", "4", "--image-size", "96"),
        *("--categories", "cloth"),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in ("cloth", "wood"):
        draw_mvtec_category(root, name, num_train=12, num_good=6, num_defective=5)
    return root


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """Method -> run folder, made when asked for."""
    output, made = tmp_path_factory.mktemp("runs"), {}

    def run(method):
        if method not in made:
            made[method] = train(root, output, method, *METHODS[method])
        return made[method]

    return run


def words_of(folder, *words):
    return [str(folder), "--workers", "0", *map(str, words)]


def again(folder, *words):
    return evaluate.main(words_of(folder, *words))


def assert_equal_table(folder, path):
    recorded, evaluated = read_rows(folder / "results.csv"), read_rows(path)
    measured = [name for name in metric_names() if name in recorded[0]]
    assert len(measured) >= 7
    compared = ("category", "seed", "select", *measured)
    assert [[repr(row[name]) for name in compared] for row in recorded] == [
        [repr(row[name]) for name in compared] for row in evaluated
    ]
    assert {(row["metric_difference"], row["score_difference"]) for row in evaluated} == {(0, 0)}


@pytest.mark.parametrize("method", METHODS)
def test_visible_defects_are_found(runs, method):
    for row in read_rows(runs(method) / "results.csv"):
        assert row["image_auroc"] > 0.9
        assert row["pixel_auroc"] > 0.9
        assert row["score_seconds"] > 0
        assert row["extract_seconds"] >= row["pass_test_seconds"] > 0
        head = runs(method) / f"heads/{row['category']}-seed{row['seed']}.safetensors"
        assert head.stat().st_size >= row["head_bytes"] > 0


def test_image_score_of_the_method_is_the_one_recorded(runs):
    """PatchCore's own score is not the maximum of its map."""
    with np.load(runs("patchcore") / "scores/cloth-seed0.npz") as stored:
        ratio = stored["score"] / stored["map"].max(axis=(1, 2))
    assert ratio.std() > 0.01


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
    del after[folder / "evaluation.csv"]
    before.pop(folder / "evaluation.csv", None)
    assert after == before


def test_semantic_runs_are_equal(digits, tmp_path):
    assert again(digits, "--out", tmp_path / "new/again.csv") == 0
    assert_equal_table(digits, tmp_path / "new/again.csv")
    assert not (digits / "evaluation.csv").exists()


def test_images_may_have_moved(runs, root, tmp_path):
    moved = shutil.copytree(root, tmp_path / "moved")
    assert again(runs("knn"), "--data-root", moved, "--out", tmp_path / "again.csv") == 0
    assert_equal_table(runs("knn"), tmp_path / "again.csv")


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


def test_other_images_and_broken_runs_are_refused(runs, root, tmp_path, capsys):
    folder, data = shutil.copytree(runs("knn"), tmp_path / "run"), tmp_path / "data"
    shutil.copytree(root, data)
    next((data / "wood/test/good").iterdir()).unlink()
    words = words_of(folder, "--data-root", data, "--out", tmp_path / "again.csv")
    assert "1 file gone from test/good" in refusal(capsys, evaluate.main, *words)
    shutil.rmtree(folder / "data")  # as an earlier version left it
    message = "error: wood: the test set has 15 images and the run's scores are of 16"
    assert message in refusal(capsys, evaluate.main, *words)
    np.savez(folder / "scores/cloth-seed0.npz", label=np.array([{}], dtype=object))
    assert "cloth-seed0.npz: corrupt" in refusal(capsys, evaluate.main, *words)
    shutil.rmtree(data)
    assert f"error: data root {data} does not exist" in refusal(capsys, evaluate.main, *words)
    assert not (tmp_path / "again.csv").exists()


def test_random_backbones_are_gone(root, tmp_path, capsys):
    words = ("--backbone", "resnet10t", "--weights", "random", "--categories", "wood")
    folder = train(root, tmp_path, "knn", *words)
    for text in (
        capsys.readouterr().out,
        *((folder / f"table.{k}").read_text() for k in ("md", "tex")),
    ):
        assert "RANDOM BACKBONE WEIGHTS" in text
    message = refusal(capsys, evaluate.main, *words_of(folder))
    assert "its backbone had random weights" in message


def test_unfinished_runs_show_what_there_is(digits, tmp_path, capsys):
    folder = shutil.copytree(digits, tmp_path / "run")
    lines = (folder / "results.csv").read_text().splitlines(keepends=True)
    (folder / "results.csv").write_text("".join(lines[:-1]))
    assert again(folder) == 0
    assert "unfinished" in capsys.readouterr().out
    assert len(read_rows(folder / "evaluation.csv")) == 3
