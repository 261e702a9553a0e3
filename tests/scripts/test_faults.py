"""Faults of the machine during a run: one message, finished categories kept, and the way on."""

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
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
from tests.scripts.runs import DIGITS, assert_same_run, refusal, words_of
from utils.cli import machine_fault
from utils.runs.rows import read_rows

CATEGORIES = ("cloth", "tile", "wood")
QUICK = (
    *("--method.epochs", "2", "--method.batch-size", "4"),
    *("--run", "mine", "--cache", "host"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for seed, category in enumerate(CATEGORIES):
        draw_mvtec_category(root, category, seed=seed)
    return root


def command(root, output, *options):
    return words_of(root, output, "noco", *QUICK, *options)


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
        error = capsys.readouterr().err
        assert "Traceback" not in error
        message = error[error.index("error: ") :].strip()
        assert "\n" not in message
        return message

    return run


def finished(folder):
    return [row["category"] for row in read_rows(folder / "results.csv")]


@pytest.fixture
def continues(images, undisturbed, tmp_path):
    """After a fault that left categories finished, the same command ends with the same run."""

    def check(*kept):
        assert finished(run_folder(tmp_path)) == list(kept)
        assert_same_run(train_mvtec.main(command(images, tmp_path)), undisturbed)

    return check


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
    rng, kills, number = random.Random(0), 0, 0
    while kills < int(os.environ.get("NOCO_KILLS", "4")):
        output = tmp_path / f"killed{number}"
        process = start(command(images, output, *options))
        process.join(timeout=rng.uniform(0, whole))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:  # it came to its end: the next kills are for another run
            assert process.exitcode == 0, start.errors.read_text()
            assert_same_run(run_folder(output), undisturbed)
            number += 1
    assert_same_run(train_mvtec.main(command(images, output, *options)), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["last", "best_test"])
def test_a_fit_that_was_killed_goes_on_inside_it(images, tmp_path, start, select, monkeypatch):
    epochs = 40
    options = (
        *("--select", select, "--categories", "cloth", "--checkpoint-minutes", "0"),
        *("--method.epochs", str(epochs)),
    )
    undisturbed = train_mvtec.main(command(images, tmp_path / "undisturbed", *options))
    process = start(command(images, tmp_path / "killed", *options))
    lines, reached = run_folder(tmp_path / "killed") / "metrics.jsonl", 0
    while reached < 4 and process.is_alive():
        time.sleep(0.01)
        reached = lines.read_text().count('"event": "step"') if lines.is_file() else 0
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    checkpoint = run_folder(tmp_path / "killed") / "checkpoints/cloth-seed0.pt"
    assert checkpoint.is_file()
    calls, loss = [], Noco.loss
    monkeypatch.setattr(Noco, "loss", lambda *given: calls.append(1) or loss(*given))
    assert_same_run(train_mvtec.main(command(images, tmp_path / "killed", *options)), undisturbed)
    assert 0 < len(calls) <= epochs - 3  # a step is an epoch here
    assert not checkpoint.parent.exists()


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


def fails_on(patch, owner, name, error, *, after):
    """Let a method raise `error` from its call number `after` on."""
    true, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise error
        return true(*args, **kwargs)

    patch.setattr(owner, name, failing)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:113] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 80000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"),
    MemoryError(),
)


def one_value_is_nan(patch):
    maps, calls = FrozenExtractor.stage_maps, []

    def spoil_one_image(extractor, batch):
        calls.append(1)
        stages = [stage.clone() for stage in maps(extractor, batch)]
        if len(calls) == 3:  # the training images of the second category
            stages[0][1, 0, 0, 0] = torch.nan
        return stages

    patch.setattr(FrozenExtractor, "stage_maps", spoil_one_image)


def the_second_head_diverges(patch):
    fit, fitted = Noco.fit, []

    def spoil_and_fit(head, train, **kwargs):
        fitted.append(head)
        if len(fitted) == 2:
            train.stages[0].fill_(torch.nan)
        return fit(head, train, **kwargs)

    patch.setattr(Noco, "fit", spoil_and_fit)


NO_SPACE = OSError(28, "No space left on device")


def full_in_a_line_of_tile(patch):
    append = utils.runs.files.append_text

    def append_half(path, text):
        if '"tile"' in text:
            append(path, text[:20])
            raise utils.runs.files.unwritable(path, NO_SPACE)
        append(path, text)

    patch.setattr(utils.runs.run, "append_text", append_half)


def full_in_the_head_of_tile(patch):
    save = safetensors.torch.save_file

    def save_half(tensors, path, metadata):
        if "tile" in path.name:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata=metadata)

    patch.setattr(safetensors.torch, "save_file", save_half)


def full_at(fails):
    """The disk is found full as a file of which `fails(path)` says so is put in place."""

    def patched(patch):
        replace = Path.replace

        def checked(path, target):
            if fails(Path(target)):
                raise NO_SPACE
            return replace(path, target)

        patch.setattr(Path, "replace", checked)

    return patched


NO_ROOM = r"cannot be written \(.*No space.*make room"
FAULTS = {
    "out of memory in a fit": (
        lambda patch: fails_on(patch, Noco, "fit", OUT_OF_MEMORY[0], after=1),
        r"tile: out of memory \(.*--extract-batch-size",
    ),
    "out of memory in extraction": (
        lambda patch: fails_on(patch, FrozenExtractor, "stage_maps", OUT_OF_MEMORY[1], after=2),
        r"tile: out of memory \(.*--extract-batch-size",
    ),
    "features": (one_value_is_nan, "tile: train features: a feature is not finite"),
    "loss": (
        the_second_head_diverges,
        "tile, seed 0: .*loss is nan at epoch 1, step 1; lower --method.learning-rate",
    ),
    # A full disk, whichever file it hits, also in the middle of a write.
    "metrics": (full_in_a_line_of_tile, rf"/.*metrics\.jsonl: {NO_ROOM}"),
    "head": (full_in_the_head_of_tile, rf"/.*tile-seed0\.safetensors: {NO_ROOM}"),
    "scores": (
        full_at(lambda path: path.name == "tile-seed0.npz"),
        rf"/.*tile-seed0\.npz: {NO_ROOM}",
    ),
    "results": (
        full_at(lambda path: path.name == "results.csv" and path.exists()),
        rf"/.*results\.csv: {NO_ROOM}",
    ),
    "table": (full_at(lambda path: path.name == "table.md"), rf"/.*table\.md: {NO_ROOM}"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_keeps_what_is_finished(name, images, tmp_path, monkeypatch, stopped, continues):
    fault, message = FAULTS[name]
    with monkeypatch.context() as patch:
        fault(patch)
        assert re.match(f"error: {message}", stopped(images))
    assert not list(tmp_path.rglob("*.tmp"))
    continues(*(CATEGORIES if name == "table" else ["cloth"]))


def test_a_full_disk_hits_a_picture(images, tmp_path, monkeypatch, stopped):
    full_at(lambda path: path.suffix == ".png" and "tile" in str(path))(monkeypatch)
    message = stopped(images, "--overlays", "1")
    assert re.match(rf"error: {tmp_path}.*\.png: {NO_ROOM}", message)
    assert not list(tmp_path.rglob("*.tmp"))
    assert finished(run_folder(tmp_path)) == ["cloth"]


def test_a_real_limit_on_what_is_written(images, undisturbed, tmp_path, start):
    """The system itself refuses the rest of a file, in a process of its own."""
    process = start(command(images, tmp_path), file_size=20_000)
    process.join()
    message = start.errors.read_text()
    assert process.exitcode == 2
    assert "Traceback" not in message
    assert re.match(r"error: .*cannot be written \(.*File too large.*\); make room", message)
    assert not list(tmp_path.rglob("*.tmp"))
    assert_same_run(train_mvtec.main(command(images, tmp_path)), undisturbed)


@pytest.mark.parametrize("name", ["heads", "scores", "overlays", "metrics.jsonl", "results.csv"])
def test_something_else_where_the_run_writes(name, images, tmp_path, stopped):
    """A file where a folder should be and the other way round: not even root can write there."""
    folder = run_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / name).mkdir() if "." in name else (folder / name).write_text("mine")
    message = stopped(images, "--overlays", str(int(name == "overlays")))
    assert str(folder) in message
    assert name in message
    if name == "heads":
        (folder / name).unlink()
        assert finished(train_mvtec.main(command(images, tmp_path))) == list(CATEGORIES)


def test_a_file_in_place_of_the_output_folder(images, tmp_path, stopped):
    (tmp_path / "results").write_text("mine")
    message = stopped(images, output=tmp_path / "results")
    assert message.startswith(
        f"error: {tmp_path}/results/folder-noco/mine: cannot make the run fold"
    )


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_every_wording_of_out_of_memory_is_understood(error):
    message = machine_fault(error)
    assert message.startswith("out of memory (")
    assert "()" not in message
    assert "\n" not in message


def test_memory_that_is_really_too_large(images, monkeypatch, stopped):
    """What PyTorch and numpy say on this machine is understood, too."""
    for allocate in (lambda *_: torch.empty(2**60), lambda *_: np.empty(2**50)):
        with monkeypatch.context() as patch:
            patch.setattr(FrozenExtractor, "stage_maps", allocate)
            message = stopped(images)
        assert message.startswith("error: cloth: out of memory (")


def test_faults_of_one_class_tasks_are_named_too(tmp_path, monkeypatch, capsys):
    fails_on(monkeypatch, Noco, "fit", OUT_OF_MEMORY[0], after=1)
    words = [*DIGITS, "--output", tmp_path, "--weights", "random", "--backbone", "resnet10t"]
    words += ["--image-size", "32", "--method.epochs", "1"]
    message = refusal(capsys, train_mnist.main, *words)
    assert "error: 7: out of memory (CUDA out of memory." in message


def test_our_own_defects_keep_their_traceback(images, tmp_path, monkeypatch):
    fails_on(monkeypatch, Noco, "fit", RuntimeError("mat1 and mat2 shapes"), after=0)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        train_mvtec.main(command(images, tmp_path))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # where there is no GPU to pin it for
def test_a_killed_worker(images, monkeypatch, stopped, continues):
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
    continues("cloth")
