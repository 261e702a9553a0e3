"""The engines of a sweep, with a script that does what its words say."""

import json
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from tests.rays import require_ray
from utils.errors import UsageError
from utils.sweep.engines import InProcess, RayTasks, Workers, _Worker, cuda_devices
from utils.sweep.jobs import Ended, Job, Started, last_lines, output_to

SCRIPT = """
import json, os, subprocess, sys, time
from pathlib import Path

def main(argv):
    what, *words = argv
    print("begins", what)
    if what == "fail":
        sys.stderr.write("error: no such folder; pass --data-root\\n")
        raise SystemExit(2)
    if what == "raise":
        raise ZeroDivisionError("a defect")
    if what == "interrupt":
        raise SystemExit(130)
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "leave":
        os._exit(3)
    if what == "child":
        subprocess.run([sys.executable, "-c", "print('said by a child')"], check=True)
    if what == "hang":
        child = subprocess.Popen(["sleep", "60"])
        Path(words[0]).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(60)
    if what == "record":
        # Waits for as many others as it is told to: they must run at the same time.
        folder, name, together = Path(words[0]), words[1], int(words[2])
        start = time.time()
        (folder / f"{name}.begun").touch()
        while len(list(folder.glob("*.begun"))) < together:
            time.sleep(0.01)
            assert time.time() < start + 30
        names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        record = {n: os.environ.get(n) for n in names} | {"pid": os.getpid(), "start": start}
        (folder / name).write_text(json.dumps(record | {"stop": time.time()}))
"""


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    """A script that this process and its workers can import."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "sweep_script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def job(tmp_path):
    def make(*words):
        name = " ".join(words)
        log = tmp_path / f"logs/{name.replace('/', '_')}.log"
        return Job(name, "sweep_script", words, str(log))

    return make


def ended(events):
    """The reason of each ended job, after checking that each was started first."""
    started, reasons = set(), {}
    for event in events:
        if isinstance(event, Started):
            started.add(event.name)
        else:
            assert event.name in started
            assert event.seconds >= 0
            reasons[event.name] = event.reason
    assert started == set(reasons)
    return reasons


def test_in_this_process_a_failure_stops_no_other_job(job, tmp_path, capfd):
    jobs = [job("fail"), job("raise"), job("child"), job("ok")]
    reasons = ended(InProcess().run(jobs))
    assert list(reasons) == ["fail", "raise", "child", "ok"]
    assert reasons["fail"] == "exit code 2"
    assert "ZeroDivisionError" in reasons["raise"]
    assert reasons["child"] == reasons["ok"] == ""
    fail = last_lines(tmp_path / "logs/fail.log")
    assert fail == ["begins fail", "error: no such folder; pass --data-root"]
    assert last_lines(tmp_path / "logs/raise.log")[-1] == "ZeroDivisionError: a defect"
    assert last_lines(tmp_path / "logs/child.log") == ["begins child", "said by a child"]
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_is_no_failure(job):
    events = InProcess().run([job("interrupt"), job("ok")])
    assert next(events) == Started("interrupt")
    with pytest.raises(KeyboardInterrupt):
        next(events)


def test_output_goes_to_the_log_and_back(tmp_path, capfd):
    sys.stdout.write("before\n")
    with output_to(tmp_path / "new/log"):
        sys.stdout.write("inside\n")
        sys.stdout.flush()
        os.write(2, b"from C\n")
    sys.stdout.write("after\n")
    assert (tmp_path / "new/log").read_text() == "inside\nfrom C\n"
    assert capfd.readouterr().out == "before\nafter\n"


def test_a_log_that_cannot_be_written_is_the_reason(tmp_path):
    (tmp_path / "file").touch()
    _, end = InProcess().run([Job("a", "sweep_script", ("ok",), str(tmp_path / "file/log"))])
    assert isinstance(end, Ended)
    assert end.reason.startswith("its log cannot be written")


def test_last_lines_show_the_last_state_of_a_bar(tmp_path):
    (tmp_path / "log").write_text("one\n\n 0%|\r50%|\r100%|\nlast\n")
    assert last_lines(tmp_path / "log") == ["one", "100%|", "last"]
    assert last_lines(tmp_path / "log", 1) == ["last"]
    assert last_lines(tmp_path / "none") == []


def test_each_device_has_one_process_and_one_job_at_a_time(job, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    engine = Workers([{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}])
    jobs = [job("record", str(tmp_path), str(number), "2") for number in range(6)]
    assert set(ended(engine.run(jobs)).values()) == {""}
    records = [json.loads((tmp_path / str(number)).read_text()) for number in range(6)]
    assert {record["OMP_NUM_THREADS"] for record in records} == {"4"}
    for device in ("5", "7"):
        own = [record for record in records if record["CUDA_VISIBLE_DEVICES"] == device]
        own.sort(key=lambda record: record["start"])
        assert own, "a device got no job"
        assert len({record["pid"] for record in own}) == 1
        assert all(a["stop"] <= b["start"] for a, b in pairwise(own))


def test_threads_the_user_has_set_stay(job, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ended(Workers([{}, {}]).run([job("record", str(tmp_path), "a", "1")]))
    assert json.loads((tmp_path / "a").read_text())["OMP_NUM_THREADS"] == "3"


def test_a_worker_that_dies_is_a_failed_job_and_is_replaced(job):
    jobs = [job("die"), job("ok"), job("leave"), job("fail")]
    reasons = ended(Workers([{}]).run(jobs))
    assert "killed (SIGKILL" in reasons["die"]
    assert "exit code 3" in reasons["leave"]
    assert (reasons["ok"], reasons["fail"]) == ("", "exit code 2")


def runs(pid: int) -> bool:
    """Tell whether a process runs; a zombie has ended, whoever is slow to collect it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended_within(seconds, events):
    """The reason of each ended job; a failure where the last does not end in time."""
    found = []
    thread = threading.Thread(target=lambda: found.append(ended(events)), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "somebody waits for a job that nobody runs"
    (reasons,) = found
    return reasons


def test_an_error_of_ours_in_a_workers_thread_ends_its_job_alone(job, monkeypatch):
    run, processes = _Worker._run, []

    def breaks(self, process, job):
        processes.append(process)
        if job.name == "record":
            raise ZeroDivisionError("a defect")
        return run(self, process, job)

    monkeypatch.setattr(_Worker, "_run", breaks)
    reasons = ended_within(60, Workers([{}]).run([job("ok"), job("record"), job("child")]))
    assert reasons == {"ok": "", "record": "ZeroDivisionError: a defect", "child": ""}
    # What the process would have answered next, nobody knows.
    first, same, other = processes
    assert first is same is not other
    assert not any(runs(process.pid) for process in processes)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_processes_that_cannot_be_started_are_the_reason(job, monkeypatch, num_workers):
    def refuse(*_, **__):
        raise OSError("too many open files")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    jobs = [job("ok"), job("child"), job("fail")]
    reasons = ended_within(30, Workers([{}] * num_workers).run(jobs))
    assert reasons == {job.name: "OSError: too many open files" for job in jobs}


def test_workers_keep_the_folder_they_are_started_in(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ended(Workers([{}]).run([job("record", ".", "here", "1")])) == {"record . here 1": ""}
    assert (tmp_path / "here").is_file()


def test_closing_ends_running_jobs_and_their_children(job, tmp_path):
    pids = tmp_path / "pids"
    events = Workers([{}]).run([job("hang", str(pids)), job("record", str(tmp_path), "no", "1")])
    assert isinstance(next(events), Started)
    deadline = time.time() + 30
    while not (pids.is_file() and " " in pids.read_text()):
        assert time.time() < deadline
        time.sleep(0.02)
    events.close()
    assert [pid for pid in pids.read_text().split() if runs(int(pid))] == []
    time.sleep(0.2)
    assert not (tmp_path / "no").exists()


def test_devices_are_named_as_the_environment_names_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a")
    assert cuda_devices() == ["3", "GPU-8a"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cuda_devices() == []


def test_without_ray_the_message_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install -r requirements-ray\.txt"):
        RayTasks("local")


@pytest.mark.slow
def test_ray_runs_jobs_and_reports_failures_and_deaths(job, tmp_path, monkeypatch):
    require_ray()
    monkeypatch.chdir(tmp_path)
    jobs = [job("record", ".", "a", "1"), job("fail"), job("die"), job("child")]
    reasons = ended(RayTasks("local", at_once=1).run(jobs))
    assert list(reasons) == [job.name for job in jobs]
    assert (reasons["record . a 1"], reasons["child"]) == ("", "")
    assert reasons["fail"] == "exit code 2"
    assert "WorkerCrashedError" in reasons["die"]
    assert Path("a").is_file()
    assert last_lines(tmp_path / "logs/child.log") == ["begins child", "said by a child"]
