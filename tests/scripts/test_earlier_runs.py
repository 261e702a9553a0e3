"""Run folders of the first version: its config.json had other words, and it wrote no table.json."""

import csv
import json
import shutil

import numpy as np
import pytest

import evaluate
import predict
import train_mnist
import train_mvtec
from datasets.sets.visa import VisaOptions
from figures import compare
from figures.report import page
from pipeline.experiments import SCRIPTS, structured_catalogue
from tests.datasets.trees import draw_mvtec_category
from utils.runs.files import read_rows

NOCO = {
    "feature_norm": "none",
    "solver": "sgd",
    "norm": 1.0,
    "objective": "randn",
    "out_dim": None,
    "loss": "distance",
    "nu": 1e-3,
    "radius_init": 1e-5,
    "radius_weight": 0.0,
    "learning_rate": 1e-4,
    "weight_decay": 5e-4,
    "amsgrad": True,
    "batch_size": 16,
    "epochs": 50,
    "time": [1e4],
    "prototypes": 1,
    "nearest": 3,
    "kmeans_positions": 20_000,
    "sample_w0": False,
}
"""Method options of the first version, the same for noco and noco_cf, with their defaults."""
SOLVERS = {"noco": "sgd", "noco_cf": "closed_form"}
QUICK = ("--workers", "0", "--overlays", "1", "--run", "mine")
WORDS = {
    "noco": ("digits", "noco", "--categories", "7", "--image-size", "32", "--method.epochs", "2"),
    "noco_cf": (
        *("folder", "noco_cf", "--backbone", "tf_efficientnet_lite0", "--image-size", "48"),
        *("--method.time", "10", "100", "--grid", "prototypes=1,2"),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "cloth", num_train=10, num_good=4, num_defective=3)
    return root


@pytest.fixture(scope="module", params=SOLVERS)
def today(request, root, tmp_path_factory):
    """A run of this version."""
    words = [*WORDS[request.param], *QUICK, "--output", str(tmp_path_factory.mktemp("today"))]
    if request.param == "noco":
        return train_mnist.main(words)
    return train_mvtec.main([*words, "--data-root", str(root)])


@pytest.fixture
def earlier(today, tmp_path):
    """The same run as the first version would have written it."""
    folder = shutil.copytree(today, tmp_path / today.parent.name / today.name)
    config = json.loads((folder / "config.json").read_text())
    name = config["method_name"]
    config["method"] = NOCO | config["method"] | {"solver": SOLVERS[name]}
    assert config["method"].keys() == NOCO.keys()
    if "protocol" not in config:
        config["visa_split"] = "auto"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "table.json").unlink()
    return folder


def test_it_evaluates(earlier, capsys):
    config = json.loads((earlier / "config.json").read_text())
    # The method noco had the solver closed_form, too.
    for name in dict.fromkeys([config["method_name"], "noco"]):
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
    if earlier.parent.name == "folder-noco_cf":
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
    labels = [run.label for run in compare.read_runs_by_data([earlier, today])]
    assert labels == [today.parent.name.partition("-")[2]] * 2


def test_the_report_has_a_table(earlier):
    path = page.main([str(earlier)])
    assert path == earlier / "report.html"
    (row,) = read_rows(earlier / "results.csv")
    text = path.read_text()
    assert "What is finished" in text
    assert f"{100 * row['image_auroc']:.1f}" in text


def test_the_same_command_continues_it(earlier, root, capsys):
    name = earlier.parent.name.partition("-")[2]
    words = [*WORDS[name], *QUICK, "--output", str(earlier.parents[1])]
    script = train_mnist if name == "noco" else train_mvtec
    words += [] if name == "noco" else ["--data-root", str(root)]
    before = (earlier / "results.csv").read_bytes()
    assert script.main(words) == earlier
    assert (earlier / "results.csv").read_bytes() == before
    assert (earlier / "table.json").is_file()


def test_a_run_starts_from_it(earlier, today):
    script = "train_mnist" if today.parent.name == "digits-noco" else "train_mvtec"
    experiment = SCRIPTS[script].parse(["--from-run", str(earlier)])
    assert experiment.to_json() == json.loads((today / "config.json").read_text())


def test_the_split_of_visa_is_an_option_of_its_data(tmp_path):
    config = structured_catalogue().compose("visa", "knn").to_json()
    for split in ("csv", "last100", "auto"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"visa_split": split}))
        experiment = SCRIPTS["train_mvtec"].parse(["--from-run", str(tmp_path)])
        assert experiment.data == VisaOptions(split=split)
