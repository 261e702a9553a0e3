"""From features to scores: of a batch, and of all images of a bank, a batch after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from models.detector import Detector, HasObjective, HasParts, KnowsSteps, Reconstructs
from utils.evaluation.smoothing import image_scores, upsample_and_blur
from utils.features.features import Features


@dataclass(frozen=True)
class Scoring:
    """How anomaly maps become scores.

    Attributes:
        map_size: side in pixels that maps are upsampled to; None on a 1 x 1 grid, where nothing is
            localised.
        blur_sigma: of the Gaussian blur of maps, in pixels; not of maps that come final.
        batch_size: images scored at once.
        stride: maps are made at every stride-th row and column only.
    """

    map_size: int | None = None
    blur_sigma: float = 0.0
    batch_size: int = 32
    stride: int = 1


@dataclass(frozen=True)
class Scores:
    """Scores of N images.

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


@torch.inference_mode()
def score_batch(
    detector: Detector, stages: Sequence[Tensor], scoring: Scoring, *, geometry: bool = False
) -> Scores:
    """Score B images: the maximum of each upsampled, blurred map, or the method's own score.

    Args:
        detector: fitted.
        stages: the features of the images, as a bank gives them.
        scoring: how maps become scores.
        geometry: also take norm and angle of each image, where the detector has an objective.
    """
    maps, own = detector.score_stages(stages)  # (B, h, w), (B,)
    norms, angles = None, None
    if geometry and isinstance(detector, HasObjective):
        norms, angles = (found.cpu() for found in detector.geometry(stages, maps))  # (B,) each
    if own is not None and scoring.map_size is None:
        maps = rearrange(own, "b -> b 1 1")  # where nothing is localised the score is all
    smooth = _smooth(maps, detector, scoring)  # (B, S, S)
    images = (image_scores(smooth) if own is None else own.float()).cpu()  # (B,)
    return Scores(images, smooth, norms, angles)


def score_all(
    detector: Detector, bank: Features, scoring: Scoring, *, geometry: bool = False
) -> Scores:
    """Score all images of a bank; see `score_batch`.

    Raises:
        FloatingPointError: a score is not finite.
    """
    parts: list[Scores] = []
    maps, done = torch.empty(0), 0
    for stages in bank.stage_batches(scoring.batch_size * detector.batches_at_once):
        part = score_batch(detector, stages, scoring, geometry=geometry)
        if not parts:
            maps = part.maps.new_empty(len(bank), *part.maps.shape[1:])  # (N, S, S)
        maps[done : done + len(part.maps)] = part.maps
        done += len(part.maps)
        parts.append(Scores(part.images, maps, part.norms, part.angles))
    scores = Scores(
        torch.cat([part.images for part in parts]),
        maps,
        _joined([part.norms for part in parts]),
        _joined([part.angles for part in parts]),
    )
    check_finite(scores)
    return scores


@torch.inference_mode()
def part_maps(detector: HasParts, bank: Features, scoring: Scoring) -> Tensor:
    """Return the maps that a detector's own is the mean of, (L, N, S, S) float32, on the CPU."""
    assert isinstance(detector, Detector)
    found = []
    for stages in bank.stage_batches(scoring.batch_size):
        parts = [_smooth(part, detector, scoring) for part in detector.score_parts(stages)]
        found.append(torch.stack(parts).cpu())
    return torch.cat(found, dim=1)


@torch.inference_mode()
def reconstructions(detector: Reconstructs, bank: Features, batch_size: int) -> Tensor:
    """Return what a detector makes of the images of a bank, (N, S, S, 3) uint8, on the CPU."""
    batches = bank.stage_batches(batch_size)
    found = [detector.reconstruct(stages[-1]).cpu() for stages in batches]
    return rearrange(torch.cat(found), "n c h w -> n h w c")


@torch.inference_mode()
def score_all_steps(detector: KnowsSteps, bank: Features, scoring: Scoring) -> Iterator[Scores]:
    """Yield the scores after each step of the detector's last fit, as `score_all` gives them.

    Raises:
        FloatingPointError: a score is not finite.
    """
    assert isinstance(detector, Detector)
    batches = bank.stage_batches(scoring.batch_size)
    raw = torch.cat([detector.score_steps(stages) for stages in batches], dim=1)
    for maps in raw:  # (N, h, w), of one step
        smooth = _smooth(maps, detector, scoring)  # (N, S, S)
        scores = Scores(image_scores(smooth).cpu(), smooth)
        check_finite(scores)
        yield scores


def check_finite(scores: Scores) -> None:
    """Refuse scores of a head that has diverged.

    Raises:
        FloatingPointError: one is not finite.
    """
    # The extremes carry any nan or infinity, and finding them takes no memory.
    extremes = [*scores.maps.aminmax(), *scores.images.aminmax()]
    if not all(extreme.isfinite() for extreme in extremes):
        raise FloatingPointError("a score is not finite; the head has diverged")


def _smooth(maps: Tensor, detector: Detector, scoring: Scoring) -> Tensor:
    """Upsample and blur maps (B, h, w) to (B, S, S), float32."""
    sigma = 0.0 if detector.final_maps else scoring.blur_sigma
    return upsample_and_blur(maps, scoring.map_size, sigma, stride=scoring.stride).float()


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None
