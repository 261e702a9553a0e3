import re

import pytest
import torch

from benchmarks import gpu

QUICK = ("--image-size", "48", "--workers", "0", "--repeats", "1", "--device", "cpu")
CASES = (
    "--methods",
    "noco_cf",
    "simplenet",
    "--epochs",
    "1",
    "--precisions",
    "fp32",
    "tf32",
    "bf16",
)


@pytest.mark.filterwarnings("ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning")
def test_the_benchmark_of_a_gpu_runs_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "costs.md"
    gpu.main([*QUICK, *CASES, "--output", str(file)])
    said = capsys.readouterr().out
    assert file.read_text() == said
    first, left_out, table = said.split("\n\n")
    assert re.match(r"\d{4}-\d\d-\d\d, .*PyTorch .*: `python -m benchmarks.gpu --image-size", first)
    assert left_out == "tf32 is left out: without a GPU it is fp32."
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    kinds = [(name, kind) for name in ("noco_cf", "simplenet") for kind in ("fp32", "bf16")]
    assert [tuple(row[:2]) for row in rows] == kinds
    for *_, per_second, bare, share, fit, metrics, peak in rows:
        assert min(map(float, (per_second, bare, fit, metrics))) > 0
        assert share.endswith("%")
        assert peak == ""  # that is a GPU's memory


def test_methods_without_a_frozen_backbone_are_measured_in_fp32(monkeypatch, capsys):
    measured = []

    def measure(experiment, *_):
        measured.append((experiment.method_name, experiment.precision))
        return gpu.Costs(10, None, 1, 1, 10**6)

    monkeypatch.setattr(gpu, "measure", measure)
    gpu.main(["--device", "cpu", "--methods", "riad", "padim"])
    assert measured == [("riad", "fp32"), *(("padim", kind) for kind in ("fp32", "bf16", "fp16"))]
    said = capsys.readouterr().out
    assert "In fp32 alone, having no frozen backbone: riad." in said
    assert "| riad | fp32 | 10 |  |  | 1.00 | 1.000 | 1 |" in said


def test_without_a_gpu_the_way_out_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message == "error: --device cuda: no CUDA device is available here; use --device cpu\n"
