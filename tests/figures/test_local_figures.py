"""The figures of `noco_cf`: its filters, and accuracy and time against its centres."""

import numpy as np
import pytest
import torch
from PIL import Image

from figures import centres_sweep, filters
from figures.shared.option_curves import read_curves
from models.detector import FeatureShape
from models.methods.noco_cf.noco_cf import NocoCf, NocoCfOptions
from tests.figures.paper_runs import write_run
from tests.models.banks import Bank, seeded
from tests.scripts.runs import refusal
from utils.runs.run import Run

CHANNELS = 5


def fitted(kind):
    scales = torch.logspace(1, -3, CHANNELS)[:, None, None]
    bank = Bank(torch.randn(40, CHANNELS, 4, 4, generator=seeded()) * scales)
    options = NocoCfOptions(filter=kind, prototypes=1)
    detector = NocoCf(FeatureShape((CHANNELS,)), options)
    detector.fit(bank, generator=seeded())
    return bank, detector


def run_of(folder, kind):
    _, detector = fitted(kind)
    config = {"dataset": "demo", "method_name": "noco_cf", "method": {"filter": kind}}
    run = Run.open(folder, config, categories=("a",), seeds=[0], command=["x"], device="cpu")
    run.save_head("a", 0, detector.state_dict(), {})
    run.finish({("a", 0): [{"category": "a", "seed": 0, "select": "last", "image_auroc": 0.9}]})
    return folder


@pytest.mark.parametrize("kind", ["ridge", "flow"])
def test_variances_are_those_of_the_features(tmp_path, kind):
    bank, detector = fitted(kind)
    found_kind, (found,) = filters.read(run_of(tmp_path / "run", kind), None, None)
    positions = bank.features.movedim(1, -1).flatten(0, 2).double()
    centred = positions - detector.mixtures[0].centres.double()
    moment = centred.T @ centred / len(positions)
    wanted = torch.linalg.eigvalsh(moment) / (0.1 * moment.trace() / CHANNELS)
    assert found_kind == kind
    # The flow leaves nothing of what is beyond the range of its gain.
    seen = wanted < (1e9 if kind == "ridge" else 20)
    assert seen.sum() >= 2
    np.testing.assert_allclose(found[seen.numpy()], wanted[seen], rtol=5e-3, atol=1e-4)


def test_filters_are_drawn(tmp_path, capsys):
    runs = [str(run_of(tmp_path / kind, kind)) for kind in ("ridge", "flow")]
    paths = filters.main([*runs, "--category", "a", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in paths)
    assert np.array(Image.open(paths[0])).std() > 5
    above, below = filters.draw([filters.read(tmp_path / "ridge", None, 0)]).axes
    dots = above.lines[-2]
    np.testing.assert_allclose(dots.get_ydata(), 1 / (1 + np.array(dots.get_xdata())))
    assert below.get_legend().get_texts()[0].get_text() == "stage 1"


def test_filters_of_other_methods_and_heads_are_refused(tmp_path, capsys):
    other = write_run(tmp_path / "knn", {"dataset": "demo", "method_name": "knn"}, {("a", 0): 0.9})
    assert "knn has no such filters" in refusal(capsys, filters.main, str(other))
    run = run_of(tmp_path / "run", "ridge")
    error = refusal(capsys, filters.main, str(run), "--category", "b", "--seed", "1")
    assert "no finished head of category b, seed 1" in error


def sweep_run(folder, centres, auroc, fit, scoring):
    config = {"dataset": "demo", "method_name": "noco_cf", "method": {"prototypes": centres}}
    values = {("a", 0): auroc, ("b", 0): auroc}
    times = {"fit_seconds": fit, "score_seconds": scoring, "num_test": 50, "pixel_auroc": 0.8}
    return write_run(folder, config, values, **times)


def test_accuracy_and_times_are_drawn_against_the_centres(tmp_path, capsys):
    runs = [
        sweep_run(tmp_path / "a", 8, 0.7, 1.0, 0.1),
        sweep_run(tmp_path / "b", 64, 0.9, 4.0, 0.2),
    ]
    out = tmp_path / "out"
    paths = centres_sweep.main([*map(str, runs), "--out", str(out)])
    assert "best 90.0 at 64" in capsys.readouterr().out
    assert {path.suffix for path in paths} == {".png", ".pdf", ".md", ".csv"}
    assert np.array(Image.open(paths[0])).std() > 5


def test_times_are_means_over_categories(tmp_path):
    runs = [sweep_run(tmp_path / "a", 8, 0.7, 1.0, 0.1), sweep_run(tmp_path / "b", 64, 0.9, 4, 0.2)]
    sweep = centres_sweep.sweep_of_centres()
    times = centres_sweep.read_times(runs, sweep)
    assert times["demo"][8]["fit_seconds"] == 1
    assert times["demo"][64]["score_seconds"] == pytest.approx(4)
    above, below = centres_sweep.draw(read_curves(runs, sweep), times).axes
    assert [list(line.get_ydata()) for line in above.lines] == [
        pytest.approx([70, 90]),
        pytest.approx([80, 80]),
    ]
    assert [list(line.get_ydata()) for line in below.lines] == [[1, 4], pytest.approx([2, 4])]
