import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from datasets.samples import ImageSet, Task
from models.detector import Detector
from pipeline import recording, training
from pipeline.experiments import structured_catalogue
from pipeline.features import TaskData
from pipeline.recording import remarks_of, summary_line, write_table
from pipeline.training import open_run, train_head, train_together
from tests.utils.banks import constant_bank, set_of
from tests.utils.evaluation import test_selection as selection
from utils.errors import RunError, UsageError
from utils.runs.rows import read_rows
from utils.runs.run import Run

CATEGORIES = ("tile", "wood")
NAMES = ("0.png", "1.png", "2.png", "3.png")
LABELS, KINDS = [0, 0, 1, 1], ("good", "good", "hole", "hole")
EXTRACTOR = SimpleNamespace(device=torch.device("cpu"), weights_digest="beef", random_weights=False)


def experiment_of(method="noco_exact", **changes):
    experiment = structured_catalogue().compose("demo", method)
    return dataclasses.replace(experiment, **{"select": "last", "overlays": 0, **changes})


def new_run(folder, seeds=(0,)):
    return Run.open(
        folder, {"method": "fake"}, categories=CATEGORIES, seeds=seeds, command=["x"], device="cpu"
    )


bank_of = partial(constant_bank, side=2)


def small_test_set(masks=None):
    return set_of(bank_of([1.0, 2.0, 3.0, 4.0]), LABELS, masks=masks)


def one_pixel(image):
    """Masks with a defect in one of the images."""
    masks = torch.zeros(4, 2, 2, dtype=torch.bool)
    masks[image, 0, 1] = True
    return masks


def task_of(category, **fields):
    return Task(
        category=category,
        label=f"a {category}",
        train=ImageSet("train", paths=tuple(Path(f"{i}.png") for i in range(3))),
        train_indices=np.arange(3),
        test=ImageSet("test", paths=tuple(map(Path, NAMES))),
        test_labels=np.array(LABELS),
        kinds=KINDS,
        **fields,
    )


def data_of(category, *, train=None, test=None, validation=None, skipped=()):
    train, test = train or bank_of([1.0, 1.5, 2.0]), test or small_test_set()
    return TaskData(task_of(category), train, test, validation, None, skipped)


class Drawn(Detector):
    """Draws its one weight from the global generator and its other one from the explicit one."""

    def __init__(self, options):
        super().__init__()
        assert options == experiment_of().method, "nothing was chosen"
        self.weight = nn.Parameter(torch.rand(1) + float(np.random.rand()))  # noqa: NPY002
        self.offset = nn.Parameter(torch.zeros(1))

    def fit(self, bank, *, generator, monitor):
        with torch.no_grad():
            self.offset.copy_(torch.rand(1, generator=generator))
        for step in (1, 2):
            monitor(step, {"loss": float(len(bank)) / step})

    def forward(self, features):
        return features[:, 0] * self.weight + self.offset


class Failing(Detector):
    def __init__(self, _):
        super().__init__()

    def fit(self, bank, *, generator, monitor):
        del bank, generator, monitor
        raise FloatingPointError("loss is nan at epoch 3, step 7")


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path)


@pytest.fixture
def builds(monkeypatch):
    """Say what builds the detectors, from their options; `Drawn` unless something else is said."""

    def use(build):
        monkeypatch.setattr(training, "build_detector", lambda *arguments: build(arguments[-1]))

    use(Drawn)
    return use


@pytest.fixture
def drawn(monkeypatch):
    """Folder and outcome of what is drawn, in place of the pictures."""
    found = []

    def note(experiment, folder, data, detector, outcome):
        found.append((folder.name, outcome))

    monkeypatch.setattr(recording, "draw", note)
    return found


def train(run, category, seed=0, *, experiment=None, data=None, **changes):
    experiment = experiment or experiment_of(seeds=run.seeds, **changes)
    train_head(experiment, run, EXTRACTOR, [data or data_of(category)], seed)


def train_all(run, **options):
    for category in CATEGORIES:
        train(run, category, **options)


def test_everything_is_written_down(tmp_path, run, builds, drawn, capsys):
    data = data_of("tile", test=small_test_set(one_pixel(2)), skipped=["cut.png: truncated"])
    train(run, "tile", data=data, overlays=1, save_maps=True)
    (row,) = run.rows()
    assert (row["category"], row["seed"], row["select"]) == ("tile", 0, "last")
    assert (row["num_train"], row["num_test"]) == (3, 4)
    assert (row["skipped"], row["empty_masks"], row["trainable"]) == (1, 1, 2)
    assert row["image_auroc"] == 1.0
    assert (row["step"], row["pixel_step"]) == (2, 2)
    assert row["fit_seconds"] >= 0
    assert row["undefined"] == ""

    first, *steps = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {
        "category": "tile",
        "seed": 0,
        "event": "data",
        "skipped": ["cut.png: truncated"],
        "empty_masks": ["3.png"],
        "unused": [],
    }
    logged = [(line["event"], line["step"], line["loss"]) for line in steps]
    assert logged == [("step", 1, 3.0), ("step", 2, 1.5)]

    scores = run.load_scores("tile", 0)
    assert scores["path"].tolist() == list(NAMES)
    assert scores["label"].tolist() == LABELS
    assert scores["defect"].tolist() == list(KINDS)
    assert scores["map"].shape == (4, 2, 2)
    assert scores["mask"].dtype == bool
    np.testing.assert_array_equal(scores["mask"], one_pixel(2).numpy())
    state, metadata = run.load_head("tile", 0)
    assert set(state) == {"weight", "offset"}
    assert metadata == {
        **{"category": "tile", "seed": "0", "select": "last", "options": "{}"},
        "backbone_digest": "beef",
    }
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]) * state["weight"] + state["offset"]
    np.testing.assert_array_equal(scores["score"], expected.numpy())

    ((_, outcome),) = drawn
    np.testing.assert_array_equal(outcome.scores.images, scores["score"])
    assert "tile  seed 0:  image_auroc 100.00" in capsys.readouterr().out


class Named(Drawn):
    category = "before the fit"

    def fit(self, bank, *, generator, monitor):
        self.told.append(self.category)
        super().fit(bank, generator=generator, monitor=monitor)


def test_a_detector_that_can_use_its_category_is_told_it(run, builds, monkeypatch):
    monkeypatch.setattr(Named, "told", [], raising=False)
    builds(Named)
    train(run, "tile")
    assert Named.told == ["tile"]


def test_the_first_seed_is_drawn_where_pictures_are_asked_for(tmp_path, builds, drawn):
    run = new_run(tmp_path, (3, 1))
    for seed in (3, 1):
        train(run, "tile", seed, overlays=2)
        train(run, "wood", seed)
    assert [folder for folder, _ in drawn] == ["tile-seed3"]


def test_best_on_test_writes_the_last_state_beside_it(run, builds, drawn, capsys):
    train(run, "tile", select="best_test", overlays=1)
    assert [row["select"] for row in run.rows()] == ["last", "best_test"]
    for select, suffix in (("last", "-last"), ("best_test", "")):
        assert run.load_head("tile", 0, suffix)[1]["select"] == select
        assert run.load_scores("tile", 0, suffix)["score"].shape == (4,)
    assert [outcome.select for _, outcome in drawn] == ["best_test"]
    assert "best on test (optimistic): image_auroc" in capsys.readouterr().out


def test_a_category_alone_gives_the_bits_it_has_among_others(tmp_path, builds):
    both, alone = new_run(tmp_path / "both", (0, 1)), new_run(tmp_path / "alone", (0, 1))
    for seed in (0, 1):
        train(both, "tile", seed)
        train(both, "wood", seed)
    torch.rand(5)
    train(alone, "wood", 1)
    for name in ("weight", "offset"):
        states = [run.load_head("wood", 1)[0][name] for run in (both, alone)]
        assert torch.equal(*states)
        assert not torch.equal(states[0], both.load_head("wood", 0)[0][name])
    scores = [run.load_scores("wood", 1)["score"] for run in (both, alone)]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize(
    ("method", "hint"), [("noco_exact", ""), ("noco", "; lower --method.learning-rate")]
)
def test_loss_that_is_not_finite_names_category_and_seed_and_leaves_the_pair_open(
    tmp_path, builds, method, hint
):
    run = new_run(tmp_path, (0, 1))
    train(run, "tile", 0)
    builds(Failing)
    message = rf"^tile, seed 1: loss is nan at epoch 3, step 7{hint}$"
    with pytest.raises(FloatingPointError, match=message):
        train(run, "tile", 1, experiment=experiment_of(method))
    assert run.pending("tile") == [1]
    assert not run.head_path("tile", 1).exists()


def test_best_on_test_of_one_class_names_category_and_seed(tmp_path, builds):
    data = data_of("tile")
    data.test.labels = torch.zeros(4)
    with pytest.raises(UsageError, match=r"^tile, seed 0: --select best_test needs normal and"):
        train(new_run(tmp_path), "tile", data=data, select="best_test")


@pytest.mark.parametrize(("monitor_test", "scored"), [(False, 1), (True, 5)])
def test_a_run_scores_the_test_set_once_after_the_choice(
    tmp_path, run, builds, monitor_test, scored
):
    experiment = experiment_of("noco", select="synthetic", monitor_test=monitor_test)
    test, built = selection.Untouched(), []

    def build(options):
        built.append(options)
        functions = [selection.FUNCTIONS["wrong"], selection.FUNCTIONS["right"]]
        return selection.Stepper(functions[: options.epochs])

    builds(build)
    validation = selection.make_validation()
    data = data_of("tile", train=selection.bank_of([0.1, 0.2]), test=test, validation=validation)
    train(run, "tile", data=data, experiment=experiment)
    assert built == [experiment.method, dataclasses.replace(experiment.method, epochs=2)]
    assert test.times == scored
    (row,) = read_rows(tmp_path / "results.csv")
    assert (row["select"], row["chosen"]) == ("synthetic", "epochs=2")
    assert row["image_auroc"] == 1.0


def test_only_pending_seeds_are_trained_on_features_extracted_once(tmp_path, builds, capsys):
    run, asked = new_run(tmp_path, (0, 1, 2)), []
    train(run, "tile", 1)
    extraction = SimpleNamespace(
        extractor=EXTRACTOR,
        data_together=lambda tasks: asked.extend(tasks) or [data_of(t.category) for t in tasks],
    )
    train_together(experiment_of(seeds=(0, 1, 2)), run, extraction, [task_of("tile")])
    assert [task.category for task in asked] == ["tile"]
    assert [row["seed"] for row in run.rows()] == [0, 1, 2]


def test_too_few_images_for_a_calibration_are_refused_before_the_folder_is_made(tmp_path):
    experiment = experiment_of(calibration_share=0.5, output=tmp_path)
    with pytest.raises(UsageError, match=r"^tile: --calibration-share 0\.5 holds 2 of 3"):
        open_run(experiment, [task_of("tile")], EXTRACTOR, ["x"])
    assert list(tmp_path.iterdir()) == []
    experiment = experiment_of(output=tmp_path, seeds=(4,))
    run = open_run(experiment, [task_of("tile")], EXTRACTOR, ["x"])
    assert (run.categories, run.seeds, run.pending("tile")) == (("tile",), (4,), [4])


def finish(run, *, extractor=EXTRACTOR, peers=(), **changes):
    tasks = [task_of(category, peers=peers) for category in run.categories]
    return write_table(experiment_of(seeds=run.seeds, **changes), run, tasks, extractor)


def test_table_is_written_and_printed(tmp_path, run, builds, capsys):
    train_all(run)
    capsys.readouterr()
    random = SimpleNamespace(random_weights=True)
    table = finish(run, extractor=random)
    printed = capsys.readouterr().out
    for text in (printed, *((tmp_path / f"table.{kind}").read_text() for kind in ("md", "tex"))):
        assert "RANDOM BACKBONE WEIGHTS" in text
        assert "a wood" in text
        assert "no masks" in text
    assert (tmp_path / "table.csv").read_text().splitlines()[:2] == [
        "category,last_image_auroc,last_image_ap,last_image_f1_max,last_pixel_auroc,last_pixel_ap,"
        "last_aupro",
        "tile,100.0,100.0,100.0,nan,nan,nan",
    ]
    assert f"run folder: {tmp_path}" in printed
    assert "reported: last" in table.caption
    assert not any("RANDOM" in note for note in finish(run).notes)


def test_table_with_a_hole_is_refused(tmp_path, run, builds):
    train(run, "tile")
    with pytest.raises(RunError, match="wood seed 0"):
        finish(run)
    assert not (tmp_path / "table.md").exists()


def test_table_of_the_best_on_test_says_that_it_is_optimistic(run, builds):
    train_all(run, select="best_test")
    table = finish(run, select="best_test")
    assert "best on test (optimistic)" in table.caption
    assert [group for group, *_ in table.groups()] == ["last", "best on test (optimistic)"]


def test_an_unreadable_image_that_tasks_share_counts_once(run, builds):
    for category in CATEGORIES:
        train(run, category, data=data_of(category, skipped=["cut.png: truncated"]))
    assert any(note.startswith("2 unreadable images") for note in finish(run).notes)
    shared = finish(run, peers=(np.arange(3),))
    assert any(note.startswith("1 unreadable images") for note in shared.notes)


class Remarking(Drawn):
    def fit(self, bank, *, generator, monitor):
        super().fit(bank, generator=generator, monitor=monitor)
        self.remarks.append("stuck")


def test_what_a_fit_remarks_stands_below_the_table(run, builds):
    train(run, "tile")
    builds(Remarking)
    train(run, "wood")
    assert remarks_of(run.rows()) == ["wood, seed 0: stuck"]
    assert "wood, seed 0: stuck" in finish(run).notes


def test_summary_line_leaves_out_what_is_undefined(tmp_path, builds, monkeypatch):
    found = []
    monkeypatch.setattr(recording, "summary_line", lambda _, fitted: found.append(fitted) or "")
    train(new_run(tmp_path), "tile")
    (fitted,) = found
    assert math.isnan(fitted.outcomes[0].measured.values["pixel_auroc"])
    line = summary_line("tile", dataclasses.replace(fitted, fit_seconds=1.25))
    assert line == "tile  seed 0:  image_auroc 100.00  (fit 1.2 s)"


class Aimed(Drawn):
    """Has norm and angle, and counts how often it is asked for them."""

    asked = 0

    def geometry(self, stages, maps):
        type(self).asked += 1
        assert stages[0].shape[2:] == maps.shape[1:]
        highest = maps.amax(dim=(1, 2))
        return highest + 1, highest / 10


def test_norm_angle_maps_and_masks_are_kept_only_where_they_are_asked_for(run, builds, monkeypatch):
    monkeypatch.setattr(Aimed, "asked", 0)
    builds(Aimed)
    train(run, "tile", select="best_test", monitor_test=True)
    assert Aimed.asked == 2  # the last and the best state, not every step
    for suffix in ("", "-last"):
        scores = run.load_scores("tile", 0, suffix)
        np.testing.assert_array_equal(scores["norm"], scores["score"] + 1)
        np.testing.assert_array_equal(scores["angle"], scores["score"] / 10)
    builds(Drawn)
    train(run, "wood", data=data_of("wood", test=small_test_set(one_pixel(2))))
    assert not {"norm", "angle", "map", "mask"} & set(run.load_scores("wood", 0))
