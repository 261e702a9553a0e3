"""Faults of the machine during a run: one message, finished categories kept, and the way on."""

import csv
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import pipeline.features
import train_mnist
import train_mvtec
import utils.runs.files
import utils.runs.run
from datasets.reading.loading import BatchLoader, ImageDataset
from models.backbone.extractor import FrozenExtractor
from models.methods.noco import Noco
from tests.datasets.trees import draw_mvtec_category
from utils.cli import machine_fault
from utils.runs.files import read_rows
from utils.runs.run import Run

CATEGORIES = ("cloth", "tile", "wood")
QUICK = (
    *("--backbone", "tf_efficientnet_lite0", "--image-size", "64", "--crop-size", "none"),
    *(
        "--method.epochs",
        "2",
        "--method.batch-size",
        "4",
        "--workers",
        "0",
        "--run",
        "mine",
        "--cache",
        "host",
    ),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for seed, category in enumerate(CATEGORIES):
        draw_mvtec_category(root, category, seed=seed)
    return root


def command(root, output, *options):
    options = options if "--overlays" in options else ("--overlays", "0", *options)
    return ["folder", "--data-root", str(root), "--output", str(output), *QUICK, *options]


def run_folder(output):
    return output / "folder-noco/mine"


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    return train_mvtec.main(command(images, tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture
def stopped(tmp_path, capsys):
    """Run the script, which a fault must stop: returns its one message."""

    def run(root, *options, output=None):
        with pytest.raises(SystemExit) as exit_:
            train_mvtec.main(command(root, output or tmp_path, *options))
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message[message.index("error: ") :].strip()

    return run


def finished(folder):
    return [row["category"] for row in read_rows(folder / "results.csv")]


def results_without_times(folder):
    """results.csv as text, without the columns of seconds."""
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in lines]


def assert_same_run(folder, other):
    assert results_without_times(folder) == results_without_times(other)
    for category in CATEGORIES:
        one, two = (Run.read(run) for run in (folder, other))
        scores, expected = one.load_scores(category, 0), two.load_scores(category, 0)
        assert scores.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(scores[name], expected[name])
        (state, about), (wanted, expected_about) = (r.load_head(category, 0) for r in (one, two))
        assert about == expected_about
        assert state.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
    metrics = [run.joinpath("metrics.jsonl").read_text() for run in (folder, other)]
    assert metrics[0] == metrics[1]
    assert {p.name for p in folder.rglob("*")} == {p.name for p in other.rglob("*")}


def run_in_process(arguments, errors, file_size=None):
    """Run the script in this process, which is a child, its errors into a file."""
    with Path(errors).open("a", buffering=1) as sys.stderr:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        train_mvtec.main(arguments)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start the script in a process of its own; a server forks it, after the slow imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_mvtec", "pipeline.training", "pipeline.recording"])
    errors = tmp_path_factory.mktemp("errors") / "stderr.txt"

    def begin(arguments, file_size=None):
        process = context.Process(target=run_in_process, args=(arguments, errors, file_size))
        process.start()
        return process

    begin.errors = errors
    begin(["no such data set"]).join()  # the server is up, and has imported what it can
    errors.unlink()
    return begin


@pytest.mark.slow
def test_killed_at_random_moments_the_same_command_ends_with_the_same_run(images, tmp_path, start):
    """NOCO_KILLS sets how many kills."""
    options = ("--overlays", "1")
    began = time.monotonic()
    process = start(command(images, tmp_path / "timed", *options))
    process.join()
    assert process.exitcode == 0, start.errors.read_text()
    whole, undisturbed = time.monotonic() - began, run_folder(tmp_path / "timed")
    rng, states, number = random.Random(0), [], 0
    wanted = int(os.environ.get("NOCO_KILLS", "4"))
    while len(states) < wanted:
        output = tmp_path / f"killed{number}"
        folder = run_folder(output)
        process = start(command(images, output, *options))
        process.join(timeout=rng.uniform(0, whole))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            is_begun = (folder / "results.csv").exists()
            states.append(len(finished(folder)) if is_begun else 0 if folder.exists() else -1)
        else:  # it came to its end: the next kills are for another run
            assert process.exitcode == 0, start.errors.read_text()
            assert_same_run(folder, undisturbed)
            number += 1
    train_mvtec.main(command(images, output, *options))
    assert_same_run(folder, undisturbed)
    sys.stdout.write(
        f"{len(states)} kills, over {number + 1} runs of {whole:.1f} s; categories finished at "
        f"each (-1: no run folder yet): {states}\n"
    )


def test_a_category_that_disappears_in_between(images, undisturbed, tmp_path, monkeypatch, stopped):
    root = Path(shutil.copytree(images, tmp_path / "images"))
    finish = Run.finish

    def finish_and_lose(run, category, *rest):
        finish(run, category, *rest)
        if category == "cloth":
            (root / "tile").rename(root / "lost")

    monkeypatch.setattr(Run, "finish", finish_and_lose)
    message = stopped(root)
    assert message.startswith(f"error: image file not found: {root}/tile/train/good/000.png")
    assert finished(run_folder(tmp_path)) == ["cloth"]
    (root / "lost").rename(root / "tile")
    folder = train_mvtec.main(command(root, tmp_path))
    assert finished(folder) == list(CATEGORIES)
    wanted = [row["image_auroc"] for row in read_rows(undisturbed / "results.csv")]
    assert [row["image_auroc"] for row in read_rows(folder / "results.csv")] == wanted


def test_all_images_gone_with_skip_unreadable(images, tmp_path, monkeypatch, stopped):
    """Leaving out unreadable images must not end in a category without images."""
    root = Path(shutil.copytree(images, tmp_path / "images"))
    build = pipeline.features.build_extractor

    def lose_all(*args, **kwargs):
        shutil.rmtree(root / "tile")
        return build(*args, **kwargs)

    monkeypatch.setattr(pipeline.features, "build_extractor", lose_all)
    message = stopped(root, "--skip-unreadable", "--categories", "tile")
    assert message == "error: tile: train features: not one image could be read"


def full_disk(monkeypatch, fails, module=utils.runs.files):
    """Let `fails(path)` decide which files find the disk full as they are put in place."""
    replace = Path.replace

    def checked(path, target):
        if fails(Path(target)):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", checked)


@pytest.mark.parametrize(
    "name",
    [
        "tile-seed0.npz",
        "tile-seed0.safetensors",
        "results.csv",
        "metrics.jsonl",
        "table.md",
        ".png",
    ],
)
def test_disk_full(name, images, undisturbed, tmp_path, monkeypatch, stopped):
    """Whichever file it hits, also in the middle of a write."""
    with monkeypatch.context() as patch:
        if name == "metrics.jsonl":
            append = utils.runs.files.append_text

            def append_half(path, text):
                if '"tile"' in text:
                    append(path, text[:20])
                    raise utils.runs.files.unwritable(path, OSError(28, "No space left on device"))
                append(path, text)

            patch.setattr(utils.runs.run, "append_text", append_half)
        elif name.endswith("safetensors"):
            save = safetensors.torch.save_file

            def save_half(tensors, path, metadata):
                if "tile" in path.name:
                    path.write_bytes(b"half")
                    raise SafetensorError("I/O error: No space left on device (os error 28)")
                save(tensors, path, metadata=metadata)

            patch.setattr(safetensors.torch, "save_file", save_half)
        else:
            rows = run_folder(tmp_path) / "results.csv"
            full_disk(patch, lambda path: path.name.endswith(name) and (
                path.name != "results.csv" or rows.exists()
            ) and (name != ".png" or "tile" in str(path)))  # fmt: skip
        message = stopped(images, *(("--overlays", "1") if name == ".png" else ()))
    assert re.match(
        rf"error: {tmp_path}.*{re.escape(name)}: cannot be written \(.*No space", message
    )
    assert "make room" in message
    assert "\n" not in message
    kept = finished(run_folder(tmp_path))
    assert kept == (list(CATEGORIES) if name == "table.md" else ["cloth"])
    assert not list(tmp_path.rglob("*.tmp"))
    if name != ".png":
        train_mvtec.main(command(images, tmp_path))
        assert_same_run(run_folder(tmp_path), undisturbed)


def test_a_real_limit_on_what_is_written(images, undisturbed, tmp_path, start):
    """The system itself refuses the rest of a file, in a process of its own."""
    process = start(command(images, tmp_path), file_size=20_000)
    process.join()
    message = start.errors.read_text()
    assert process.exitcode == 2
    assert "Traceback" not in message
    assert re.match(r"error: .*cannot be written \(.*File too large.*\); make room", message)
    assert not list(tmp_path.rglob("*.tmp"))
    train_mvtec.main(command(images, tmp_path))
    assert_same_run(run_folder(tmp_path), undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB; mounting one needs rights that few have."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True
    )
    if done.returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_small_disk(images, undisturbed, small_disk, stopped):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(100_000))
    message = stopped(images, output=small_disk)
    assert re.match(rf"error: {small_disk}.*: cannot be written \(.*No space left on dev", message)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    train_mvtec.main(command(images, small_disk))
    assert_same_run(run_folder(small_disk), undisturbed)


def test_a_real_read_only_disk(images, small_disk, stopped):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = stopped(images, output=small_disk)
    assert "cannot make the run folder (Read-only file system)" in message


@pytest.mark.parametrize("name", ["heads", "scores", "overlays", "metrics.jsonl", "results.csv"])
def test_something_else_where_the_run_writes(name, images, tmp_path, stopped):
    """A file where a folder should be and the other way round: not even root can write there."""
    folder = run_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / name).mkdir() if "." in name else (folder / name).write_text("mine")
    message = stopped(images, "--overlays", str(int(name == "overlays")))
    assert str(folder) in message
    assert name in message
    assert "\n" not in message
    (folder / name).rmdir() if "." in name else (folder / name).unlink()
    if name == "heads":
        assert finished(train_mvtec.main(command(images, tmp_path))) == list(CATEGORIES)


def test_a_file_in_place_of_the_output_folder(images, tmp_path, stopped):
    (tmp_path / "results").write_text("mine")
    message = stopped(images, output=tmp_path / "results")
    assert message.startswith(
        f"error: {tmp_path}/results/folder-noco/mine: cannot make the run fold"
    )


def fails_on(monkeypatch, owner, name, error, *, after):
    """Let a method raise `error` from its call number `after` on."""
    true, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise error
        return true(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:113] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 80000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"),
    MemoryError(),
)


@pytest.mark.parametrize(
    ("owner", "name", "after", "error"),
    [
        (Noco, "fit", 1, OUT_OF_MEMORY[0]),
        (FrozenExtractor, "stage_maps", 2, OUT_OF_MEMORY[1]),
    ],
    ids=["fit", "extraction"],
)
def test_out_of_memory(error, owner, name, after, images, tmp_path, monkeypatch, stopped):
    with monkeypatch.context() as patch:
        fails_on(patch, owner, name, error, after=after)
        message = stopped(images)
    assert message.startswith("error: tile: out of memory (")
    assert "--extract-batch-size" in message
    assert "\n" not in message
    assert finished(run_folder(tmp_path)) == ["cloth"]
    assert finished(train_mvtec.main(command(images, tmp_path))) == list(CATEGORIES)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_every_wording_of_out_of_memory_is_understood(error):
    message = machine_fault(error)
    assert message.startswith("out of memory (")
    assert "()" not in message
    assert "\n" not in message


def test_memory_that_is_really_too_large(images, tmp_path, monkeypatch, stopped):
    """What PyTorch and numpy say on this machine is understood, too."""
    for allocate in (lambda *_: torch.empty(2**60), lambda *_: np.empty(2**50)):
        with monkeypatch.context() as patch:
            patch.setattr(FrozenExtractor, "stage_maps", allocate)
            message = stopped(images)
        assert message.startswith("error: cloth: out of memory (")


def test_our_own_defects_keep_their_traceback(images, tmp_path, monkeypatch):
    fails_on(monkeypatch, Noco, "fit", RuntimeError("mat1 and mat2 shapes"), after=0)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        train_mvtec.main(command(images, tmp_path))


def test_features_that_are_not_numbers(images, undisturbed, tmp_path, monkeypatch, stopped):
    maps, calls = FrozenExtractor.stage_maps, []

    def spoil_one_image(extractor, batch):
        calls.append(1)
        stages = [stage.clone() for stage in maps(extractor, batch)]
        if len(calls) == 3:  # the training images of the second category
            stages[0][1, 0, 0, 0] = torch.nan
        return stages

    with monkeypatch.context() as patch:
        patch.setattr(FrozenExtractor, "stage_maps", spoil_one_image)
        message = stopped(images)
    assert message.startswith("error: tile: train features: a feature is not finite")
    assert finished(run_folder(tmp_path)) == ["cloth"]
    train_mvtec.main(command(images, tmp_path))
    assert_same_run(run_folder(tmp_path), undisturbed)


def test_a_head_that_diverges(images, undisturbed, tmp_path, monkeypatch, stopped):
    fit, fitted = Noco.fit, []

    def spoil_and_fit(head, train, **kwargs):
        fitted.append(head)
        if len(fitted) == 2:
            train.stages[0].fill_(torch.nan)
        return fit(head, train, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Noco, "fit", spoil_and_fit)
        message = stopped(images)
    assert message.startswith("error: tile, seed 0: ")
    assert "loss is nan at epoch 1, step 1; lower --method.learning-rate" in message
    assert finished(run_folder(tmp_path)) == ["cloth"]
    train_mvtec.main(command(images, tmp_path))
    assert_same_run(run_folder(tmp_path), undisturbed)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # where there is no GPU to pin it for
def test_a_killed_worker(images, undisturbed, tmp_path, monkeypatch, stopped):
    read, parent = ImageDataset.__getitem__, os.getpid()

    def die_at_tile(dataset, index):
        if "tile" in str(dataset.source(index)) and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(dataset, index)

    def in_processes(images, **options):
        return BatchLoader(images, **options | {"for_gpu": True})

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.features, "BatchLoader", in_processes)
        patch.setattr(ImageDataset, "__getitem__", die_at_tile)
        message = stopped(images, "--workers", "1")
    assert message.startswith("error: a process that reads images was killed")
    assert f"{images}/tile/train/good/000.png" in message
    assert "--workers 0" in message
    assert finished(run_folder(tmp_path)) == ["cloth"]
    train_mvtec.main(command(images, tmp_path))
    assert_same_run(run_folder(tmp_path), undisturbed)


def test_faults_of_one_class_tasks_are_named_too(tmp_path, monkeypatch, capsys):
    fails_on(monkeypatch, Noco, "fit", OUT_OF_MEMORY[0], after=1)
    words = ["digits", "--output", str(tmp_path), "--weights", "random", "--run", "mine"]
    words += ["--categories", "3", "5", "--method.epochs", "1", "--workers", "0", "--overlays", "0"]
    words += ["--backbone", "resnet10t", "--image-size", "32", "--crop-size", "none"]
    with pytest.raises(SystemExit) as exit_:
        train_mnist.main(words)
    assert exit_.value.code == 2
    assert "error: 5: out of memory (CUDA out of memory." in capsys.readouterr().err
