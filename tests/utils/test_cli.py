import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.errors import ModelError
from utils.cli import FOR_THE_USER, exits_cleanly, require_device
from utils.device import pick_device, set_deterministic
from utils.errors import UsageError


class KnownError(Exception):
    pass


def ending_with(error):
    @exits_cleanly(KnownError)
    def main(number, *, extra=0):
        """Adds."""
        if error is not None:
            raise error
        return number + extra

    return main


def test_a_script_that_works_returns_its_result():
    main = ending_with(None)
    assert main(2, extra=3) == 5
    assert (main.__name__, main.__doc__) == ("main", "Adds.")


@pytest.mark.parametrize("kind", [KnownError, *FOR_THE_USER])
def test_expected_errors_are_one_message_and_exit_code_2(kind, capsys):
    with pytest.raises(SystemExit) as exit_:
        ending_with(kind("no folder here; pass --data-root"))(1)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "error: no folder here; pass --data-root\n"
    assert printed.out == ""


def test_a_models_error_is_told_with_the_options_that_mend_it(capsys):
    error = ModelError("too few features", {"num_neighbors": "lower", "search": "or use exact"})
    with pytest.raises(SystemExit):
        ending_with(error)(1)
    assert capsys.readouterr().err == (
        "error: too few features; lower --method.num-neighbors; or use exact --method.search\n"
    )


def test_our_own_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        ending_with(ZeroDivisionError())(1)


def test_interrupt_says_that_nothing_is_lost(capsys):
    with pytest.raises(SystemExit) as exit_:
        ending_with(KeyboardInterrupt())(1)
    assert exit_.value.code == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.fixture
def gpus(monkeypatch):
    """A machine with as many GPUs as it is called with, that work."""

    def there(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr("utils.device.require_works", lambda *_: None)

    return there


def test_devices(monkeypatch, gpus):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.delenv("NOCO_DEVICE")
    for count, expected in ((0, "cpu"), (1, "cuda")):
        gpus(count)
        assert pick_device("auto").type == expected


def test_the_environment_names_the_device_where_none_is_named(monkeypatch, gpus):
    gpus(1)
    monkeypatch.setenv("NOCO_DEVICE", "cpu")
    assert pick_device("auto").type == "cpu"
    assert pick_device("cuda").type == "cuda"
    monkeypatch.setenv("NOCO_DEVICE", "cude")
    with pytest.raises(UsageError, match="--device cude is unknown"):
        pick_device("auto")


@pytest.mark.parametrize(
    ("name", "named", "seen"),
    [("cpu", None, ""), ("auto", "cpu", ""), ("auto", None, "1"), ("cuda", "cpu", "1")],
)
def test_a_run_on_the_cpu_sees_no_gpu(monkeypatch, gpus, name, named, seen):
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.delenv("NOCO_DEVICE")
    if named is not None:
        monkeypatch.setenv("NOCO_DEVICE", named)
    require_device(name)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, ".*auto, cpu, cuda or cuda:1") for name in ("gpu", "tpu", "cuda:x", "")),
        ("meta", " is not supported"),
        *((name, ": no CUDA device is available here") for name in ("cuda", "cuda:1")),
    ],
)
def test_unusable_device_is_named(monkeypatch, name, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"--device {name}{message}"):
        pick_device(name)


def test_gpu_that_this_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="--device cuda:1: this machine has 1"):
        pick_device("cuda:1")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    script = tmp_path / "many.py"
    script.write_text(
        "import sys\n"
        "from utils.cli import exits_cleanly\n"
        "@exits_cleanly()\n"
        "def main():\n"
        "    for number in range(10**6):\n"
        "        sys.stdout.write(f'{number}\\n')\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 141


def test_an_operation_that_cannot_be_repeated_names_the_option(capsys):
    error = RuntimeError(
        "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you "
        "set 'torch.use_deterministic_algorithms(True)'."
    )
    with pytest.raises(SystemExit):
        ending_with(error)(1)
    message = capsys.readouterr().err
    assert message.startswith("error: adaptive_avg_pool2d_backward_cuda gives other bits")
    assert "--deterministic" in message


def test_deterministic_operations_are_asked_for_and_given_up(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_deterministic(False)
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        assert not torch.are_deterministic_algorithms_enabled()
        set_deterministic(True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        set_deterministic(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_the_named_gpu_becomes_the_current_one(monkeypatch, gpus):
    chosen = []
    gpus(2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
