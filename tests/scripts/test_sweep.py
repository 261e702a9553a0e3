"""A sweep from its command line to merged run folders, on the embedded digits and drawn images."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import pipeline.training
import sweep
import train_mnist
from configs.sweep import sweep_options
from models.backbone.extractor import FrozenExtractor
from pipeline.planning import combinations
from tests.datasets.trees import draw_mvtec_category, save, texture
from tests.scripts.runs import IMAGES, QUICK_DIGITS, assert_same_run, measured, refusal, train
from utils.sweep.engines import Workers

DIGITS = ("--datasets", "digits", "--categories", "0", "1", "--seeds", "0", "1")


def sweep_digits(output, *more):
    return sweep.main([*DIGITS, "--output", str(output), "--", *QUICK_DIGITS, *more])


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The output of a finished sweep; tests leave it as it is."""
    output = tmp_path_factory.mktemp("swept")
    sweep_digits(output)
    return output


def manifest(output, name="*"):
    (path,) = output.glob(f"sweep-{name}/sweep.json")
    return json.loads(path.read_text())


def statuses(output):
    return {(job["category"], job["seed"]): job["status"] for job in manifest(output)["jobs"]}


def test_merged_run_is_that_of_the_plain_command(swept, digits):
    assert_same_run(swept / digits.parent.name / digits.name, digits)


def test_the_plain_command_finds_nothing_left_to_do(swept, digits, monkeypatch):
    def refuse(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(FrozenExtractor, "stage_maps", refuse)
    monkeypatch.setattr(pipeline.training, "train_together", refuse)
    run = manifest(swept)["runs"]["digits noco"]
    command = shlex.split(run["command"])
    assert command[:2] == ["python", "train_mnist.py"]
    assert train_mnist.main(command[2:]) == Path(run["run_folder"])
    assert measured(Path(run["run_folder"])) == measured(digits)


def test_lists_are_stored(swept, digits):
    stored = manifest(swept)
    merged = swept / digits.parent.name / digits.name
    (folder,) = swept.glob("sweep-*")
    assert (folder / "runs.txt").read_text() == f"{merged}\n"
    assert set(statuses(swept).values()) == {"done"}
    # Seeds outside: the first seed of each category leaves its features to the others.
    assert list(statuses(swept)) == [("0", 0), ("1", 0), ("0", 1), ("1", 1)]
    lines = (folder / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith("name,run,category,seed,run_folder,log,command,status,seconds")
    assert len(lines) == 5
    for job in stored["jobs"]:
        assert job["seconds"] > 0
        assert (Path(job["run_folder"]) / "table.md").is_file()
        assert "image_auroc" in Path(job["log"]).read_text()
    record = json.loads((merged / "environment.json").read_text())
    assert record["command"].startswith("train_mnist.py digits noco")
    assert len(record["continued"]) == 4


def test_a_finished_sweep_runs_nothing_again(swept, monkeypatch, capsys):
    seconds = [job["seconds"] for job in manifest(swept)["jobs"]]
    monkeypatch.setattr(train_mnist, "main", lambda _: pytest.fail("a finished job ran again"))
    (folder,) = sweep_digits(swept)
    assert f"run folder: {folder}" in capsys.readouterr().out
    assert [job["seconds"] for job in manifest(swept)["jobs"]] == seconds


def test_a_sweep_continues_where_an_interrupt_left_it(tmp_path, digits, monkeypatch, capsys):
    main, calls = train_mnist.main, []

    def interrupted(argv):
        calls.append(argv)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return main(argv)

    monkeypatch.setattr(train_mnist, "main", interrupted)
    words = [*DIGITS, "--output", tmp_path, "--", *QUICK_DIGITS]
    assert "interrupted" in refusal(capsys, sweep.main, *words, code=130)
    assert list(statuses(tmp_path).values()) == ["done", "done", "pending", "pending"]
    (folder,) = sweep_digits(tmp_path)
    # The three, then the two that were left and the command that writes the table.
    assert len(calls) == 3 + 2 + 1
    assert_same_run(folder, digits)
    # A further seed runs its own jobs only; the others are found in the folder of jobs.
    more = [*DIGITS[:-2], "--seeds", "0", "1", "2", "--output", str(tmp_path), "--", *QUICK_DIGITS]
    (wider,) = sweep.main(more)
    assert len(calls) == 6 + 2 + 1
    assert len(measured(wider)) == 6
    assert [row for row in measured(wider) if row["seed"] < 2] == measured(digits)


def test_a_sweep_that_is_told_to_stop_leaves_no_process_behind(tmp_path):
    words = [*DIGITS, "--jobs", "2", "--output", str(tmp_path), "--", *QUICK_DIGITS]
    words += ["--method.epochs", "1000000"]
    process = subprocess.Popen([sys.executable, "sweep.py", *words], stderr=subprocess.PIPE)
    started = psutil.Process(process.pid)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("jobs/**/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = started.children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted; the same command continues" in said
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert set(statuses(tmp_path).values()) == {"pending"}


def test_failures_stop_no_other_job_and_are_listed(tmp_path, swept, digits, monkeypatch, capsys):
    main = train_mnist.main

    def failing(argv):
        if "--categories 1 --seeds 0" in " ".join(argv):
            print("error: the disk is full", flush=True)  # noqa: T201  as a script does
            raise SystemExit(2)
        return main(argv)

    monkeypatch.setattr(train_mnist, "main", failing)
    corrupt = tmp_path / Path(manifest(swept)["jobs"][0]["run_folder"]).relative_to(swept)
    corrupt.mkdir(parents=True)
    (corrupt / "config.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        sweep_digits(tmp_path)
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "4 jobs: 2 done, 2 failed" in out
    assert "config.json: corrupt" in out
    assert "failed: digits noco, 1, seed 0: exit code 2\n    error: the disk is full\n" in out
    assert "alone: python train_mnist.py digits noco" in out
    assert "run folder" not in out.replace("run folders", "")
    broken, job = [job for job in manifest(tmp_path)["jobs"] if job["status"] == "failed"]
    assert (broken["category"], broken["seed"]) == ("0", 0)
    assert (job["category"], job["seed"], job["message"]) == ("1", 0, ["error: the disk is full"])
    assert next(tmp_path.glob("sweep-*/runs.txt")).read_text() == ""
    # Its own command repairs it, and the sweep then has the other one and the table to do.
    main(shlex.split(job["command"])[2:])
    shutil.rmtree(corrupt)
    monkeypatch.setattr(train_mnist, "main", main)
    (folder,) = sweep_digits(tmp_path)
    assert measured(folder) == measured(digits)


def test_structured_categories_merge_too(tmp_path):
    for seed, category in enumerate(("cloth", "wood")):
        draw_mvtec_category(tmp_path / "images", category, seed=seed)
    seeds = ("--seeds", "3", "0")
    words = (*IMAGES, "--method.epochs", "1", "--overlays", "1", "--save-maps")
    words += ("--select", "best_test")
    plain = train(tmp_path / "images", tmp_path / "plain", "noco", *words, *seeds)
    run = ["train_mvtec:folder", "noco", "--data-root", str(tmp_path / "images")]
    arguments = ["--set", shlex.join(run), *seeds, "--output", str(tmp_path / "swept")]
    (folder,) = sweep.main([*arguments, "--", *words])
    assert_same_run(folder, plain)


def test_workers_and_devices_are_those_asked_for(monkeypatch):
    def engine_of(*words):
        return sweep.engine_of(sweep_options(["--datasets", "demo", *words])[0])

    def environments(*words):
        engine = engine_of(*words)
        assert isinstance(engine, Workers)
        return [e.get("CUDA_VISIBLE_DEVICES") for e in engine.environments]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environments("--jobs", "3") == [None, None, None]
    monkeypatch.setattr(sweep, "cuda_devices", lambda: ["0", "1", "2"])
    assert environments("--engine", "gpus") == ["0", "1", "2"]
    assert environments("--engine", "gpus", "--gpus", "0", "2") == ["0", "2"]
    assert environments("--engine", "gpus", "--gpus", "1", "2", "--jobs", "2") == [*"1212"]
    monkeypatch.setattr(sweep, "RayTasks", lambda *address, **options: (*address, options))
    asked = ("--ray-address", "auto", "--jobs", "3", "--gpus-per-task", "0.5")
    assert engine_of("--engine", "ray", *asked) == ("auto", {"num_gpus": 0.5, "at_once": 3})


def planned(*words):
    """The command of each job that a sweep would run."""
    options, extra = sweep_options(words)
    runs, _ = sweep.plan(options, extra)
    return [planned.job for run in runs for planned in run.jobs]


def test_the_grid_has_every_combination_once():
    jobs = planned(
        *("--datasets", "digits", "demo", "--methods", "noco", "noco_exact", "--seeds", "0", "1"),
        *("--categories", "digits=3", "digits=5", "demo=brick"),
        *("--options", "method.norm=1,2", "layers=2 3,3", "method.feature-norm=l2"),
        *("--set", "digits knn", "digits noco --method.feature-norm l2 --layers 3"),
        *("--", "--workers", "0"),
    )
    # 2 methods x 2 norms x 2 layers x 2 seeds, of 2 + 1 categories; then knn. The last --set is a
    # point of the grid already.
    assert len(jobs) == 16 * 3 + 4
    assert len({job.name for job in jobs}) == len({job.log for job in jobs}) == len(jobs)
    first = jobs[0]
    assert first.script == "train_mnist"
    assert " ".join(first.argv) == (
        "digits noco --workers 0 --method.norm 1 --layers 2 3 --method.feature-norm l2 "
        "--categories 3 --seeds 0 --output results/jobs --cache disk"
    )
    assert first.argv[2:4] == ("--workers", "0")
    assert [job.script for job in jobs].count("train_mvtec") == 16
    assert sum("--overlays" in job.argv for job in jobs) == len(jobs) // 2


def test_switches_and_gpus_are_written_as_the_scripts_want_them(monkeypatch):
    jobs = planned(
        *("--datasets", "digits", "--categories", "0", "--options", "method.amsgrad=True,False"),
        *("--engine", "gpus", "--", "--cache", "host"),
    )
    assert ["--method.amsgrad" in job.argv for job in jobs] == [True, False]
    assert "--method.no-amsgrad" in jobs[1].argv
    assert all(job.argv[-2:] == ("--device", "cuda") for job in jobs)
    assert all("disk" not in job.argv for job in jobs)


def test_a_name_of_two_scripts_is_asked_about_and_each_has_its_folder(tmp_path):
    draw_mvtec_category(tmp_path / "parts", "wood")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for index in range(3):
                save(tmp_path / f"pets/{split}/{name}/{index}.png", texture(rng, (16, 16)))
    both = ("--datasets", "train_mvtec:folder", "train_cifar10:folder")
    roots = [f"train_mvtec:folder={tmp_path}/parts", f"train_cifar10:folder={tmp_path}/pets"]
    jobs = planned(*both, "--data-roots", *roots)
    assert [(job.script, job.name) for job in jobs] == [
        ("train_mvtec", "train_mvtec:folder noco, wood, seed 0"),
        ("train_cifar10", "train_cifar10:folder noco, cat, seed 0"),
        ("train_cifar10", "train_cifar10:folder noco, dog, seed 0"),
    ]


REFUSED = {
    ("--methods", "noco"): "--datasets needs at least one data set",
    ("--datasets", "digit"): "unknown data set 'digit'",
    ("--datasets", "folder"): "say train_mvtec:folder or train_cifar10:folder",
    ("--datasets", "digits", "--methods", "nocco"): "unknown method 'nocco'; did you mean noco",
    ("--datasets", "digits", "--categories", "ten"): "digits has no class 'ten'",
    ("--datasets", "digits", "--seeds", "1", "1"): "must be different",
    ("--datasets", "digits", "--options", "method.norm"): "must be OPTION=VALUE,VALUE",
    ("--datasets", "digits", "--options", "method.norm=1,"): "must be OPTION=VALUE,VALUE",
    ("--datasets", "digits", "--options", "seeds=1,2"): "--seeds is the sweep's own option",
    ("--datasets", "digits", "--", "--restart"): "--restart has no place in a sweep",
    ("--datasets", "digits", "--", "--run=a"): "--run=a has no place in a sweep",
    ("--datasets", "digits", "--", "-h"): "-h has no place in a sweep",
    ("--datasets", "mvtec"): "data root data/mvtec does not exist",
    ("--datasets", "digits", "demo", "--data-roots", "x"): "must be DATASET=FOLDER",
    ("--datasets", "digits", "--jobs", "0"): "--jobs 0 must be at least 1",
    ("--datasets", "digits", "--gpus", "0"): "--gpus is for --engine gpus",
    ("--datasets", "digits", "--name", "a/b"): "must be a plain name",
    ("--set", ""): "--set takes a data set, a method and options",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_cannot_run_is_refused_before_anything_does(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert REFUSED[words] in refusal(capsys, sweep.main, *words)
    assert list(tmp_path.iterdir()) == []


def test_an_option_a_method_has_not_is_refused_by_name_or_skipped(tmp_path, capsys):
    words = ["--datasets", "digits", "--methods", "noco", "knn", "--options", "method.norm=1,2"]
    words += ["--categories", "0", "--output", str(tmp_path / "out")]
    message = refusal(capsys, sweep.main, *words)
    for norm in (1, 2):
        refused = f"digits knn --method.norm {norm} Unrecognized options: --method.norm"
        assert refused in message
    assert "digits noco" not in message
    assert "--skip-invalid" in message

    assert sweep.main([*words, "--skip-invalid", "--dry-run"]) == []
    out = capsys.readouterr().out
    assert out.count("left out  digits knn --method.norm") == 2
    assert out.count("to run    python train_mnist.py digits noco --method.norm") == 2
    assert "2 jobs, 2 to run" in out
    assert not (tmp_path / "out").exists()
    words = ("--datasets", "digits", "--methods", "no", "--skip-invalid")
    assert "no combination can run" in refusal(capsys, sweep.main, *words)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    words = (*DIGITS, "--output", tmp_path / "file", "--", *QUICK_DIGITS)
    assert "sweep.json: cannot be written" in refusal(capsys, sweep.main, *words)


def test_the_commands_of_the_docstring_stand_for_commands_of_the_scripts():
    lines = [line.strip() for line in sweep.__doc__.splitlines() if line.startswith("    python")]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "sweep.py"]
        options, extra = sweep_options(words[2:])
        found = combinations(options, extra)
        assert found
        for combination in found:
            assert combination.parse(combination.command(options.output)).seeds == options.seeds


def test_devices_that_are_not_there_are_refused(monkeypatch, capsys):
    words = ["--datasets", "digits", "--engine", "gpus"]
    for devices, more, message in (
        ([], [], "no CUDA device is available here"),
        (["0", "1"], ["--gpus", "0", "7"], "--gpus 7: this machine has 0 1"),
        (["0"], ["--", "--device", "cpu"], "--device is chosen by the engine here"),
    ):
        monkeypatch.setattr(sweep, "cuda_devices", lambda devices=devices: devices)
        assert message in refusal(capsys, sweep.main, *words, *more)
