"""Run folders of the first version: its config.json had other words, and it wrote no table.json."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import evaluate
import predict
import train_mnist
import train_mvtec
from figures import compare
from figures.report import page
from pipeline.experiments import SCRIPTS
from tests.datasets.trees import draw_mvtec_category
from utils.runs.rows import read_rows

EARLIER = json.loads((Path(__file__).parents[1] / "configs/earlier.json").read_text())
NOCO = EARLIER["noco"]["method"]
"""Method options of the first version, the same for noco and noco_cf, with their defaults."""
SOLVERS = {"noco": "sgd", "noco_exact": "closed_form"}
NAMED = {"noco": "noco", "noco_exact": "noco_cf"}
QUICK = ("--workers", "0", "--overlays", "1", "--run", "mine")
WORDS = {
    "noco": ("digits", "noco", "--categories", "7", "--image-size", "32", "--method.epochs", "2"),
    "noco_exact": (
        *("folder", "noco_exact", "--backbone", "tf_efficientnet_lite0", "--image-size", "48"),
        *("--method.time", "10", "100", "--grid", "prototypes=1,2"),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "cloth", num_train=10, num_good=4, num_defective=3)
    return root


def train(name, root, output):
    words = [*WORDS[name], *QUICK, "--output", str(output)]
    if name == "noco":
        return train_mnist.main(words)
    return train_mvtec.main([*words, "--data-root", str(root)])


@pytest.fixture(scope="module", params=SOLVERS)
def today(request, root, tmp_path_factory):
    """A run of this version."""
    return train(request.param, root, tmp_path_factory.mktemp("today"))


@pytest.fixture
def earlier(today, tmp_path):
    """The same run as the first version would have written it."""
    folder = shutil.copytree(today, tmp_path / today.parent.name / today.name)
    config = json.loads((folder / "config.json").read_text())
    name = config["method_name"]
    config["method"] = NOCO | config["method"] | {"solver": SOLVERS[name]}
    config["method_name"] = NAMED[name]
    assert config["method"].keys() == NOCO.keys()
    if "protocol" not in config:
        config["visa_split"] = "auto"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "table.json").unlink()
    return folder


def test_it_evaluates(earlier, capsys):
    config = json.loads((earlier / "config.json").read_text())
    for name in {config["method_name"], "noco"}:  # which had the solver closed_form, too
        (earlier / "config.json").write_text(json.dumps(config | {"method_name": name}))
        assert evaluate.main([str(earlier), "--workers", "0"]) == 0
        (row,) = read_rows(earlier / "results.csv")
        assert f"{row['category']}  seed 0  {row['select']}:  equal" in capsys.readouterr().out


def test_it_predicts(earlier, root, tmp_path):
    images = root / "cloth/test"
    assert predict.main([str(earlier), str(images), "--workers", "0", "--out", str(tmp_path)]) == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        found = {row["path"]: float(row["score"]) for row in csv.DictReader(file)}
    assert len(found) == 10
    if earlier.parent.name == "folder-noco_exact":
        with np.load(earlier / "scores/cloth-seed0.npz") as saved:
            expected = dict(zip(saved["path"].tolist(), saved["score"].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


def test_figures_see_the_same_run(earlier, today, tmp_path):
    tables = {}
    for name, run in (("earlier", earlier), ("today", today)):
        files = compare.main([str(run), "--out", str(tmp_path / name / "figure.png")])
        assert all(path.stat().st_size for path in files)
        tables[name] = (tmp_path / name / "figure.csv").read_text()
    assert tables["earlier"] == tables["today"]
    # Side by side nothing tells them apart, least of all options that one has not.
    (runs,) = compare.read_runs_by_data([earlier, today]).values()
    labels = [run.label for run in runs]
    assert labels == [today.parent.name.partition("-")[2]] * 2


def test_the_report_has_a_table(earlier):
    path = page.main([str(earlier)])
    assert path == earlier / "report.html"
    (row,) = read_rows(earlier / "results.csv")
    text = path.read_text()
    assert "What is finished" in text
    assert f"{100 * row['image_auroc']:.1f}" in text


def test_the_same_command_continues_it(earlier, root, capsys):
    before = (earlier / "results.csv").read_bytes()
    name = earlier.parent.name.partition("-")[2]
    assert train(name, root, earlier.parents[1]) == earlier
    assert (earlier / "results.csv").read_bytes() == before
    assert (earlier / "table.json").is_file()


def test_a_run_starts_from_it(earlier, today):
    script = "train_mnist" if today.parent.name == "digits-noco" else "train_mvtec"
    experiment = SCRIPTS[script].parse(["--from-run", str(earlier)])
    assert experiment.to_json() == json.loads((today / "config.json").read_text())
