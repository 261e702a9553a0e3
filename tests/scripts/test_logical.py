"""MVTec LOCO through the scripts: kinds of anomalies, sPRO, scales and maps of two branches."""

import numpy as np
import pytest

import evaluate
import export
import train_mvtec
from tests.datasets.trees import draw_btad_category, draw_loco_category
from tests.scripts.runs import IMAGES, measured, refusal
from utils.runs.rows import read_rows
from utils.runs.scores import read_scores

ULSAD = (
    *("--method.epochs", "3", "--method.batch-size", "4", "--method.bottleneck", "2"),
    *("--layers", "2", "3"),
)


@pytest.fixture(scope="module")
def loco(tmp_path_factory):
    root = tmp_path_factory.mktemp("loco")
    draw_loco_category(root)
    return root


def trained(root, output, method, *options, data="mvtec_loco", category="juice_bottle"):
    paths = ("--data-root", str(root), "--output", str(output), "--categories", category)
    return train_mvtec.main([data, method, *paths, *IMAGES, *options])


@pytest.fixture(scope="module")
def ulsad(loco, tmp_path_factory):
    options = (*ULSAD, "--save-maps", "--overlays", "2")
    return trained(loco, tmp_path_factory.mktemp("runs"), "ulsad", *options)


def test_kinds_and_spro_are_measured_shown_and_evaluated_again(loco, tmp_path, capsys):
    folder = trained(loco, tmp_path, "noco_cf")
    (row,) = measured(folder)
    for name in ("image_auroc_logical", "image_auroc_structural", "spro", "spro_0.3"):
        assert 0 <= row[name] <= 1
    both = row["image_auroc_logical"] + row["image_auroc_structural"]
    assert row["image_auroc_mean"] == pytest.approx(both / 2)
    assert row["spro"] > 0.5  # the drawn defects are easy
    table = (folder / "table.md").read_text()
    for heading in ("logical AUROC", "structural AUROC", "mean of both", "sPRO 0.05"):
        assert heading in table
    assert "sPRO 0.3" not in table
    assert evaluate.main([str(folder)]) == 0
    assert "sPRO" in capsys.readouterr().out
    (again,) = read_rows(folder / "evaluation.csv")
    assert again["spro_0.1"] == row["spro_0.1"]


def test_other_data_have_none_of_these_columns(tmp_path):
    draw_btad_category(tmp_path / "btad", "02")
    folder = trained(tmp_path / "btad", tmp_path, "knn", data="btad", category="02")
    (row,) = measured(folder)
    assert not any(name.startswith(("spro", "image_auroc_")) for name in row)
    assert row["aupro"] > 0.5


def test_ulsad_keeps_and_shows_both_maps(ulsad):
    arrays = read_scores(ulsad / "scores/juice_bottle-seed0.npz")
    mean = (arrays["map_local"] + arrays["map_global"]) / 2
    np.testing.assert_allclose(arrays["map"], mean, rtol=1e-4, atol=1e-5)
    assert not np.allclose(arrays["map_local"], arrays["map_global"])
    assert (ulsad / "overlays/juice_bottle-seed0/samples.png").is_file()


def test_scales_are_those_of_the_validation_images(loco, ulsad, tmp_path):
    """Which the data set keeps for them: all training images are trained on."""
    (row,) = measured(ulsad)
    assert row["num_train"] == 6
    options = (*ULSAD, "--save-maps", "--overlays", "2")
    none = trained(loco, tmp_path, "ulsad", *options, "--method.quantiles", "none")
    raw = read_scores(none / "scores/juice_bottle-seed0.npz")
    scaled = read_scores(ulsad / "scores/juice_bottle-seed0.npz")
    for name in ("map_local", "map_global"):
        # The same networks: maps differ by an offset and a factor.
        fit = np.polyfit(raw[name].ravel(), scaled[name].ravel(), 1)
        line = np.polyval(fit, raw[name].ravel())
        np.testing.assert_allclose(line, scaled[name].ravel(), atol=1e-3)
        assert abs(fit[0] - 1) > 1e-3


def test_ulsad_is_evaluated_again_and_exported(ulsad, capsys):
    assert evaluate.main([str(ulsad)]) == 0
    capsys.readouterr()
    pytest.importorskip("onnxruntime")
    export.main([str(ulsad)])
    assert list((ulsad / "export").glob("*.onnx"))


def test_the_released_evaluation_says_what_it_looks_at(loco, tmp_path):
    """Best epoch, scales and number of images, all from the test set, each in the caption."""
    folder = trained(loco, tmp_path, "ulsad_released", *ULSAD, "--test-batches", "3")
    rows = measured(folder)
    assert {row["select"] for row in rows} == {"last", "best_test"}
    assert all(row["num_test"] == 6 for row in rows)  # of 7
    table = (folder / "table.md").read_text()
    assert "OPTIMISTIC: scales set on normal test images" in table
    assert "NOT ALL TEST IMAGES: batches of 3, the last left out" in table
    assert "best on test (optimistic)" in table
    assert evaluate.main([str(folder)]) == 0


def test_what_does_nothing_or_cannot_be_is_refused(loco, tmp_path, capsys):
    words = ["mvtec_loco", "knn", "--data-root", loco, "--output", tmp_path, *IMAGES]
    words += ["--categories", "juice_bottle"]
    message = refusal(capsys, train_mvtec.main, *words, "--scale-on", "test")
    assert "--scale-on" in message
    message = refusal(capsys, train_mvtec.main, *words, "--test-batches", "32")
    assert "7 test images, which fill no batch of 32" in message
    words[1] = "ulsad"
    message = refusal(capsys, train_mvtec.main, *words)
    assert "at least 256 pixels; these have 64" in message
    assert "--method.bottleneck 2" in message
