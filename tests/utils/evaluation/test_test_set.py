import math
import time

import pytest
import torch

from models.detector import Detector
from tests.utils.banks import bank_of, set_of
from utils.errors import UsageError
from utils.evaluation.monitor import FitMonitor
from utils.evaluation.smoothing import upsample_and_blur
from utils.evaluation.test_set import TestSet
from utils.metrics.evaluate import ranking_metrics
from utils.metrics.metrics import metric_names
from utils.runs.checkpoints import Checkpoint
from utils.runs.run import Run


class FirstChannel(Detector):
    """A detector whose map is the first channel of the features, to the bit."""

    def forward(self, features):
        return features[:, 0]


def scored_images(maps, labels, *, masks=None, **options):
    """A test set whose features (N, 1, H, W) are the maps (N, H, W)."""
    return set_of(bank_of(maps[:, None]), labels, masks=masks, **options)


LABELS = [0, 1, 0, 1, 1, 0, 0]


def perfectly_ranked(transform):
    """Maps (7, 6, 6) of distinct values that rank every defect pixel above all others; masks."""
    masks = torch.zeros(7, 6, 6, dtype=torch.bool)
    for index, label in enumerate(LABELS):
        if label:
            masks[index, 1:3, index % 3 : index % 3 + 2] = True
    ranks = torch.randperm(masks.numel(), generator=torch.Generator().manual_seed(0))
    ranks = ranks.reshape(masks.shape).double() + masks * masks.numel()
    # Values in [0, 1), a clear step from pixel to pixel and a wide one to the defects.
    return transform(ranks / ranks.max()).float(), masks


SCALES = {
    "1e3 to 1e6": lambda unit: 1e3 + unit * 1e6,
    "near 1e6": lambda unit: 1e6 + unit * 1e4,
    "near 1e-6": lambda unit: 1e-6 * (1 + unit),
    "below 1e-6": lambda unit: unit * 1e-6,
    "below zero": lambda unit: -1e6 * (1 - unit),
    "1e-30": lambda unit: unit * 1e-30,
    "over twelve decades": lambda unit: 10.0 ** (12 * unit - 6),
}


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("scale", SCALES)
def test_scores_are_never_squashed(scale, batch_size):
    """A sigmoid, or one scale per batch, would tie or reorder what is ranked perfectly here."""
    maps, masks = perfectly_ranked(SCALES[scale])
    test = scored_images(maps, LABELS, masks=masks, batch_size=batch_size)
    scores = test.score(FirstChannel())
    assert torch.equal(scores.maps, maps)
    assert torch.equal(scores.images, maps.amax(dim=(1, 2)))
    measured = test.measure(scores)
    assert measured.values == dict.fromkeys(metric_names()[:7], 1.0)
    assert measured.undefined == {}


def test_empty_masks_are_anomalies_that_no_map_can_find():
    masks = torch.zeros(5, 4, 4, dtype=torch.bool)
    masks[1, 0, 0] = True
    maps = torch.zeros(5, 4, 4)
    assert scored_images(maps, [0, 1, 1, 0, 1], masks=masks).empty_masks == [2, 4]
    assert scored_images(maps, [0, 1, 0, 0, 0], masks=masks).empty_masks == []
    assert scored_images(maps, [0, 1, 1, 0, 1]).empty_masks == []


def test_contour_separates_the_pixels_where_they_can_be():
    maps, masks = perfectly_ranked(SCALES["1e3 to 1e6"])

    def contour(masks):
        test = scored_images(maps, LABELS, masks=masks)
        ((outcome,),) = FitMonitor(FirstChannel(), [test], "last", [lambda **_: None]).outcomes()
        return outcome.measured.pixel_f1_threshold

    assert torch.equal(maps >= contour(masks), masks)
    assert contour(None) is None
    assert contour(torch.zeros_like(masks)) is None


class Scripted(Detector):
    """A detector whose scores after each epoch are written down: `epochs` is (E, N, H, W).

    Its only state is the epoch, a parameter that training moves in place.
    """

    def __init__(self, epochs):
        super().__init__()
        self.script = epochs
        self.epoch = torch.nn.Parameter(torch.tensor(0.0))
        self.num_scored = 0

    def fit(self, monitor):
        for step in range(1, len(self.script) + 1):
            with torch.no_grad():
                self.epoch.fill_(step)
            monitor(step, {"loss": 1 / step})

    def forward(self, features):
        self.num_scored += 1
        rows = features[:, 0, 0, 0].long()  # the features of an image are its number
        return self.script[int(self.epoch) - 1][rows]


# Two normal images, then two anomalous ones whose first pixel is the defect. Per epoch, the pixels
# of each image; AUROC of the images' maxima and of the pixels, by hand.
SCRIPT = torch.tensor(
    [
        # images 5 6 | 1 7: 2 of 4 pairs.  pixels 0 7 against 5 0 6 0 1 0: 0.75 of 6 + all of 6 / 12
        [[5, 0], [6, 0], [0, 1], [7, 0]],
        # images 1 2 | 3 4: 4 of 4.  pixels 0 0 against 1 0 2 0 3 4: 1 + 1 of 12
        [[1, 0], [2, 0], [0, 3], [0, 4]],
        # images 9 9 | 8 8: 0 of 4.  pixels 8 8 against 9 0 9 0 0 0: 4 + 4 of 12
        [[9, 0], [9, 0], [8, 0], [8, 0]],
        # images 3 1 | 2 4: 3 of 4.  pixels 0 4 against 3 0 1 0 2 0: 1.5 + 6 of 12
        [[3, 0], [1, 0], [0, 2], [4, 0]],
        # images 2 2 | 2 2: half.  pixels 0 0 against 2 0 2 0 2 2: 1 + 1 of 12
        [[2, 0], [2, 0], [0, 2], [0, 2]],
    ],
    dtype=torch.float32,
)[:, :, None, :]  # (5, 4, 1, 2)
IMAGE_AUROC = [2 / 4, 4 / 4, 0, 3 / 4, 2 / 4]
PIXEL_AUROC = [7.5 / 12, 2 / 12, 8 / 12, 7.5 / 12, 2 / 12]
NUMBERS = torch.arange(4.0)[:, None, None].expand(4, 1, 2)
MASKS = torch.tensor([[[0, 0]], [[0, 0]], [[1, 0]], [[1, 0]]], dtype=torch.bool)


def follow(select, *, script=SCRIPT, masks=MASKS, labels=(0, 0, 1, 1)):
    """Fit the scripted detector; returns (outcomes, detector, logged lines)."""
    lines = []
    detector = Scripted(script)
    test = scored_images(NUMBERS, list(labels), masks=masks)
    monitor = FitMonitor(detector, [test], select, [lambda **values: lines.append(values)])
    detector.fit(monitor)
    (outcomes,) = monitor.outcomes()
    return outcomes, detector, lines


def test_last_is_the_last_epoch_and_looks_at_the_test_set_once():
    (last,), detector, lines = follow("last")
    assert last.select == "last"
    assert last.measured.values["image_auroc"] == pytest.approx(IMAGE_AUROC[-1])
    assert last.measured.values["pixel_auroc"] == pytest.approx(PIXEL_AUROC[-1])
    assert last.steps == {"step": 5, "pixel_step": 5}
    assert torch.equal(last.scores.maps, SCRIPT[4])
    assert {suffix: state["epoch"].item() for suffix, state in last.states.items()} == {"": 5}
    assert detector.num_scored == 1
    assert lines == [{"event": "step", "step": s, "loss": 1 / s} for s in range(1, 6)]


def test_best_on_test_keeps_the_image_and_the_pixel_maximum_apart():
    (last, best), _, lines = follow("best_test")
    assert (last.select, best.select) == ("last", "best_test")
    assert last.measured.values["image_auroc"] == pytest.approx(IMAGE_AUROC[-1])
    assert last.steps == {"step": 5, "pixel_step": 5}
    assert best.steps == {"step": 2, "pixel_step": 3}
    for name in best.measured.values:
        source = lines[1] if name.startswith("image") else lines[2]
        assert best.measured.values[name] == source[name], name
    assert best.measured.values["image_auroc"] == 1.0
    assert best.measured.values["pixel_auroc"] == pytest.approx(8 / 12)
    assert torch.equal(best.scores.maps, SCRIPT[1])
    assert torch.equal(last.scores.maps, SCRIPT[4])
    for outcome in (last, best):  # each has the contour of the maps that it gives
        threshold = ranking_metrics(outcome.scores.maps, MASKS).f1_threshold
        assert outcome.measured.pixel_f1_threshold == threshold
    states = last.states | best.states
    epochs = {suffix: state["epoch"].item() for suffix, state in states.items()}
    assert epochs == {"-last": 5, "": 2, "-pixel": 3}
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["image_auroc"] for line in lines] == pytest.approx(IMAGE_AUROC)
    assert [line["pixel_auroc"] for line in lines] == pytest.approx(PIXEL_AUROC)
    assert all(line["event"] == "step" for line in lines)


@pytest.mark.parametrize(
    ("select", "monitor_test", "scores"),
    [("last", False, 0), ("synthetic", False, 0), ("last", True, 5), ("best_test", False, 5)],
)
def test_a_monitor_says_whether_it_scores_the_steps(select, monitor_test, scores):
    detector, lines = Scripted(SCRIPT), []
    test = scored_images(NUMBERS, [0, 0, 1, 1])
    monitor = FitMonitor(
        detector, [test], select, [lambda **line: lines.append(line)], monitor_test=monitor_test
    )
    detector.fit(monitor)
    assert monitor.scores_steps == (scores > 0)
    assert detector.num_scored == scores
    assert all(("image_auroc" in line) == monitor.scores_steps for line in lines)


@pytest.mark.parametrize("select", ["last", "best_test"])
@pytest.mark.parametrize("killed_after", [1, 2, 3, 4])
def test_a_killed_fit_goes_on_with_what_was_kept_and_logged(select, killed_after, tmp_path):
    """As an undisturbed one: steps are logged once more, and the best before the kill counts."""

    class Resumed(Scripted):
        def fit(self, monitor):
            done = (monitor.kept("epochs") or {"epoch": 0})["epoch"]
            for step in range(done + 1, len(self.script) + 1):
                with torch.no_grad():
                    self.epoch.fill_(step)
                monitor(step, {"loss": 1 / step})
                monitor.keep("epochs", lambda step=step: {"epoch": step}, ended=False)
                if step == killed_after and done == 0:
                    raise KeyboardInterrupt

    def attempt():
        lines, detector = [], Resumed(SCRIPT)
        test = scored_images(NUMBERS, [0, 0, 1, 1], masks=MASKS)
        log = [lambda **values: lines.append(values)]
        monitor = FitMonitor(detector, [test], select, log, checkpoint=Checkpoint(run, ["a"], 0, 0))
        detector.fit(monitor)
        return monitor, lines

    run = Run.open(
        tmp_path, {}, categories=["a"], seeds=[0], command=["train"], device="cpu", made_of={}
    )
    with pytest.raises(KeyboardInterrupt):
        attempt()
    monitor, lines = attempt()
    (found,) = monitor.outcomes()
    wanted, _, expected = follow(select)
    assert lines == expected
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.select, one.steps, one.measured) == (other.select, other.steps, other.measured)
        assert one.states == other.states
        assert torch.equal(one.scores.maps, other.scores.maps)


def test_seconds_before_a_kill_count(tmp_path):
    run = Run.open(
        tmp_path, {}, categories=["a"], seeds=[0], command=["train"], device="cpu", made_of={}
    )
    checkpoint = Checkpoint(run, ["a"], 0, 0)
    state = {"phases": {}, "step": 3, "logged": [], "best": {}, "fit_seconds": 100.0}
    checkpoint.save(state)
    test = scored_images(NUMBERS, [0, 0, 1, 1])
    monitor = FitMonitor(FirstChannel(), [test], "last", [lambda **_: None], checkpoint=checkpoint)
    assert 100 < monitor.fit_seconds < 160


def test_first_of_equal_epochs_is_kept():
    (_, best), _, _ = follow("best_test", script=SCRIPT[[3, 1, 1, 0]])
    assert best.steps == {"step": 2, "pixel_step": 1}


def test_of_several_test_sets_the_best_of_the_mean_is_kept():
    """The second set has the labels swapped: what is best on one is worst on the other."""
    lines = {"a": [], "b": []}
    detector = Scripted(SCRIPT)
    tests = [scored_images(NUMBERS, [0, 0, 1, 1]), scored_images(NUMBERS, [1, 0, 1, 0])]
    logs = [lambda *, name=name, **values: lines[name].append(values) for name in lines]
    monitor = FitMonitor(detector, tests, "best_test", logs)
    detector.fit(monitor)
    aurocs = torch.tensor([[line["image_auroc"] for line in of] for of in lines.values()])
    assert aurocs[0].tolist() == pytest.approx(IMAGE_AUROC)
    assert aurocs[0].argmax() != aurocs[1].argmax()
    best_step = int(aurocs.mean(dim=0).argmax()) + 1
    for (last, best), of_set in zip(monitor.outcomes(), aurocs, strict=True):
        assert (last.steps["step"], best.steps["step"]) == (5, best_step)
        assert best.measured.values["image_auroc"] == pytest.approx(float(of_set[best_step - 1]))
        assert last.measured.values["image_auroc"] == pytest.approx(float(of_set[-1]))
        assert torch.equal(best.scores.maps, SCRIPT[best_step - 1])
        assert best.states[""]["epoch"] == best_step


@pytest.mark.parametrize("masks", [None, torch.zeros_like(MASKS)])
def test_without_masks_the_pixel_metrics_are_nan_with_a_reason(masks):
    (last, best), _, _ = follow("best_test", masks=masks)
    assert best.steps == {"step": 2, "pixel_step": 2}
    for outcome in (last, best):
        assert math.isnan(outcome.measured.values["pixel_auroc"])
        assert math.isnan(outcome.measured.values["aupro"])
        assert {"pixel_auroc", "aupro"} <= set(outcome.measured.undefined)
    assert best.measured.values["image_auroc"] == 1.0


@pytest.mark.parametrize("labels", [(0, 0, 0, 0), (1, 1, 1, 1)])
def test_one_class_of_test_images(labels):
    masks = torch.zeros_like(MASKS)
    (last,), _, _ = follow("last", labels=labels, masks=masks)
    assert math.isnan(last.measured.values["image_auroc"])
    assert "images" in last.measured.undefined["image_auroc"]
    with pytest.raises(UsageError, match="best_test needs normal and anomalous test images"):
        follow("best_test", labels=labels, masks=masks)


def test_time_of_the_fit_leaves_the_evaluations_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    score = TestSet.score

    def slow_score(self, detector, **options):
        clock[0] += 100
        return score(self, detector, **options)

    monkeypatch.setattr(TestSet, "score", slow_score)
    detector = Scripted(SCRIPT)
    test = scored_images(NUMBERS, [0, 0, 1, 1], masks=MASKS)
    monitor = FitMonitor(detector, [test], "best_test", [lambda **_: None])
    for step in range(1, 6):
        clock[0] += 2
        monitor(step, {})
    assert monitor.fit_seconds == pytest.approx(10)


class OwnScore(FirstChannel):
    """A detector whose image score is the minimum of its map."""

    def score(self, features):
        maps = self(features)
        return maps, maps.amin(dim=(1, 2))


def test_a_method_may_have_its_own_image_score():
    maps, _ = perfectly_ranked(lambda unit: unit)
    test = scored_images(maps, LABELS, map_size=12, blur_sigma=1.0, batch_size=3)
    own, smooth = test.score(OwnScore()), test.score(FirstChannel())
    assert torch.equal(own.images, maps.amin(dim=(1, 2)))
    assert torch.equal(own.maps, smooth.maps)
    assert torch.equal(smooth.maps, upsample_and_blur(maps, 12, 1.0))
    assert torch.equal(smooth.images, smooth.maps.amax(dim=(1, 2)))


def test_an_own_score_must_be_finite_too():
    class Broken(FirstChannel):
        def score(self, features):
            return self(features), torch.full((len(features),), math.nan)

    with pytest.raises(FloatingPointError, match="a score is not finite"):
        scored_images(torch.zeros(7, 6, 6), LABELS).score(Broken())


def test_final_maps_are_not_smoothed_again():
    class Final(FirstChannel):
        final_maps = True

    maps, _ = perfectly_ranked(lambda unit: unit)
    scores = scored_images(maps, LABELS, map_size=6, blur_sigma=4.0).score(Final())
    assert torch.equal(scores.maps, maps)
    assert torch.equal(scores.images, maps.amax(dim=(1, 2)))


def test_scoring_time_is_in_the_outcome(monkeypatch):
    clock = iter(range(100))
    test = scored_images(torch.rand(7, 6, 6), LABELS)
    monitor = FitMonitor(FirstChannel(), [test], "last", [lambda **_: None])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    ((outcome,),) = monitor.outcomes()
    assert outcome.score_seconds == 1


def test_without_localisation_the_methods_own_score_is_all_that_is_kept():
    maps, _ = perfectly_ranked(lambda unit: unit)
    scores = scored_images(maps, LABELS).score(OwnScore())
    assert torch.equal(scores.images, maps.amin(dim=(1, 2)))
    assert torch.equal(scores.maps, scores.images[:, None, None])
