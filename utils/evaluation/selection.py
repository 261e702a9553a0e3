"""Choosing epoch, time and options on synthetic anomalies, without one test image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from utils.cli import UsageError
from utils.evaluation.test_set import Scores, TestSet
from utils.features.features import Features
from utils.seeding import seed_everything

HELD_OUT_SHARE = 0.2
STRIDE = 2
"""Candidates are judged at every second row and column: blurred maps hold no more than that."""


@dataclass(frozen=True)
class Validation:
    """Normal features to fit candidates on, and what they are judged by.

    Attributes:
        kept: the normals that are not held out.
        test: held-out normals (label 0) and synthetic anomalies made from them (label 1).
    """

    kept: Features
    test: TestSet


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
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    num_held = max(1, round(HELD_OUT_SHARE * num_images))
    return order[num_held:].sort().values, order[:num_held].sort().values


def num_copies(num_held: int) -> int:
    """Return how many anomalies to make from each held-out image: about 100 in all, at most 8."""
    return max(1, min(8, round(100 / num_held)))


def validation_set(
    normals: Features,
    kept: torch.Tensor,
    held: torch.Tensor,
    anomalies: Features,
    masks: torch.Tensor | None = None,
    map_size: int | None = None,
    blur_sigma: float = 0.0,
    batch_size: int = 32,
) -> Validation:
    """Join held-out normals and the synthetic anomalies made from them.

    Args:
        normals: all normal training features.
        kept: rows to fit candidates on.
        held: rows held out.
        anomalies: features of the synthetic anomalies.
        masks: (num anomalies, S, S) bool, where they were drawn; None on a 1 x 1 grid.
        map_size: as `TestSet` has it.
        blur_sigma: as `TestSet` has it.
        batch_size: as `TestSet` has it.
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
        map_size=map_size,
        blur_sigma=blur_sigma,
        batch_size=batch_size,
        stride=1 if map_size is None else STRIDE,
    )
    return Validation(normals.subset(kept), test)


def choose(
    build: Callable[[dict[str, Any]], Any],
    candidates: Sequence[dict[str, Any]],
    validation: Validation,
    *,
    seed: int,
    log: Callable[..., None],
    watched: TestSet | None = None,
) -> Choice:
    """Fit every candidate on the kept normals and return the one that finds most anomalies.

    Each step of a fit (an epoch, a time) is a candidate too. With masks the criterion is the pixel
    AUROC of the drawn defects: a hold-out of a few images gives many pixels but few images, and the
    maximum over a map of a rich texture hardly sees a pasted patch (measured: the image AUROC of
    such a hold-out is near chance where the pixel AUROC still ranks times as the test set does).
    Without masks, on a 1 x 1 grid, it is the image AUROC. Every step is logged as event
    "selection".

    Args:
        build: makes an unfitted detector from changed options.
        candidates: changed options, one per point of the grid.
        validation: what to fit on and to judge by.
        seed: of every fit.
        log: takes the values of a step.
        watched: a test set whose metrics are logged beside, and choose nothing.
    """
    choices: list[Choice] = []
    for options in candidates:
        generator = seed_everything(seed)
        detector = build(options)

        def judge(
            step: int,
            values: dict[str, float],
            scores: Scores | None = None,
            watched_scores: Scores | None = None,
            options: dict[str, Any] = options,
            detector: Any = detector,
        ) -> None:
            image, pixel = validation.test.aurocs(
                validation.test.score(detector) if scores is None else scores
            )
            auroc = image if math.isnan(pixel) else pixel
            choices.append(Choice(options | detector.stopped_at(step), auroc, image))
            record: dict[str, float] = {}
            if watched is not None:
                metrics = watched.metrics(
                    watched.score(detector) if watched_scores is None else watched_scores
                )
                record = {f"test_{name}": value for name, value in metrics.values().items()}
            log(
                event="selection",
                step=step,
                options=options,
                synthetic_auroc=auroc,
                synthetic_image_auroc=image,
                **values,
                **record,
            )

        if steps := detector.steps():
            detector.fit(validation.kept, generator=generator)
            scores = validation.test.score_steps(detector)
            beside = repeat(None) if watched is None else watched.score_steps(detector)
            for step, found in enumerate(zip(steps, scores, beside, strict=False), start=1):
                judge(step, *found)
        else:
            detector.fit(validation.kept, generator=generator, monitor=judge)
    return max(choices, key=lambda choice: (choice.auroc, choice.tie_break))
