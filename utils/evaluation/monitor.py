"""What becomes of a fit: its steps are logged, and the states of the head that count are kept."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.detector import Detector
from utils.errors import UsageError
from utils.evaluation.scoring import Scores
from utils.evaluation.test_set import TestSet
from utils.metrics import metrics
from utils.metrics.evaluate import Measured

State = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one way of selecting gives.

    Attributes:
        select: "last", "synthetic" or "best_test".
        measured: the metrics, and the reason for each that is nan.
        scores: of the test images, from the state whose image AUROC counts.
        states: file suffix -> state of the head.
        steps: what each number was taken at, e.g. {"step": 50, "pixel_step": 50}.
        score_seconds: what scoring the test set took, from features to smooth maps; the backbone's
            time is in it where the features are not stored.
    """

    select: str
    measured: Measured
    scores: Scores
    states: dict[str, State]
    steps: dict[str, int]
    score_seconds: float


@dataclass(frozen=True)
class _Best:
    value: float
    step: int
    state: State
    measured: Measured


class FitMonitor:
    """Follows a fit: logs each step and keeps the states that `--select` asks for.

    With `best_test` every step is evaluated on the test set, as the papers' released code does, and
    the image and the pixel maximum are kept separately. That is optimistic, and said wherever the
    numbers stand; the last state is reported beside them.

    Args:
        detector: the head being fitted.
        test: its test set.
        select: how the detector's options were chosen: "last", "synthetic" (before this fit) or
            "best_test" (during it).
        log: takes the values of a step.
        monitor_test: log the test metrics of every step; chooses nothing.
    """

    def __init__(
        self,
        detector: Detector,
        test: TestSet,
        select: str,
        log: Callable[..., None],
        *,
        monitor_test: bool = False,
    ) -> None:
        self._detector = detector
        self._test = test
        self._select = select
        self._log = log
        self._step = 0
        self.scores_steps = monitor_test or select == "best_test"
        self._best: dict[str, _Best] = {}
        self._watched: dict[str, str] = {}
        self._seconds = 0.0
        self._start = time.perf_counter()
        if select == "best_test":
            self._watched = {"image": "image_auroc"}
            if test.labels.unique().numel() < 2:
                raise UsageError("--select best_test needs normal and anomalous test images")
            if test.masks is not None and test.masks.any():
                self._watched["pixel"] = "pixel_auroc"

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Record the end of a step (an epoch) and evaluate it if asked for."""
        self._step = step
        record: dict[str, Any] = dict(values)
        if self.scores_steps:
            record |= self._evaluate_step(step).values
        self._log(event="step", step=step, **record)

    def outcomes(self) -> list[Outcome]:
        """Evaluate what was kept: the last state, then the best on the test set if asked for."""
        last = self._snapshot()
        if not self._watched:
            return [self._outcome_of_last(self._select, "", last)]
        outcomes = [self._outcome_of_last("last", "-last", last)]
        image, pixel = self._best["image"], self._best.get("pixel", self._best["image"])
        self._detector.load_state_dict(image.state)
        best = merged(image.measured, pixel.measured)
        states = {"": image.state, "-pixel": pixel.state}
        steps = {"step": image.step, "pixel_step": pixel.step}
        scores, seconds = self._score()
        outcomes.append(Outcome("best_test", best, scores, states, steps, seconds))
        return outcomes

    @property
    def fit_seconds(self) -> float:
        """Seconds since the monitor was made, without those spent on the test set."""
        return time.perf_counter() - self._start - self._seconds

    def _evaluate_step(self, step: int) -> Measured:
        start = time.perf_counter()
        measured = self._test.measure(self._test.score(self._detector))
        for kind, name in self._watched.items():
            value = measured.values[name]
            if kind not in self._best or value > self._best[kind].value:
                self._best[kind] = _Best(value, step, self._snapshot(), measured)
        self._seconds += time.perf_counter() - start
        return measured

    def _outcome_of_last(self, select: str, suffix: str, state: State) -> Outcome:
        scores, seconds = self._score()
        steps = {"step": self._step, "pixel_step": self._step}
        measured = self._test.measure(scores)
        return Outcome(select, measured, scores, {suffix: state}, steps, seconds)

    def _score(self) -> tuple[Scores, float]:
        start = time.perf_counter()
        # Its check of all scores waits for the device.
        scores = self._test.score(self._detector, geometry=True)
        return scores, time.perf_counter() - start

    def _snapshot(self) -> State:
        return copy.deepcopy(self._detector.state_dict())


def merged(image: Measured, pixel: Measured) -> Measured:
    """Return the metrics of images of one state of a head, and those of pixels of another."""
    of = {m.name: pixel if m.of in metrics.OF_PIXELS else image for m in metrics.METRICS}
    values = {name: of[name].values[name] for name in image.values}
    return Measured(values, image.undefined | pixel.undefined, image.pixel_f1_threshold)
