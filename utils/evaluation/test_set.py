"""A test set: what is known of its images, and the metrics of their scores."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from datasets.samples import Region
from models.detector import Detector
from utils.evaluation.scoring import Scores, Scoring, inside_boxes, score_all
from utils.features.features import Features
from utils.metrics.evaluate import Measured, evaluate, ranking_metrics


class TestSet:
    """Features, labels and masks of the test images of one task.

    Args:
        bank: features of N images.
        labels: (N,), 1 = anomalous.
        names: (N,) file or position of each image, for the scores file.
        kinds: (N,) kind of defect or class of each image.
        masks: (N, S, S) bool, or None where there are none; looked at where the maps are made.
        regions: the defects of the masks with their saturations, where the data set has these.
        groups: "logical" and "structural" -> kinds of such anomalies; empty where it does not tell.
        without_mask: (N,) bool, images that lack one although others have some: pixel metrics
            leave them out. None for no image.
        scoring: how maps become scores.
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
        regions: Sequence[Region] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        without_mask: Tensor | None = None,
        scoring: Scoring,
    ) -> None:
        stride = scoring.stride
        self.bank = bank
        self.labels = labels
        self.names = [str(name) for name in names]
        self.kinds = list(kinds)
        self.masks = None if masks is None else masks[:, ::stride, ::stride]
        self.scoring = scoring
        self.regions = regions
        self.groups = {
            name: torch.tensor([kind in members for kind in self.kinds])
            for name, members in (groups or {}).items()
        }
        self._inside = None
        if bank.boxes is not None and scoring.map_size is not None:
            self._inside = inside_boxes(bank.boxes, scoring.map_size, stride)  # (N, s, s)
        # (M,) positions of the images whose masks are known; None for all of them.
        self._known: Tensor | None = None
        if without_mask is not None and without_mask.any():
            self._known = (~without_mask).nonzero().flatten()

    def score(self, detector: Detector, *, geometry: bool = False) -> Scores:
        """Score every image; see `score_all`."""
        return score_all(detector, self.bank, self.scoring, geometry=geometry)

    def measure(self, scores: Scores) -> Measured:
        """Compute all metrics; those that need masks are nan without them."""
        return evaluate(
            scores.images,
            self.labels,
            scores.maps,
            self.masks,
            known=self._known,
            regions=self.regions,
            groups=self.groups,
            inside=self._inside,
        )

    def aurocs(self, scores: Scores) -> tuple[float, float]:
        """Return image and pixel AUROC alone: the criterion of a choice, without the other metrics.

        The second is nan without masks.
        """
        image = ranking_metrics(scores.images, self.labels).auroc
        if self.masks is None:
            return image, math.nan
        maps, masks, inside = scores.maps, self.masks, self._inside
        if self._known is not None:
            maps, masks = maps[self._known.to(maps.device)], masks[self._known]
            inside = None if inside is None else inside[self._known]
        if inside is not None:
            maps, masks = maps[inside.to(maps.device)], masks[inside]  # (P,)
        return image, ranking_metrics(maps, masks).auroc

    @property
    def num_without_mask(self) -> int:
        """How many anomalous images lack a mask although others have one."""
        return 0 if self._known is None else len(self.labels) - len(self._known)

    @property
    def empty_masks(self) -> list[int]:
        """Positions of anomalous images whose mask is empty at this size: no map can find them."""
        if self.masks is None:
            return []
        # NumPy stops at the first True of each mask.
        marked = torch.from_numpy(self.masks.numpy().any(axis=(1, 2)))  # (N,)
        empty = ~marked & (self.labels == 1)
        if self._known is not None:
            empty &= torch.zeros_like(empty).index_fill(0, self._known, True)
        return empty.nonzero().flatten().tolist()
