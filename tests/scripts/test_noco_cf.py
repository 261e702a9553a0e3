"""The closed form through the scripts: selection without test images, online learning, digits."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import train_mnist
from tests.datasets.trees import draw_mvtec_category
from train_mvtec import main
from utils.runs.files import read_rows

IMAGES = (
    *("--backbone", "tf_efficientnet_lite0", "--image-size", "64", "--crop-size", "none"),
    *("--workers", "0", "--overlays", "0"),
)
DIGITS = ("digits", "noco_cf", "--categories", "0", "7", "--overlays", "0", "--workers", "0")


def lines_of(folder, event):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def measured(row):
    return {name: value for name, value in row.items() if not name.endswith("_seconds")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "cloth", num_train=10, num_good=6, num_defective=4)
    return root


def train(root, output, *options, method="noco_cf", select="last"):
    arguments = ["folder", method, "--data-root", str(root), "--output", str(output), *IMAGES]
    return main([*arguments, "--select", select, *options])


def test_selection_on_pasted_defects(root, tmp_path):
    options = ("--method.prototypes", "2", "--method.time", "10", "100", "1000")
    selecting = (*options, "--grid", "prototypes=1,2")
    folder = train(root, tmp_path, *selecting, select="synthetic")
    (row,) = read_rows(folder / "results.csv")
    assert row["select"] == "synthetic"
    assert row["image_auroc"] > 0.9
    assert row["pixel_auroc"] > 0.9
    assert row["trainable"] == 0
    assert row["num_train"] == 10  # refitted on all normals

    curve = lines_of(folder, "selection")
    assert [(line["options"]["prototypes"], line["time"]) for line in curve] == [
        (prototypes, time) for prototypes in (1, 2) for time in (10, 100, 1000)
    ]
    assert not any(key.startswith("test_") for line in curve for key in line)
    best = max(curve, key=lambda line: (line["synthetic_auroc"], line["synthetic_image_auroc"]))
    (chosen,) = lines_of(folder, "chosen")
    assert chosen["options"] == {**best["options"], "time": [best["time"]]}
    assert chosen["synthetic_auroc"] == best["synthetic_auroc"]
    named = f"prototypes={best['options']['prototypes']} time={best['time']:g}"
    assert row["chosen"] == named
    (step,) = lines_of(folder, "step")
    assert step["time"] == best["time"]

    # Watching the test set chooses nothing and changes no number.
    watching = (*selecting, "--monitor-test")
    watched = train(root, tmp_path / "watched", *watching, select="synthetic")
    (again,) = read_rows(watched / "results.csv")
    assert measured(again) == measured(row)
    assert all("test_image_auroc" in line for line in lines_of(watched, "selection"))

    # The chosen options alone give the same numbers.
    plain = train(
        root,
        tmp_path / "plain",
        *("--method.prototypes", str(best["options"]["prototypes"])),
        *("--method.time", str(best["time"])),
    )
    (alone,) = read_rows(plain / "results.csv")
    assert alone["image_auroc"] == pytest.approx(row["image_auroc"], abs=1e-6)
    assert alone["pixel_auroc"] == pytest.approx(row["pixel_auroc"], abs=1e-4)


def test_online_curve_ends_at_the_result(root, tmp_path):
    options = ("--method.prototypes", "1", "--method.time", "1000", "--online")
    folder = train(root, tmp_path, *options)
    (row,) = read_rows(folder / "results.csv")
    (path,) = (folder / "online").glob("*.csv")
    with path.open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert [line["num_images"] for line in curve] == ["1", "2", "5", "10"]
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert float(curve[-1][name]) == pytest.approx(row[name], abs=1e-4)
    assert np.array(Image.open(path.with_suffix(".png"))).std() > 0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("noco", ("--method.epochs", "1")),
        ("noco_cf", ()),
        ("noco_cf", ("--method.prototypes", "1", "--method.feature-norm", "std")),
    ],
)
def test_what_cannot_learn_online_ends_with_a_message(root, tmp_path, capsys, method, options):
    with pytest.raises(SystemExit) as stop:
        train(root, tmp_path, *options, "--online", method=method)
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"--online: {method} with these options does not learn from one image at a" in error
    assert "noco_cf does, with --method.prototypes 1 and a --method.feature-norm that is" in error


@pytest.mark.parametrize(
    ("select", "options", "message"),
    [
        ("last", ("--grid", "prototypes=1,2"), "--select synthetic"),
        ("synthetic", ("--grid", "prototypes=x"), "prototypes=x"),
        ("last", ("--method.time", "100", "10"), "ascending"),
    ],
)
def test_bad_options_are_refused(root, tmp_path, capsys, select, options, message):
    with pytest.raises(SystemExit) as stop:
        train(root, tmp_path, *options, select=select)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_single_training_image_fits_but_cannot_select(tmp_path, capsys):
    draw_mvtec_category(tmp_path / "data", "cloth", num_train=1, num_good=3)
    folder = train(tmp_path / "data", tmp_path, "--method.prototypes", "1", "--save-maps")
    (row,) = read_rows(folder / "results.csv")
    assert 0 <= row["image_auroc"] <= 1
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "data", tmp_path, "--method.prototypes", "1", select="synthetic")
    assert stop.value.code == 2
    assert "at least two normal training images" in capsys.readouterr().err


def test_digits(tmp_path):
    folder = train_mnist.main([*DIGITS, "--output", str(tmp_path)])
    rows = read_rows(folder / "results.csv")
    assert len(rows) == 2
    assert all(row["image_auroc"] > 0.9 for row in rows)
    config = json.loads((folder / "config.json").read_text())
    assert config["method"]["feature_norm"] == "l2"
    assert config["method_name"] == "noco_cf"


def test_rotated_digits_are_no_anomalies(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_mnist.main([*DIGITS, "--output", str(tmp_path), "--select", "synthetic"])
    assert stop.value.code == 2
    assert "a turned digit is no anomaly" in " ".join(capsys.readouterr().err.split())
