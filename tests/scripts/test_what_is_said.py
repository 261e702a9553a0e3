"""What a table must not keep silent about: unused images, leaks, lacking masks, unused bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import export
import predict
import train_mvtec
from figures import loss_curve
from tests.datasets.trees import draw_mvtec_category
from tests.scripts.runs import measured, refusal, train, words_of

ROOT = Path(__file__).parents[2]
SMALL = ("--image-size", "48")


@pytest.fixture
def part(tmp_path):
    return draw_mvtec_category(
        tmp_path / "data", "part", num_train=24, num_good=4, num_defective=3, size=(96, 80)
    )


def run(part, *options):
    return train(part.parent, part.parents[1], "knn", *SMALL, *options)


def events(folder, name):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def note(folder):
    return " ".join((folder / "table.md").read_text(encoding="utf-8").split())


def test_unused_images_stand_under_the_table_and_in_the_log(part, capsys):
    (part / "train/good/day2").mkdir()
    for number in range(2):
        (part / f"train/good/00{number}.png").rename(part / f"train/good/day2/00{number}.png")
    folder = run(part)
    line = "part: train on 22, test on 4 good, 3 hole, 3 scratch; not used: 2 images in"
    assert line in " ".join(capsys.readouterr().out.split())
    assert "part: 2 images in train/good/day2" in note(folder)
    (data,) = events(folder, "data")
    assert data["unused"] == [str(part / f"train/good/day2/00{n}.png") for n in range(2)]


def test_copies_of_training_images_in_the_test_set_are_leaks(part):
    assert "LEAKS" not in note(run(part, "--run", "clean"))
    image = Image.open(part / "train/good/002.png")
    Image.fromarray((np.asarray(image) * 0.8).astype(np.uint8)).save(part / "test/good/again.png")
    folder = run(part, "--run", "leaking", "--overlays", "2")
    assert "LEAKS, near-duplicate images: part: 1 of 11 test images has a twin" in note(folder)
    (found,) = events(folder, "twins")
    ((test, training, correlation),) = found["pairs"]
    assert (Path(test).name, Path(training).name) == ("again.png", "002.png")
    assert correlation > 0.96
    assert (folder / "overlays/part-seed0/twins.png").is_file()


def test_images_without_a_mask_are_left_out_of_pixel_metrics_alone(part):
    (whole,) = measured(run(part))
    (part / "ground_truth/hole/000_mask.png").unlink()
    folder = run(part, "--data.partial-masks")
    (row,) = measured(folder)
    assert row["image_auroc"] == whole["image_auroc"]
    assert row["without_mask"] == 1
    assert "1 anomalous test images have no mask" in note(folder)
    # As if the image were not there.
    (part / "test/hole/000.png").unlink()
    left = run(part, "--run", "left")
    (without,) = measured(left)
    assert [row[name] for name in row if name.startswith(("pixel_a", "aupro"))] == [
        without[name] for name in row if name.startswith(("pixel_a", "aupro"))
    ]
    assert evaluate.main([str(left), "--device", "cpu"]) == 0


def test_a_mask_file_that_marks_nothing_is_told_from_one_that_is_lost_in_the_resize(part):
    assert "empty mask" not in note(run(part, "--run", "whole"))
    mask = part / "ground_truth/hole/001_mask.png"
    Image.fromarray(np.zeros((80, 96), dtype=np.uint8)).save(mask)
    folder = run(part)
    assert "1 anomalous test images have an empty mask" in note(folder)
    assert f"1 of the empty masks mark no pixel in their files, as {mask}" in note(folder)


def test_files_of_12_bits_are_remarked_upon_and_read_with_all_of_them(part):
    for path in part.rglob("*.png"):
        if "ground_truth" not in path.parts:
            grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) << 4
            Image.fromarray(grey).save(path)
    remark = "--bit-depth 12"
    assert remark in note(run(part))
    folder = run(part, "--bit-depth", "12")
    assert remark not in note(folder)
    assert ">> 4" in export_program(folder, part)


def export_program(folder, part):
    file = export.main([str(folder), "--format", "torchscript", "--images", str(part / "test")])
    return json.loads(file.with_name(f"{file.name}.json").read_text())["example"]


def test_the_exports_program_reads_turned_and_deep_images_as_predict_does(part, capsys, tmp_path):
    folder = run(part)
    program = export_program(folder, part)
    pixels = np.asarray(Image.open(part / "test/hole/000.png"))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("turned.png", "deep.png"):
        capsys.readouterr()
        predict.main([str(folder), str(tmp_path / name), "--json", "--device", "cpu"])
        wanted = json.loads(capsys.readouterr().out)["score"]
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)],
            cwd=folder / "export", capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert float(done.stdout) == pytest.approx(wanted, rel=1e-4)


def test_a_run_without_anomalies_is_evaluated_with_the_reason_and_exported(part, capsys):
    for path in [*part.glob("test/[hs]*/*"), *part.glob("test/good/00[1-9].png")]:
        path.unlink()
    folder = run(part)
    assert evaluate.main([str(folder), "--device", "cpu"]) == 0
    assert "image_auroc: no anomalous images" in " ".join(capsys.readouterr().out.split())
    assert "batch" in export_program(folder, part)  # its only score has no range


def test_a_backbone_of_one_size_takes_others_or_names_those_that_fit(part, capsys):
    vit = ("--backbone", "vit_tiny_patch16_224", "--weights", "random", "--layers", "5", "8")
    assert 0 <= measured(run(part, *vit))[0]["image_auroc"] <= 1
    words = words_of(part.parent, part.parents[1], "knn", *vit, "--image-size", "50")
    message = refusal(capsys, train_mvtec.main, *words, "--run", "unmade")
    assert "takes no images of 50 pixels" in message
    assert "the nearest that it takes are 48 and 64" in message
    assert not list(part.parents[1].rglob("unmade"))


def test_names_that_a_terminal_or_a_formula_cannot_hold(part, tmp_path):
    folder = draw_mvtec_category(tmp_path / "odd", "\u30b1 a$_$b", num_train=4)
    words = words_of(folder.parent, tmp_path, "noco", *SMALL, "--method.epochs", "2")
    done = subprocess.run(
        [sys.executable, "train_mvtec.py", *words, "--run", "odd"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    assert b"\\u30b1" in done.stdout
    (figure, _) = loss_curve.main(
        [str(tmp_path / "folder-noco/odd"), "--out", str(tmp_path / "curve")]
    )
    assert figure.is_file()


def test_a_run_is_no_way_up(part, capsys):
    words = words_of(part.parent, part.parents[1], "knn", "--run", "..")
    assert "must be a plain folder name" in refusal(capsys, train_mvtec.main, *words)


def test_paths_count_from_where_a_run_was_started(part, monkeypatch, tmp_path):
    monkeypatch.chdir(part.parents[1])
    words = words_of("data", part.parents[1], "knn", *SMALL)
    folder = train_mvtec.main(words)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate.main([str(folder), "--device", "cpu"]) == 0
    export.main([str(folder), "--format", "torchscript"])
