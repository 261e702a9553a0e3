"""What becomes of a fit: its steps are logged, and the states of the head that count are kept."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from models.detector import Detector
from utils.device import wait_for_device
from utils.errors import UsageError
from utils.evaluation.scoring import Scores
from utils.evaluation.test_set import TestSet
from utils.metrics import metrics
from utils.metrics.evaluate import Measured
from utils.runs.checkpoints import Checkpoint

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
    measured: list[Measured]


class FitMonitor:
    """Follows a fit: logs each step and keeps the states that `--select` asks for.

    With `best_test` every step is evaluated on the test set, as the papers' released code does, and
    the image and the pixel maximum are kept separately. That is optimistic, and said wherever the
    numbers stand; the last state is reported beside them. A head of several categories has a test
    set for each, and the step that counts is the best of their mean.

    Args:
        detector: the head being fitted.
        tests: its test sets, one for each category.
        select: how the detector's options were chosen: "last", "synthetic" (before this fit) or
            "best_test" (during it).
        logs: one for each category, takes the values of a step.
        monitor_test: log the test metrics of every step; chooses nothing.
        checkpoint: where the fit is kept while it runs; an interrupted one is read from it, and its
            steps are logged again.

    Raises:
        RunError: the checkpoint is corrupt.
    """

    def __init__(
        self,
        detector: Detector,
        tests: Sequence[TestSet],
        select: str,
        logs: Sequence[Callable[..., None]],
        *,
        monitor_test: bool = False,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._detector = detector
        self._tests = list(tests)
        self._select = select
        self._logs = list(logs)
        self._step = 0
        self.scores_steps = monitor_test or select == "best_test"
        self._best: dict[str, _Best] = {}
        self._watched: dict[str, str] = {}
        self._seconds = 0.0
        self._start = time.perf_counter()
        self._checkpoint = checkpoint
        self._logged: list[list[dict[str, Any]]] = []
        self._phases: dict[str, dict[str, Any]] = {}
        if select == "best_test":
            self._watched = {"image": "image_auroc"}
            if any(test.labels.unique().numel() < 2 for test in tests):
                raise UsageError("--select best_test needs normal and anomalous test images")
            if all(test.masks is not None and test.masks.any() for test in tests):
                self._watched["pixel"] = "pixel_auroc"
        if checkpoint is not None and (state := checkpoint.load()) is not None:
            self._resume(state)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Record the end of a step (an epoch) and evaluate it if asked for."""
        self._step = step
        measured = self._evaluate_step(step) if self.scores_steps else []
        found = [one.values for one in measured] or [{} for _ in self._logs]
        self._log([{"step": step, **values, **one} for one in found])

    def kept(self, phase: str) -> dict[str, Any] | None:
        """See `models.detector.KeepsFits`."""
        return self._phases.get(phase)

    def keep(self, phase: str, state: Callable[[], dict[str, Any]], *, ended: bool) -> None:
        """See `models.detector.KeepsFits`."""
        if self._checkpoint is None:
            return
        if ended:
            self._phases[phase] = copy.deepcopy(state())
        if not self._checkpoint.is_due:
            return
        self._checkpoint.save(
            {
                "phases": {**self._phases, phase: state()},
                "step": self._step,
                "logged": self._logged,
                "best": {kind: asdict(best) for kind, best in self._best.items()},
                "fit_seconds": self.fit_seconds,
            }
        )

    def outcomes(self) -> list[list[Outcome]]:
        """Evaluate what was kept on each test set: the last state, then the best if asked for."""
        last = self._snapshot()
        if not self._watched:
            return [[self._outcome_of_last(test, self._select, "", last)] for test in self._tests]
        of_last = [self._outcome_of_last(test, "last", "-last", last) for test in self._tests]
        image, pixel = self._best["image"], self._best.get("pixel", self._best["image"])
        self._detector.load_state_dict(image.state)
        states = {"": image.state, "-pixel": pixel.state}
        steps = {"step": image.step, "pixel_step": pixel.step}
        of_best = []
        for test, *measured in zip(self._tests, image.measured, pixel.measured, strict=True):
            scores, seconds = self._score(test)
            of_best.append(Outcome("best_test", merged(*measured), scores, states, steps, seconds))
        return [list(pair) for pair in zip(of_last, of_best, strict=True)]

    @property
    def fit_seconds(self) -> float:
        """Seconds since the monitor was made, without those spent on the test set."""
        wait_for_device()
        return time.perf_counter() - self._start - self._seconds

    def _resume(self, state: dict[str, Any]) -> None:
        """Go on from what `keep` saved."""
        self._phases, self._step = state["phases"], state["step"]
        self._seconds -= state["fit_seconds"]
        for kind, best in state["best"].items():
            measured = [Measured(**one) for one in best["measured"]]
            self._best[kind] = _Best(best["value"], best["step"], best["state"], measured)
        for values in state["logged"]:
            self._log(values)

    def _log(self, values: list[dict[str, Any]]) -> None:
        """Log a step, with the values of each category."""
        for log, one in zip(self._logs, values, strict=True):
            log(event="step", **one)
        if self._checkpoint is not None:
            self._logged.append(values)

    def _evaluate_step(self, step: int) -> list[Measured]:
        wait_for_device()
        start = time.perf_counter()
        measured = [test.measure(test.score(self._detector)) for test in self._tests]
        for kind, name in self._watched.items():
            value = statistics.fmean(one.values[name] for one in measured)
            if kind not in self._best or value > self._best[kind].value:
                self._best[kind] = _Best(value, step, self._snapshot(), measured)
        self._seconds += time.perf_counter() - start
        return measured

    def _outcome_of_last(self, test: TestSet, select: str, suffix: str, state: State) -> Outcome:
        scores, seconds = self._score(test)
        steps = {"step": self._step, "pixel_step": self._step}
        measured = test.measure(scores)
        return Outcome(select, measured, scores, {suffix: state}, steps, seconds)

    def _score(self, test: TestSet) -> tuple[Scores, float]:
        wait_for_device()
        start = time.perf_counter()
        # Its check of all scores waits for the device.
        scores = test.score(self._detector, geometry=True)
        return scores, time.perf_counter() - start

    def _snapshot(self) -> State:
        # On the host: a GPU has no room for copies of large heads.
        state = self._detector.state_dict()
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}


def merged(image: Measured, pixel: Measured) -> Measured:
    """Return the metrics of images of one state of a head, and those of pixels of another."""
    of = {m.name: pixel if m.of in metrics.OF_PIXELS else image for m in metrics.METRICS}
    values = {name: of[name].values[name] for name in image.values}
    return Measured(values, image.undefined | pixel.undefined, image.pixel_f1_threshold)
