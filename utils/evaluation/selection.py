"""Choosing epoch, time and options on synthetic anomalies, without one test image."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.detector import Detector, KnowsSteps
from utils.errors import UsageError
from utils.evaluation.scoring import Scores, Scoring, score_all_steps
from utils.evaluation.test_set import TestSet
from utils.features.features import Features
from utils.features.joined import join_features
from utils.features.tiled import of_windows
from utils.seeding import seed_everything

HELD_OUT_SHARE = 0.2
STRIDE = 2
"""Candidates are judged at every second row and column: blurred maps hold no more than that."""


@dataclass(frozen=True)
class Validation:
    """Normal features to fit candidates on, and what they are judged by.

    Attributes:
        kept: the normals that are not held out.
        tests: of each category, held-out normals (label 0) and synthetic anomalies made from them
            (label 1).
    """

    kept: Features
    tests: Sequence[TestSet]


@dataclass(frozen=True)
class Choice:
    """The candidate that won: its options, and the AUROC it was chosen by."""

    options: dict[str, Any]
    auroc: float
    tie_break: float


def hold_out(num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions 0 .. N-1 into kept and held-out ones, the same for every seed.

    Raises:
        UsageError: fewer than two images.
    """
    if num_images < 2:
        raise UsageError(
            "--select synthetic needs at least two normal training images, one to hold out; "
            "use --select last"
        )
    return split_off(num_images, max(1, round(HELD_OUT_SHARE * num_images)))


def split_off(num_images: int, num_held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions 0 .. N-1 at random, the same for every seed: kept ones, held-out ones."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return order[num_held:].sort().values, order[:num_held].sort().values


def num_copies(num_held: int) -> int:
    """Return how many anomalies to make from each held-out image: about 100 in all, at most 8."""
    return max(1, min(8, round(100 / num_held)))


def validation_set(
    normals: Features,
    kept: torch.Tensor,
    held: torch.Tensor,
    anomalies: Features,
    scoring: Scoring,
    masks: torch.Tensor | None = None,
) -> Validation:
    """Join held-out normals and the synthetic anomalies made from them.

    Args:
        normals: all normal training features.
        kept: rows to fit candidates on.
        held: rows held out.
        anomalies: features of the synthetic anomalies.
        scoring: as the test set has it.
        masks: (num anomalies, S, S) bool, where they were drawn; None on a 1 x 1 grid.
    """
    held_bank = normals.subset(held)
    names = [f"normal/{i}" for i in held_bank.indices] + [
        f"synthetic/{i}" for i in anomalies.indices
    ]
    labels = torch.tensor([0] * len(held_bank) + [1] * len(anomalies))
    kinds = ["good"] * len(held_bank) + ["synthetic"] * len(anomalies)
    joined = held_bank.join(anomalies)
    if masks is not None:
        clean = torch.zeros(len(held_bank), *masks.shape[1:], dtype=torch.bool)
        masks = torch.cat([clean, masks])  # (N, S, S)
    test = TestSet(
        joined,
        labels,
        names=names,
        kinds=kinds,
        masks=masks,
        scoring=replace(scoring, stride=1 if scoring.map_size is None else STRIDE),
    )
    return Validation(normals.subset(kept), [test])


def joined_validation(parts: Sequence[Validation | None]) -> Validation | None:
    """Return what a head of several categories is chosen by; None where one has none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    kept = join_features([part.kept for part in known])
    return Validation(kept, [test for part in known for test in part.tests])


def choose(
    build: Callable[[dict[str, Any]], Detector],
    candidates: Sequence[dict[str, Any]],
    validation: Validation,
    *,
    seed: int,
    logs: Sequence[Callable[..., None]],
    watched: Sequence[TestSet] = (),
) -> Choice:
    """Fit every candidate on the kept normals and return the one that finds most anomalies.

    Each step of a fit (an epoch, a time) is a candidate too. With masks the criterion is the pixel
    AUROC of the drawn defects: a hold-out of a few images gives many pixels but few images, and the
    maximum over a map of a rich texture hardly sees a pasted patch (measured: the image AUROC of
    such a hold-out is near chance where the pixel AUROC still ranks times as the test set does).
    Without masks, on a 1 x 1 grid, it is the image AUROC. Every step is logged as event
    "selection". Of a head of several categories the mean of theirs is the criterion.

    Args:
        build: makes an unfitted detector from changed options.
        candidates: changed options, one per point of the grid.
        validation: what to fit on and to judge by.
        seed: of every fit.
        logs: one for each category, takes the values of a step.
        watched: test sets whose metrics are logged beside, and choose nothing; none, or one for
            each category.
    """
    choices: list[Choice] = []
    kept = of_windows(validation.kept, validation.tests[0].scoring.tiles)
    for options in candidates:
        generator = seed_everything(seed)
        judge = _Judge(build(options), options, validation, choices, logs, watched)
        detector = judge.detector
        steps = detector.steps() if isinstance(detector, KnowsSteps) else []
        if not steps:
            detector.fit(kept, generator=generator, monitor=judge)
            continue
        assert isinstance(detector, KnowsSteps)
        detector.fit(kept, generator=generator)
        scores = _score_steps(detector, [*validation.tests, *watched])
        for step, (values, found) in enumerate(zip(steps, scores, strict=False), start=1):
            judge.record(step, values, found)
    return max(choices, key=lambda choice: (choice.auroc, choice.tie_break))


def _score_steps(detector: KnowsSteps, tests: Sequence[TestSet]) -> Iterator[tuple[Scores, ...]]:
    """Yield the scores of each test set, step after step."""
    return zip(*(score_all_steps(detector, t.bank, t.scoring) for t in tests), strict=True)


@dataclass(frozen=True)
class _Judge:
    """Judges each step of a candidate's fit, and adds it to the choices."""

    detector: Detector
    options: dict[str, Any]
    validation: Validation
    choices: list[Choice]
    logs: Sequence[Callable[..., None]]
    watched: Sequence[TestSet]
    scores_steps: bool = True

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Score the detector as it is now; see `models.detector.Monitor`."""
        tests = [*self.validation.tests, *self.watched]
        self.record(step, values, [test.score(self.detector) for test in tests])

    def record(self, step: int, values: dict[str, float], scores: Sequence[Scores]) -> None:
        """Add what scores of the validation sets say, and log it with those of the test sets.

        Args:
            step: of the fit.
            values: to log.
            scores: of each validation set, then of each watched one.
        """
        tests = self.validation.tests
        found = [test.aurocs(one) for test, one in zip(tests, scores, strict=False)]
        aurocs = [image if math.isnan(pixel) else pixel for image, pixel in found]
        options = self.options | self.detector.stopped_at(step)
        by_image = statistics.fmean(image for image, _ in found)
        self.choices.append(Choice(options, statistics.fmean(aurocs), by_image))
        beside: list[dict[str, float]] = [{} for _ in tests]
        for place, test in enumerate(self.watched):
            measured = test.measure(scores[len(tests) + place])
            beside[place] = {f"test_{name}": value for name, value in measured.values.items()}
        for place, log in enumerate(self.logs):
            log(
                event="selection",
                step=step,
                options=self.options,
                synthetic_auroc=aurocs[place],
                synthetic_image_auroc=found[place][0],
                **values,
                **beside[place],
            )
