"""export.py on tiny runs: the file agrees with the run, and works where this suite is not."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
from configs.prediction import ExportOptions
from datasets.reading.images import read_image
from datasets.reading.transforms import PairTransform
from models.deployment import formats
from models.deployment.formats import ONNX_PACKAGES, example_program
from models.errors import ModelError
from pipeline import exporting
from pipeline.finished import load_run
from tests.scripts.runs import refusal
from utils.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
HAS_ONNX = all(importlib.util.find_spec(name) is not None for name in ONNX_PACKAGES)
needs_onnx = pytest.mark.skipif(
    not HAS_ONNX, reason="onnx, onnxruntime, onnxscript: pip install -r requirements-export.txt"
)


@pytest.fixture(scope="module")
def onnx_file(calibrated, tmp_path_factory):
    """Of a run whose images are not upright squares, in a folder with a space."""
    return export.main([str(calibrated), "--out", str(tmp_path_factory.mktemp("a b") / "m.onnx")])


@pytest.fixture(scope="module")
def torchscript_file(calibrated):
    return export.main([str(calibrated), "--format", "torchscript"])


def scored(run, category="cloth"):
    """The run's test images (N, 3, S, S) and what the suite makes of them."""
    finished = load_run(run, device="cpu")
    paths = finished.run.load_scores(category, 0)["path"]
    images = np.stack([finished.transform.image(read_image(Path(path))) for path in paths])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return images, finished.score(finished.detector(category, 0), images)


def about(path):
    return json.loads(path.with_name(f"{path.name}.json").read_text())


def refused(capsys, *words):
    return refusal(capsys, export.main, *words)


def run_program(program, folder, image):
    """Run it where this repository cannot be imported, and return the score it prints."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    command = [sys.executable, "program.py", str(image)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@needs_onnx
def test_onnx_scores_batches_of_any_size_as_the_run_does(calibrated, onnx_file):
    import onnxruntime

    images, wanted = scored(calibrated)
    session = onnxruntime.InferenceSession(onnx_file)
    assert [entry.name for entry in session.get_outputs()] == ["scores", "maps"]
    for size in (1, 3, 8):
        parts = [session.run(None, {"images": b.numpy()}) for b in images.split(size)]
        scores, maps = (np.concatenate(part) for part in zip(*parts, strict=True))
        np.testing.assert_allclose(scores, wanted.images, rtol=1e-4)
        assert maps.shape == (len(images), 32, 32)
        np.testing.assert_allclose(maps, wanted.maps, atol=1e-3 * float(wanted.maps.max()))


@needs_onnx
def test_what_the_file_and_its_json_say(calibrated, onnx_file):
    import onnx

    said = about(onnx_file)
    assert (said["category"], said["seed"], said["method"]) == ("cloth", 0, "noco_cf")
    assert said["input"]["resize"] == "lanczos_shorter"
    assert (said["input"]["image_size"], said["input"]["crop_size"]) == (48, 32)
    finished = load_run(calibrated, device="cpu")
    stored = json.loads((calibrated / "calibration" / "cloth-seed0.json").read_text())
    assert said["decision"]["thresholds"] == {"0.1": max(stored["scores"])}
    assert said["decision"]["calibration_images"] == 10
    checked = said["checked"]
    assert checked["batch_sizes"] == [1, 3, 8]
    test = finished.run.load_scores("cloth", 0)["score"]
    assert checked["images"] == len(test)
    assert checked["scores"]["range"] == pytest.approx(float(np.ptp(test)))
    for name in ("scores", "maps"):
        assert checked[name]["share_of_range"] < 1e-4
    assert checked["scores"]["largest_difference_to_scores_in_run_folder"] < 1e-3
    inside = {prop.key: prop.value for prop in onnx.load(onnx_file).metadata_props}
    assert inside["category"] == "cloth"
    assert json.loads(inside["checked"]) == checked
    assert said["versions"]["opset"] == "18"


@needs_onnx
def test_the_program_of_the_json_runs_without_the_suite(calibrated, onnx_file):
    """The image is no square and is cropped: the program has to do what training did."""
    _, wanted = scored(calibrated)
    path = load_run(calibrated, device="cpu").run.load_scores("cloth", 0)["path"][-1]
    found = run_program(about(onnx_file)["example"], onnx_file.parent, path)
    assert found == pytest.approx(float(wanted.images[-1]), rel=1e-4)


def test_torchscript_scores_batches_of_any_size_as_the_run_does(calibrated, torchscript_file):
    images, wanted = scored(calibrated)
    assert torchscript_file == calibrated / "export" / "cloth-seed0.pt"
    files = {"description.json": ""}
    module = torch.jit.load(torchscript_file, _extra_files=files)
    assert json.loads(files["description.json"]) == about(torchscript_file)
    for size in (1, 3, 8):
        parts = [module(batch) for batch in images.split(size)]
        scores, maps = (torch.cat(part) for part in zip(*parts, strict=True))
        assert not scores.requires_grad
        torch.testing.assert_close(scores, wanted.images, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(maps, wanted.maps, rtol=1e-4, atol=1e-5)


def test_the_torchscript_program_prints_the_score(
    calibrated, torchscript_file, capsys, monkeypatch
):
    _, wanted = scored(calibrated)
    path = load_run(calibrated, device="cpu").run.load_scores("cloth", 0)["path"][0]
    monkeypatch.chdir(torchscript_file.parent)
    monkeypatch.setattr(sys, "argv", ["program.py", str(path)])
    capsys.readouterr()
    exec(about(torchscript_file)["example"], {})
    assert float(capsys.readouterr().out) == pytest.approx(float(wanted.images[0]), rel=1e-4)


def test_a_semantic_run_has_scores_alone_and_is_checked_on_its_own_array(digits, tmp_path, capsys):
    words = (digits, "--format", "torchscript", "--seed", "1", "--out", tmp_path / "1.pt")
    assert "several heads: choose one by --category (0, 1)" in refused(capsys, *words)
    path = export.main([*map(str, words), "--category", "1"])
    said = about(path)
    assert said["output"].keys() == {"scores"}
    assert said["checked"]["images"] == exporting.CHECKED
    assert said["checked"]["scores"]["largest_difference_to_scores_in_run_folder"] < 1e-2
    (scores,) = torch.jit.load(path)(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
    assert scores.shape == (5,)
    assert "16 images in batches of 1, 3, 8: scores differ by at most" in capsys.readouterr().out


def test_a_file_that_disagrees_is_not_written(calibrated, torchscript_file, capsys, monkeypatch):
    before = torchscript_file.read_bytes()
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    error = refused(capsys, calibrated, "--format", "torchscript")
    assert "nothing was written: scores differ from the suite's by up to" in error
    assert torchscript_file.read_bytes() == before
    assert not list(calibrated.glob("export/.*"))


def test_a_difference_that_is_not_a_number_is_one(calibrated):
    images, wanted = scored(calibrated)
    expected = {"scores": wanted.images.clone(), "maps": wanted.maps}
    expected["scores"][0] = torch.nan
    same = formats.Exported(lambda batch: (batch[:, 0, 0, 0].float(), batch[:, 0]), print, {})
    with pytest.raises(UsageError, match="scores differ from the suite's by up to nan"):
        exporting.check(same, images, expected, wanted.images.numpy(), (1, 3, 8))


def test_a_run_in_half_precision_is_exported_in_float32(calibrated, tmp_path, capsys):
    copy = shutil.copytree(calibrated, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text()) | {"precision": "bf16"}
    (copy / "config.json").write_text(json.dumps(config))
    said = about(export.main([str(copy), "--format", "torchscript"]))
    assert "computed in bf16; the file computes in float32" in capsys.readouterr().err
    assert (said["precision"], said["precision_of_run"]) == ("fp32", "bf16")


def test_images_that_are_gone_have_to_be_given(calibrated, root, tmp_path, capsys):
    moved = root.rename(tmp_path / "moved")
    try:
        error = refused(capsys, calibrated, "--format", "torchscript")
        assert "test images cannot be read" in error
        assert "pass others, --images FOLDER" in error
        out = tmp_path / "here.pt"
        given = ["--images", str(moved / "cloth" / "test" / "good"), "--out", str(out)]
        export.main([str(calibrated), "--format", "torchscript", *given])
        checked = about(out)["checked"]
        assert checked["images"] == 6
        assert "largest_difference_to_scores_in_run_folder" not in checked["scores"]
    finally:
        moved.rename(root)


def test_missing_packages_are_named_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda _: None)
    error = refused(capsys, tmp_path / "no run")
    assert "pip install -r requirements-export.txt" in error
    assert "not a run folder" in refused(capsys, tmp_path, "--format", "torchscript")


class Branching(torch.nn.Module):
    """What no graph can hold: the path depends on a value."""

    def forward(self, images):
        return (images.float() if images.sum() > 3 else images.double(),)


@needs_onnx
def test_a_network_that_no_graph_can_hold_is_refused_in_one_message():
    example = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"cannot write this network as ONNX \(.*--format torchs"):
        formats.to_onnx(Branching().eval(), example, ["scores"], 18)


@needs_onnx
def test_weights_beyond_the_formats_limit_are_refused(monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", 10)
    with pytest.raises(ModelError, match="one ONNX file holds 2"):
        formats.to_onnx(torch.nn.Linear(3, 3), torch.zeros(2, 3), ["scores"], 18)


def test_old_operator_sets_are_refused(calibrated, capsys):
    assert "--opset 17: PyTorch writes 18 or newer" in refused(capsys, calibrated, "--opset", "17")
    with pytest.raises(ValueError, match="18 or newer"):
        ExportOptions(run=calibrated, opset=9)


def test_the_program_in_the_docstring_is_the_one_written():
    program = example_program(
        "tile-seed0.onnx",
        "onnx",
        ("scores", "maps"),
        image_size=224,
        crop_size=None,
        resize="opencv_square",
        bit_depth=16,
    )
    assert textwrap.indent(program, "    ") in export.__doc__


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (64, 64)])
@pytest.mark.parametrize("resize", ["opencv_square", "lanczos_shorter", "bilinear_shorter"])
@pytest.mark.parametrize("crop_size", [None, 33])
def test_programs_resize_as_training_does(size, resize, crop_size, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    program = example_program(
        "m.pt", "torchscript", ("scores",), image_size=48, crop_size=crop_size, resize=resize,
        bit_depth=16,
    )  # fmt: skip
    lines = program.splitlines()
    until_batch = "\n".join(lines[: next(i for i, s in enumerate(lines) if s.startswith("batch"))])
    names = {}
    monkeypatch.setattr(sys, "argv", ["program.py", str(tmp_path / "image.png")])
    exec(until_batch, names)
    wanted = PairTransform(48, crop_size, resize).image(pixels)
    np.testing.assert_array_equal(names["image"], wanted)
