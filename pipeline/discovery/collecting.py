"""Once over all images: what is inside each, its pieces as files, and a vector of each."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from configs.anomalyncd import AnomalyNcdOptions
from configs.discovery import ContrastOptions, WholeImageOptions
from configs.options import MethodOptions
from datasets.reading.images import read_image
from models.discovery.pieces import Piece
from pipeline.discovery.cutting import Cut, Cutter, Scale
from pipeline.discovery.looking import Batch, Looked, frozen_of
from utils.discovery.contrast import (
    Standard,
    contrasts,
    surroundings,
    turned,
    whatever_way_up,
    whole_images,
)
from utils.discovery.regions import Box, boxes_of, crop, save_png

INSIDE = 255
QUARTERS = 4


@dataclass(frozen=True)
class Region:
    """A piece of an image.

    Attributes:
        image: number of the image.
        number: of the region in the image, from 0, the largest box first.
        box: what it shows, in pixels of the image.
        peak: highest value of the map in it; of a whole image, of all of its map.
        piece: its files; a whole image has an empty mask.
    """

    image: int
    number: int
    box: Box
    peak: float
    piece: Piece


@dataclass(frozen=True)
class Place:
    """Where a contrast is taken: of an image's whole mask, or of a region.

    Attributes:
        row: of the image in its batch.
        inside: (S, S) float32, how much each pixel counts.
        around: (S, S) float32, likewise of the surroundings.
    """

    row: int
    inside: np.ndarray
    around: np.ndarray


@dataclass(frozen=True)
class Collected:
    """What was found of N images in R regions.

    Attributes:
        scores: (N,) of the images.
        has_mask: (N,) whether anything of an image is inside.
        regions: those of images with a mask, and of the others where whole images are wanted.
        image_vectors: (N, D) contrast of all that is inside; 0 of images without a mask.
        region_vectors: (R, D) contrast of each region; likewise.
        whole_vectors: (N, D) of whole images.
    """

    scores: list[float] = field(default_factory=list)
    has_mask: list[bool] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    image_vectors: list[np.ndarray] = field(default_factory=list)
    region_vectors: list[np.ndarray] = field(default_factory=list)
    whole_vectors: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Collector:
    """Takes images apart.

    Attributes:
        method: options of the method.
        looked: the images.
        cut: what is inside.
        standard: of their features.
        scale: of scores of pieces; None gives each the score 1.
        folder: for the pieces, `images/` and `masks/`.
    """

    method: MethodOptions
    looked: Looked
    cut: Cutter
    standard: Standard
    scale: Scale | None
    folder: Path

    @property
    def contrast(self) -> ContrastOptions:
        """How contrasts are made; other methods need some to count kinds by."""
        return self.method if isinstance(self.method, ContrastOptions) else ContrastOptions()

    @property
    def wants_whole(self) -> bool:
        """Whether an image without a mask is a piece too."""
        return isinstance(self.method, AnomalyNcdOptions)

    @torch.inference_mode()
    def collect(self) -> Collected:
        """Go over the images; of each, vectors and the names of files are kept.

        Raises:
            DataError: an image can no longer be read.
        """
        found = Collected()
        for name in ("images", "masks"):
            if (self.folder / name).is_dir():  # of an earlier finding
                shutil.rmtree(self.folder / name)
            (self.folder / name).mkdir(parents=True)
        with tqdm(total=len(self.looked.paths), desc="regions", leave=False, disable=None) as bar:
            for batch in self.looked.batches():
                self._take(batch, found)
                bar.update(len(batch.numbers))
        return found

    def _take(self, batch: Batch, found: Collected) -> None:
        places: list[Place] = []  # of each image, then of its regions
        is_region: list[bool] = []
        seen: dict[int, np.ndarray] = {}  # row -> (S, S, 3) uint8, to be turned
        for row, number in enumerate(batch.numbers):
            image = read_image(self.looked.paths[number], self.looked.transform.reading)
            score, anomaly_map = batch.scores[row], batch.maps[row]
            size = image.shape[0], image.shape[1]
            cut = self.cut(number, anomaly_map, score, size)
            regions, masks = self._regions(number, image, cut, anomaly_map)
            ring = surroundings(self.looked.transform.mask(cut.mask), self.contrast.surroundings)
            for mask in (cut.mask, *masks):
                places.append(Place(row, self._weights(mask, cut), ring.astype(np.float32)))
            if self.contrast.turns > 1 and cut.mask.any():
                seen[row] = self.looked.transform.image(image)
            is_region += [False] + [True] * len(masks)
            found.scores.append(score)
            found.has_mask.append(bool(cut.mask.any()))
            found.regions.extend(regions)
        vectors = self._vectors(batch.stages, seen, places)  # (images + regions, D)
        chosen = np.array(is_region)
        found.image_vectors.extend(vectors[~chosen])
        found.region_vectors.extend(vectors[chosen])
        found.whole_vectors.extend(whole_images(batch.stages, self.standard).cpu().numpy())

    def _regions(
        self, number: int, image: np.ndarray, cut: Cut, anomaly_map: np.ndarray
    ) -> tuple[list[Region], list[np.ndarray]]:
        """Write the pieces of an image; return them, and the mask (H, W) of each."""
        if not cut.mask.any() and not self.wants_whole:
            return [], []
        size = image.shape[0], image.shape[1]
        values = self.looked.maps.at_image(anomaly_map, size)  # (H, W)
        scores = None if self.scale is None else self.scale.scores(anomaly_map)
        if scores is not None:
            scores = self.looked.maps.at_image(scores, size)
        regions, masks = [], []
        for place, box in enumerate(boxes_of(cut.mask, cut.most)):
            mask = cut.mask & _within(box, size)
            stem = f"{number:05d}_{place}"
            piece = Piece(
                save_png(self.folder / "images" / f"{stem}.png", crop(image, box)),
                save_png(
                    self.folder / "masks" / f"{stem}.png",
                    crop(mask.astype(np.uint8) * INSIDE, box),
                ),
                1.0 if scores is None else float(crop(scores, box).max().clip(0, 1)),
                int(mask.sum()),
            )
            regions.append(Region(number, place, box, float(crop(values, box).max()), piece))
            masks.append(mask)
        return regions, masks

    def _weights(self, mask: np.ndarray, cut: Cut) -> np.ndarray:
        """Return how much each pixel of the transformed image counts, (S, S) float32."""
        seen = self.looked.transform.mask(mask)  # (S, S)
        weights = seen.astype(np.float32) if cut.weights is None else seen * cut.weights
        if weights.any() or not mask.any():
            return weights
        # A mask thinner than a pixel at this size is lost in the resize; its box is not.
        (rows, columns) = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = np.zeros_like(mask)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        return self.looked.transform.mask(_thickened(box, len(weights))).astype(np.float32)

    def _vectors(
        self, stages: Sequence[Tensor], images: Mapping[int, np.ndarray], places: Sequence[Place]
    ) -> np.ndarray:
        """Return the contrast of each place, (P, D); 0 where nothing is inside.

        Args:
            stages: (B, C_l, H_l, W_l) features.
            images: row -> (S, S, 3) uint8, those that are looked at turned.
            places: P of them.
        """
        channels = [stage.shape[1] for stage in stages]
        found = np.zeros((len(places), sum(channels)), dtype=np.float32)
        if isinstance(self.method, WholeImageOptions):
            return found  # which looks at nothing inside
        filled = [i for i, place in enumerate(places) if place.inside.any()]
        for start in range(0, len(filled), self.looked.batch_size):
            some = filled[start : start + self.looked.batch_size]
            found[some] = self._contrast(stages, images, [places[i] for i in some], channels)
        return found

    def _contrast(
        self,
        stages: Sequence[Tensor],
        images: Mapping[int, np.ndarray],
        places: Sequence[Place],
        channels: Sequence[int],
    ) -> np.ndarray:
        device = stages[0].device
        rows = sorted({place.row for place in places})
        index = torch.tensor([rows.index(place.row) for place in places], device=device)
        inside = torch.from_numpy(np.stack([place.inside for place in places])).to(device)
        around = torch.from_numpy(np.stack([place.around for place in places])).to(device)
        vectors = []
        for turn in range(0, QUARTERS, QUARTERS // self.contrast.turns):
            if turn == 0:
                shown = [stage[rows] for stage in stages]
            else:
                pixels = rearrange([images[row] for row in rows], "b h w c -> b c h w")
                shown = frozen_of(self.looked.extractor).stage_maps(
                    turned(torch.from_numpy(pixels), turn)
                )
            vectors.append(
                contrasts(
                    [stage[index] for stage in shown],
                    turned(inside, turn),
                    turned(around, turn),
                    self.standard,
                )
            )
        return whatever_way_up(vectors, channels).cpu().numpy()


def _within(box: Box, size: tuple[int, int]) -> np.ndarray:
    """Return which pixels of an image a box shows, (H, W) bool."""
    left, top, right, bottom = (round(x) for x in (box.left, box.top, box.right, box.bottom))
    shown = np.zeros(size, dtype=bool)
    shown[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    return shown


def _thickened(mask: np.ndarray, side: int) -> np.ndarray:
    """Widen a mask (H, W) by as much as a pixel of the transformed image shows of it."""
    by = 2 * int(np.ceil(max(mask.shape) / side)) + 1
    return cv2.dilate(mask.astype(np.uint8), np.ones((by, by), np.uint8)).astype(bool)
