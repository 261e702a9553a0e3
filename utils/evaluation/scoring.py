"""From features to scores: of a batch, and of all images of a bank, a batch after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from configs.tiles import Tiling
from models.detector import Detector, HasObjective, HasParts, KnowsSteps, Reconstructs, Scored
from utils.evaluation.smoothing import image_scores, upsample_and_blur
from utils.features.features import Features, boxes_at, windows_of
from utils.features.tiled import whole_stages


@dataclass(frozen=True)
class Scoring:
    """How anomaly maps become scores.

    Attributes:
        map_size: side in pixels that maps are upsampled to; None on a 1 x 1 grid, where nothing is
            localised.
        blur_sigma: of the Gaussian blur of maps, in pixels; not of maps that come final.
        batch_size: images scored at once.
        stride: maps are made at every stride-th row and column only.
        tiling: windows that images were cut into; None where they are whole.
    """

    map_size: int | None = None
    blur_sigma: float = 0.0
    batch_size: int = 32
    stride: int = 1
    tiling: Tiling | None = None

    @property
    def tiles(self) -> int:
        """Return the number of windows of an image."""
        return 1 if self.tiling is None else self.tiling.count

    def images_at_once(self, factor: int = 1) -> int:
        """Return how many images are read at once: at least one, whatever its windows."""
        return max(1, self.batch_size * factor // self.tiles)


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
    detector: Detector,
    stages: Sequence[Tensor],
    scoring: Scoring,
    *,
    boxes: Tensor | None = None,
    geometry: bool = False,
) -> Scores:
    """Score B images: the maximum of each upsampled, blurred map, or the method's own score.

    Args:
        detector: fitted.
        stages: the features of the images, as a bank gives them: of images that were cut into
            windows, those of the windows below each other.
        scoring: how maps become scores.
        boxes: (B, 4) where each image lies in its square, as `Features` have it; None where they
            fill it. Beside its box a map is as low as its lowest value there; a method that has
            image scores of its own sees the whole square.
        geometry: also take norm and angle of each image, where the detector has an objective.
    """
    windows = windows_of(stages, scoring.tiles)
    maps, own = _scored(detector, windows, scoring)  # (B * T, h, w), (B * T,)
    norms, angles = None, None
    if geometry and isinstance(detector, HasObjective):
        looked_at = maps if boxes is None else _without_beside(maps, boxes, scoring)
        found = detector.geometry(windows, looked_at)  # (B * T,) each
        of_windows = rearrange(looked_at, "(b t) h w -> b t (h w)", t=scoring.tiles).amax(2)
        highest = of_windows.argmax(1, keepdim=True)  # (B, 1)
        norms, angles = (
            rearrange(one, "(b t) -> b t", t=scoring.tiles).gather(1, highest)[:, 0].cpu()  # (B,)
            for one in found
        )
    if own is not None:
        own = rearrange(own, "(b t) -> b t", t=scoring.tiles).amax(1)  # (B,)
    if own is not None and scoring.map_size is None:
        maps = rearrange(own, "b -> b 1 1")  # where nothing is localised the score is all
    smooth = _smooth(maps, detector, scoring, boxes)  # (B, S, S)
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
    for stages in bank.stage_batches(scoring.images_at_once(detector.batches_at_once)):
        rows = torch.arange(done, done + len(stages[0]))
        boxes = boxes_at(bank, rows)
        part = score_batch(detector, stages, scoring, boxes=boxes, geometry=geometry)
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
    found, done = [], 0
    for stages in bank.stage_batches(scoring.images_at_once()):
        windows = windows_of(stages, scoring.tiles)
        boxes = boxes_at(bank, torch.arange(done, done + len(stages[0])))
        parts = [_smooth(part, detector, scoring, boxes) for part in detector.score_parts(windows)]
        done += len(stages[0])
        found.append(torch.stack(parts).cpu())
    return torch.cat(found, dim=1)


@torch.inference_mode()
def reconstructions(detector: Reconstructs, bank: Features, scoring: Scoring) -> Tensor:
    """Return what a detector makes of the images of a bank, (N, S, S, 3) uint8, on the CPU."""
    found = []
    for stages in bank.stage_batches(scoring.images_at_once()):
        (windows,) = windows_of(stages[-1:], scoring.tiles)
        rebuilt = detector.reconstruct(windows).cpu()
        if scoring.tiling is not None:
            (rebuilt,) = whole_stages([rebuilt], scoring.tiling)
        found.append(rebuilt)
    return rearrange(torch.cat(found), "n c h w -> n h w c")


@torch.inference_mode()
def score_all_steps(detector: KnowsSteps, bank: Features, scoring: Scoring) -> Iterator[Scores]:
    """Yield the scores after each step of the detector's last fit, as `score_all` gives them.

    Raises:
        FloatingPointError: a score is not finite.
    """
    assert isinstance(detector, Detector)
    batches = bank.stage_batches(scoring.images_at_once())
    raw = torch.cat(
        [detector.score_steps(windows_of(stages, scoring.tiles)) for stages in batches], dim=1
    )
    for maps in raw:  # (N * T, h, w), of one step
        smooth = _smooth(maps, detector, scoring, bank.boxes)  # (N, S, S)
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


def _scored(detector: Detector, windows: Sequence[Tensor], scoring: Scoring) -> Scored:
    """Score windows, of large images a batch after the other."""
    if scoring.tiling is None:
        return detector.score_stages(windows)
    at_once = scoring.batch_size * detector.batches_at_once
    batches = zip(*(stage.split(at_once) for stage in windows), strict=True)
    parts = [detector.score_stages(batch) for batch in batches]
    own = [part[1] for part in parts if part[1] is not None]
    return torch.cat([part[0] for part in parts]), torch.cat(own) if own else None


def inside_boxes(boxes: Tensor, size: int, stride: int = 1) -> Tensor:
    """Return which pixels of squares of `size` pixels lie in boxes (N, 4): (N, s, s) bool."""
    places = torch.arange(0, size, stride)
    first, length = boxes[:, :2, None], boxes[:, 2:, None]
    rows, columns = ((places >= first) & (places < first + length)).unbind(1)  # (N, s) each
    return rows[:, :, None] & columns[:, None, :]


def _without_beside(maps: Tensor, boxes: Tensor, scoring: Scoring) -> Tensor:
    """Return maps (B * T, h, w) of windows, -inf where a position sees nothing of its image."""
    if scoring.map_size is None:
        return maps
    size, n = scoring.map_size, 1
    starts, side = torch.zeros(1), float(size)  # of windows, in pixels of the map
    if scoring.tiling is not None:
        scale, n = size / scoring.tiling.image_size, scoring.tiling.per_side
        starts, side = scale * torch.tensor(scoring.tiling.starts), scale * scoring.tiling.tile_size
    seen = []
    for axis, count in enumerate(maps.shape[1:]):
        above = starts[:, None] + side / count * torch.arange(count)  # (n, h)
        above = rearrange(above, "r h -> (r h)")
        first, length = boxes[:, axis, None], boxes[:, axis + 2, None]
        seen.append((above + side / count > first) & (above < first + length))
    rows, columns = seen  # (B, n * h), (B, n * w)
    inside = rows[:, :, None] & columns[:, None, :]  # (B, n * h, n * w)
    inside = rearrange(inside, "b (r h) (c w) -> (b r c) h w", r=n, c=n).to(maps.device)
    return maps.masked_fill(~inside, -torch.inf)


def _smooth(
    maps: Tensor, detector: Detector, scoring: Scoring, boxes: Tensor | None = None
) -> Tensor:
    """Upsample and blur maps (B * T, h, w) of windows to (B, S, S), float32."""
    sigma = 0.0 if detector.final_maps else scoring.blur_sigma
    if scoring.tiling is not None:
        n = scoring.tiling.per_side
        maps = rearrange(maps, "(b r c) h w -> b (r h) (c w)", r=n, c=n)
    smooth = upsample_and_blur(
        maps, scoring.map_size, sigma, stride=scoring.stride, tiling=scoring.tiling
    ).float()
    if boxes is None or scoring.map_size is None:
        return smooth
    beside = ~inside_boxes(boxes, scoring.map_size, scoring.stride).to(smooth.device)
    lowest = smooth.masked_fill(beside, torch.inf).amin(dim=(1, 2), keepdim=True)  # (B, 1, 1)
    return torch.where(beside, lowest, smooth)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None
