"""A detector on a test set: scores, metrics, and which state of the head they belong to."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from utils.cli import UsageError
from utils.features.features import Features
from utils.metrics.metrics import METRIC_NAMES, Metrics, evaluate, ranking_metrics
from utils.evaluation.smoothing import image_scores, upsample_and_blur

State = dict[str, Tensor]


class Scorer(Protocol):
    """What scoring asks of a detector."""

    final_maps: bool
    """Maps are at image size and smoothed already."""

    def score_stages(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return maps (B, h, w) and the detector's own image scores (B,), if it has any."""
        ...

    def geometry(self, stages: Sequence[Tensor], maps: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return norm (B,) and angle to the objective (B,), or None without an objective."""
        ...


class StepScorer(Scorer, Protocol):
    """A scorer that knows all steps of its last fit."""

    def score_steps(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the maps after each of T steps, (T, B, h, w)."""
        ...


class Head(Scorer, Protocol):
    """A scorer whose state can be kept and restored; every `nn.Module` can."""

    def state_dict(self) -> Any:
        """Return its tensors by name."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take tensors that `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of N test images.

    Attributes:
        images: (N,) float32, on the CPU.
        maps: (N, S, S) float32, where the detector is, so that the metrics sort there; (N, 1, 1) on
            a 1 x 1 grid.
        norms: (N,) float32, on the CPU: norm of the projection where the map is highest; None
            where it was not asked for or the detector has no objective.
        angles: (N,) float32, on the CPU, in radians: its angle to the objective, likewise.
    """

    images: Tensor
    maps: Tensor
    norms: Tensor | None = None
    angles: Tensor | None = None


class TestSet:
    """Features, labels and masks of the test images of one task.

    Args:
        bank: features of N images.
        labels: (N,), 1 = anomalous.
        names: (N,) file or position of each image, for the scores file.
        kinds: (N,) kind of defect or class of each image.
        masks: (N, S, S) bool, or None where there are none.
        map_size: side in pixels that maps are upsampled to; None on a 1 x 1 grid.
        blur_sigma: of the Gaussian blur of maps, in pixels.
        batch_size: images scored at once.
        stride: maps are made, and masks looked at, at every stride-th row and column only.
    """

    __test__ = False  # not a test case, whatever its name tells pytest

    def __init__(
        self,
        bank: Features,
        labels: Tensor,
        *,
        names: Sequence[Path | str],
        kinds: Sequence[str],
        masks: Tensor | None = None,
        map_size: int | None = None,
        blur_sigma: float = 0.0,
        batch_size: int = 32,
        stride: int = 1,
    ) -> None:
        self.bank = bank
        self.labels = labels
        self.names = [str(name) for name in names]
        self.kinds = list(kinds)
        self.masks = None if masks is None else masks[:, ::stride, ::stride]
        self.map_size = map_size
        self.blur_sigma = blur_sigma
        self.batch_size = batch_size
        self.stride = stride

    @torch.inference_mode()
    def score(self, detector: Scorer, *, geometry: bool = False) -> Scores:
        """Score every image: the maximum of its upsampled, blurred map, or the method's own score.

        Args:
            detector: what scores.
            geometry: also take norm and angle of each image, where the detector has them.

        Raises:
            FloatingPointError: a score is not finite.
        """
        images: list[Tensor] = []
        norms: list[Tensor] = []
        angles: list[Tensor] = []
        maps, done = torch.empty(0), 0
        for stages in self.bank.stage_batches(self.batch_size):
            raw, own = detector.score_stages(stages)  # (B, h, w), (B,)
            if geometry and (found := detector.geometry(stages, raw)) is not None:
                norms.append(found[0].cpu())  # (B,)
                angles.append(found[1].cpu())  # (B,)
            if own is not None and self.map_size is None:
                raw = rearrange(own, "b -> b 1 1")  # where nothing is localised the score is all
            smooth = self._smooth(raw, detector)  # (B, S, S)
            if not images:
                maps = smooth.new_empty(len(self.bank), *smooth.shape[1:])  # (N, S, S)
            maps[done : done + len(smooth)] = smooth
            done += len(smooth)
            images.append((image_scores(smooth) if own is None else own.float()).cpu())  # (B,)
        scores = Scores(
            torch.cat(images),
            maps,
            torch.cat(norms) if norms else None,
            torch.cat(angles) if angles else None,
        )
        _check_finite(scores)
        return scores

    @torch.inference_mode()
    def score_steps(self, detector: StepScorer) -> Iterator[Scores]:
        """Yield the scores after each step of the detector's last fit, as `score` gives them.

        Raises:
            FloatingPointError: a score is not finite.
        """
        batches = self.bank.stage_batches(self.batch_size)
        raw = torch.cat([detector.score_steps(stages) for stages in batches], dim=1)
        for maps in raw:  # (N, h, w), of one step
            smooth = self._smooth(maps, detector)  # (N, S, S)
            scores = Scores(image_scores(smooth).cpu(), smooth)
            _check_finite(scores)
            yield scores

    def _smooth(self, maps: Tensor, detector: Scorer) -> Tensor:
        """Upsample and blur maps (B, h, w) to (B, S, S), float32."""
        blur_sigma = 0.0 if detector.final_maps else self.blur_sigma
        return upsample_and_blur(maps, self.map_size, blur_sigma, stride=self.stride).float()

    def metrics(self, scores: Scores) -> Metrics:
        """Compute all metrics; those that need masks are nan without them."""
        return evaluate(scores.images, self.labels, scores.maps, self.masks)

    def aurocs(self, scores: Scores) -> tuple[float, float]:
        """Return image and pixel AUROC alone: the criterion of a choice, without the other metrics.

        The second is nan without masks.
        """
        image = ranking_metrics(scores.images, self.labels).auroc
        if self.masks is None:
            return image, math.nan
        return image, ranking_metrics(scores.maps, self.masks).auroc

    @property
    def empty_masks(self) -> list[int]:
        """Positions of anomalous images whose mask is empty at this size: no map can find them."""
        if self.masks is None:
            return []
        # NumPy stops at the first True of each mask.
        marked = torch.from_numpy(self.masks.numpy().any(axis=(1, 2)))  # (N,)
        empty = ~marked & (self.labels == 1)
        return empty.nonzero().flatten().tolist()


def _check_finite(scores: Scores) -> None:
    # The extremes carry any nan or infinity, and finding them takes no memory.
    extremes = [*scores.maps.aminmax(), *scores.images.aminmax()]
    if not all(extreme.isfinite() for extreme in extremes):
        raise FloatingPointError("a test score is not finite; the head has diverged")


@dataclass(frozen=True)
class Outcome:
    """What one way of selecting gives.

    Attributes:
        select: "last", "synthetic" or "best_test".
        metrics: by name, in [0, 1] or nan.
        undefined: metric -> why it is nan.
        scores: of the test images, from the state whose image AUROC counts.
        states: file suffix -> state of the head.
        steps: what each number was taken at, e.g. {"step": 50, "pixel_step": 50}.
        score_seconds: what scoring the test set took, from features to smooth maps; the backbone's
            time is in it where the features are not stored.
        contour_threshold: where pictures draw the contour of a map: the threshold of the best pixel
            F1, or None where that is undefined. Chosen on the test set, it is for looking only.
    """

    select: str
    metrics: dict[str, float]
    undefined: dict[str, str]
    scores: Scores
    states: dict[str, State]
    steps: dict[str, int]
    score_seconds: float
    contour_threshold: float | None


@dataclass(frozen=True)
class _Best:
    value: float
    step: int
    state: State
    metrics: Metrics


class Monitor:
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
        detector: Head,
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
        self._monitor_test = monitor_test
        self._step = 0
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
        if self._watched or self._monitor_test:
            record |= self._evaluate_step(step).values()
        self._log(event="step", step=step, **record)

    def outcomes(self) -> list[Outcome]:
        """Evaluate what was kept: the last state, then the best on the test set if asked for."""
        last = self._snapshot()
        if not self._watched:
            return [self._outcome_of_last(self._select, "", last)]
        outcomes = [self._outcome_of_last("last", "-last", last)]
        image, pixel = self._best["image"], self._best.get("pixel", self._best["image"])
        self._detector.load_state_dict(image.state)
        metrics = {
            name: getattr(image.metrics if name.startswith("image") else pixel.metrics, name)
            for name in METRIC_NAMES
        }
        undefined = image.metrics.undefined | pixel.metrics.undefined
        states = {"": image.state, "-pixel": pixel.state}
        steps = {"step": image.step, "pixel_step": pixel.step}
        scores, seconds = self._score()
        threshold = image.metrics.pixel_f1_threshold
        outcomes.append(
            Outcome("best_test", metrics, undefined, scores, states, steps, seconds, threshold)
        )
        return outcomes

    @property
    def fit_seconds(self) -> float:
        """Seconds since the monitor was made, without those spent on the test set."""
        return time.perf_counter() - self._start - self._seconds

    def _evaluate_step(self, step: int) -> Metrics:
        start = time.perf_counter()
        metrics = self._test.metrics(self._test.score(self._detector))
        for kind, name in self._watched.items():
            value = getattr(metrics, name)
            if kind not in self._best or value > self._best[kind].value:
                self._best[kind] = _Best(value, step, self._snapshot(), metrics)
        self._seconds += time.perf_counter() - start
        return metrics

    def _outcome_of_last(self, select: str, suffix: str, state: State) -> Outcome:
        scores, seconds = self._score()
        metrics = self._test.metrics(scores)
        return Outcome(
            select,
            metrics.values(),
            metrics.undefined,
            scores,
            {suffix: state},
            {"step": self._step, "pixel_step": self._step},
            seconds,
            metrics.pixel_f1_threshold,
        )

    def _score(self) -> tuple[Scores, float]:
        start = time.perf_counter()
        # Its check of all scores waits for the device.
        scores = self._test.score(self._detector, geometry=True)
        return scores, time.perf_counter() - start

    def _snapshot(self) -> State:
        return copy.deepcopy(self._detector.state_dict())
