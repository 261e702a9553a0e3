import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from utils.runs.recording import (
    finish_tables,
    fit_and_record,
    row_notes,
    summary_line,
    undefined_reasons,
)

from models.detector import Detector
from utils.errors import RunError
from utils.evaluation.test_set import TestSet
from utils.features.bank import FeatureBank
from utils.runs.run import Run

CATEGORIES = ("tile", "wood")


def open_run(folder, seeds=(0,)):
    return Run.open(
        folder, {"method": "fake"}, categories=CATEGORIES, seeds=seeds, command=["x"], device="cpu"
    )


def bank_of(values):
    """A bank of N images with one feature on a 2 x 2 grid: the value, everywhere."""
    maps = torch.tensor(values)[:, None, None, None].expand(-1, 2, 2, 1)
    return FeatureBank(
        [maps],
        range(len(values)),
        assemble=lambda stages: stages[0].float(),
        device=torch.device("cpu"),
    )


def small_test_set(values=(1.0, 2.0, 3.0, 4.0), masks=None):
    return TestSet(
        bank_of(list(values)),
        torch.tensor([0, 0, 1, 1]),
        names=["a.png", "b.png", "c.png", "d.png"],
        kinds=["good", "good", "hole", "scratch"],
        masks=masks,
    )


class Drawn(Detector):
    """Draws its one weight from the global generator and its other one from the explicit one."""

    def __init__(self, options):
        super().__init__()
        assert options == {}, "nothing was chosen"
        self.weight = nn.Parameter(torch.rand(1) + float(np.random.rand()))  # noqa: NPY002
        self.offset = nn.Parameter(torch.zeros(1))

    def fit(self, bank, *, generator, monitor):
        with torch.no_grad():
            self.offset.copy_(torch.rand(1, generator=generator))
        for step in (1, 2):
            monitor(step, {"loss": float(len(bank)) / step})

    def forward(self, features):
        return features[:, 0] * self.weight + self.offset


class Failing(Drawn):
    def fit(self, bank, *, generator, monitor):
        del bank, generator, monitor
        raise FloatingPointError("loss is nan at epoch 3, step 7")


def record(run, category, seed=0, *, build=Drawn, test=None, **options):
    fit_and_record(
        run,
        category,
        seed,
        build,
        bank_of([1.0, 1.5, 2.0]),
        small_test_set() if test is None else test,
        **{"select": "last", "backbone_digest": "beef", **options},
    )


def lines_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_everything_is_written_down(tmp_path, capsys):
    run = open_run(tmp_path)
    masks = torch.zeros(4, 2, 2, dtype=torch.bool)
    masks[2, 0, 0] = True
    drawn = []
    record(
        run,
        "tile",
        test=small_test_set(masks=masks),
        skipped=["cut.png: truncated"],
        draw=drawn.append,
        save_maps=True,
    )
    (row,) = run.rows()
    assert (row["category"], row["seed"], row["select"]) == ("tile", 0, "last")
    assert (row["num_train"], row["num_test"]) == (3, 4)
    assert (row["skipped"], row["empty_masks"], row["trainable"]) == (1, 1, 2)
    assert row["image_auroc"] == 1.0
    assert (row["step"], row["pixel_step"]) == (2, 2)
    assert row["fit_seconds"] >= 0
    assert row["undefined"] == ""

    data, *steps = lines_of(run)
    assert data == {
        "category": "tile",
        "seed": 0,
        "event": "data",
        "skipped": ["cut.png: truncated"],
        "empty_masks": ["d.png"],
    }
    assert [(line["event"], line["step"], line["loss"]) for line in steps] == [
        ("step", 1, 3.0),
        ("step", 2, 1.5),
    ]

    scores = run.load_scores("tile", 0)
    assert scores["path"].tolist() == ["a.png", "b.png", "c.png", "d.png"]
    assert scores["label"].tolist() == [0, 0, 1, 1]
    assert scores["defect"].tolist() == ["good", "good", "hole", "scratch"]
    assert scores["map"].shape == (4, 2, 2)
    state, metadata = run.load_head("tile", 0)
    assert set(state) == {"weight", "offset"}
    assert metadata == {
        **{"category": "tile", "seed": "0", "select": "last", "options": "{}"},
        "backbone_digest": "beef",
    }
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]) * state["weight"] + state["offset"]
    np.testing.assert_array_equal(scores["score"], expected.numpy())

    (outcome,) = drawn
    np.testing.assert_array_equal(outcome.scores.images, scores["score"])
    assert "tile  seed 0:  image_auroc 100.00" in capsys.readouterr().out


def test_maps_are_kept_only_when_asked_for(tmp_path):
    run = open_run(tmp_path)
    record(run, "tile")
    assert "map" not in run.load_scores("tile", 0)


def test_best_on_test_writes_the_last_state_beside_it(tmp_path, capsys):
    run = open_run(tmp_path)
    drawn = []
    record(run, "tile", select="best_test", draw=drawn.append)
    assert [row["select"] for row in run.rows()] == ["last", "best_test"]
    assert run.load_head("tile", 0, "-last")[1]["select"] == "last"
    assert run.load_head("tile", 0)[1]["select"] == "best_test"
    assert run.load_scores("tile", 0)["score"].shape == (4,)
    assert run.load_scores("tile", 0, "-last")["score"].shape == (4,)
    assert [outcome.select for outcome in drawn] == ["best_test"]
    assert "best on test (optimistic): image_auroc" in capsys.readouterr().out


def test_a_category_alone_gives_the_bits_it_has_among_others(tmp_path):
    both, alone = open_run(tmp_path / "both", (0, 1)), open_run(tmp_path / "alone", (0, 1))
    for seed in (0, 1):
        record(both, "tile", seed)
        record(both, "wood", seed)
    torch.rand(5)
    record(alone, "wood", 1)
    for name in ("weight", "offset"):
        states = [run.load_head("wood", 1)[0][name] for run in (both, alone)]
        assert torch.equal(*states)
        assert not torch.equal(states[0], both.load_head("wood", 0)[0][name])
    scores = [run.load_scores("wood", 1)["score"] for run in (both, alone)]
    np.testing.assert_array_equal(*scores)


def test_loss_that_is_not_finite_names_category_and_seed_and_leaves_the_pair_open(tmp_path):
    run = open_run(tmp_path, (0, 1))
    record(run, "tile", 0)
    with pytest.raises(FloatingPointError, match=r"^tile, seed 1: loss is nan at epoch 3, step 7$"):
        record(run, "tile", 1, build=Failing)
    assert run.pending("tile") == [1]
    assert not run.head_path("tile", 1).exists()


def finish(run, **options):
    arguments = {"title": "fake", "dataset": None, "metrics": ("image_auroc", "pixel_auroc")}
    return finish_tables(run, **{**arguments, "select": "last", **options})


def test_table_is_written_and_printed(tmp_path, capsys):
    run = open_run(tmp_path)
    for category in CATEGORIES:
        record(run, category)
    capsys.readouterr()
    table = finish(run, notes=["weights are odd"])
    printed = capsys.readouterr().out
    for text in (printed, *((tmp_path / f"table.{kind}").read_text() for kind in ("md", "tex"))):
        assert "weights are odd" in text
        assert "wood" in text
        assert "no masks" in text
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "tile,100.0,nan"
    assert f"run folder: {tmp_path}" in printed
    assert "reported: last" in table.caption


def test_table_with_a_hole_is_refused(tmp_path):
    run = open_run(tmp_path)
    record(run, "tile")
    with pytest.raises(RunError, match="wood seed 0"):
        finish(run)
    assert not (tmp_path / "table.md").exists()


def test_table_of_the_best_on_test_says_that_it_is_optimistic(tmp_path):
    run = open_run(tmp_path)
    for category in CATEGORIES:
        record(run, category, select="best_test")
    table = finish(run, select="best_test", metrics=("image_auroc",))
    assert "best on test (optimistic)" in table.caption
    assert [column.group for column in table.header] == ["last", "best on test (optimistic)"]


def row(category, seed=0, select="last", skipped=0, empty_masks=0, undefined="", remarks=""):
    return {
        "category": category,
        "seed": seed,
        "select": select,
        "skipped": skipped,
        "empty_masks": empty_masks,
        "undefined": undefined,
        "remarks": remarks,
    }


def test_notes_count_an_image_once_over_seeds_and_selections():
    rows = [
        row(category, seed, select, skipped, empty)
        for category, skipped, empty in (("tile", 2, 0), ("wood", 1, 5))
        for seed in (0, 1)
        for select in ("last", "best_test")
    ]
    unreadable, empty = row_notes(rows)
    assert unreadable.startswith("3 unreadable images were left out (--skip-unreadable)")
    assert empty.startswith("5 anomalous test images have an empty mask")
    assert row_notes([row("tile")]) == []
    assert row_notes([row("tile", 3, remarks="stuck")]) == ["tile, seed 3: stuck"]


def test_undefined_reasons_come_from_the_rows():
    rows = [
        row("tile", undefined="pixel_auroc: no masks; aupro: no masks"),
        row("wood", undefined="image_auroc: no normal images"),
        row("grid"),
    ]
    assert undefined_reasons(rows) == {
        "pixel_auroc": "no masks",
        "aupro": "no masks",
        "image_auroc": "no normal images",
    }


def test_summary_line_leaves_out_what_is_undefined(tmp_path):
    run, drawn = open_run(tmp_path), []
    record(run, "tile", draw=drawn.append)
    assert math.isnan(drawn[0].metrics["pixel_auroc"])
    line = summary_line("tile", 0, drawn, 1.25)
    assert line == "tile  seed 0:  image_auroc 100.00  (fit 1.2 s)"


class Measured(Drawn):
    """Has norm and angle, and counts how often it is asked for them."""

    asked = 0

    def geometry(self, stages, maps):
        type(self).asked += 1
        assert stages[0].shape[2:] == maps.shape[1:]
        highest = maps.amax(dim=(1, 2))
        return highest + 1, highest / 10


def test_norm_and_angle_are_kept_for_reported_outcomes_only(tmp_path):
    run = open_run(tmp_path)
    Measured.asked = 0
    record(run, "tile", build=Measured, select="best_test", monitor_test=True)
    assert Measured.asked == 2  # the last and the best state, not every step
    for suffix in ("", "-last"):
        scores = run.load_scores("tile", 0, suffix)
        np.testing.assert_array_equal(scores["norm"], scores["score"] + 1)
        np.testing.assert_array_equal(scores["angle"], scores["score"] / 10)
    record(run, "wood")
    assert not {"norm", "angle", "map", "mask"} & set(run.load_scores("wood", 0))


def test_masks_are_kept_with_the_maps(tmp_path):
    run = open_run(tmp_path)
    masks = torch.zeros(4, 2, 2, dtype=torch.bool)
    masks[3, 1, 0] = True
    record(run, "tile", test=small_test_set(masks=masks), save_maps=True)
    kept = run.load_scores("tile", 0)["mask"]
    assert kept.dtype == bool
    np.testing.assert_array_equal(kept, masks.numpy())
    record(run, "wood", test=small_test_set(masks=masks))
    assert "mask" not in run.load_scores("wood", 0)


def test_scores_without_the_newer_arrays_are_read(tmp_path):
    run = open_run(tmp_path)
    record(run, "tile")
    old = {"path": np.array(["a.png"]), "label": np.array([1]), "score": np.array([0.5])}
    np.savez_compressed(run.scores_path("tile", 0), **old, defect=np.array(["hole"]))
    assert set(run.load_scores("tile", 0)) == {"path", "label", "score", "defect"}
