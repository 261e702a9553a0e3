"""Anomaly maps of the images that are looked at: of a saved head, or of other software."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from torch import Tensor

from datasets.reading.restoring import restore_map
from datasets.samples import DataError
from models.detector import Detector
from pipeline.finished import FinishedRun
from utils.evaluation.scoring import score_batch

MAP_FILES = (".npy", ".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")


class Maps(Protocol):
    """Anomaly maps of the images that are looked at."""

    def of(
        self, stages: Sequence[Tensor], paths: Sequence[Path], boxes: Tensor | None
    ) -> tuple[list[np.ndarray], list[float]]:
        """Return the map (h, w) of each of B images, and its score.

        Args:
            stages: features of the images.
            paths: of the images.
            boxes: (B, 4), as `Features` have them.
        """
        ...

    def at_image(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Bring values on a map to the size (H, W) of its image; 0 where a crop cut it away."""
        ...


class MapsOfRun:
    """Maps that a saved head makes of the features."""

    def __init__(self, detector: Detector, finished: FinishedRun) -> None:
        self.detector = detector
        self.scoring = finished.scoring
        self.transform = finished.transform

    def of(
        self, stages: Sequence[Tensor], paths: Sequence[Path], boxes: Tensor | None
    ) -> tuple[list[np.ndarray], list[float]]:
        """Score the features; see `Maps`."""
        del paths
        scores = score_batch(self.detector, stages, self.scoring, boxes=boxes)
        return list(scores.maps.cpu().numpy()), scores.images.tolist()

    def at_image(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Maps`."""
        return np.nan_to_num(restore_map(self.transform, values.astype(np.float32), size))


class MapsOfFolder:
    """Maps of other software, found by the names of their images.

    Where several maps have an image's name, as `000.png` of each defect, the folders above decide:
    the map whose path agrees with the image's for the most parts, from the end.

    Args:
        folder: of the maps, at any depth.
        images: their images.

    Raises:
        DataError: an image has no map, or two that fit as well.
    """

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        by_stem: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in MAP_FILES and path.is_file():
                by_stem.setdefault(path.stem, []).append(path)
        if not by_stem:
            raise DataError(f"--maps {folder}: no map below it ({', '.join(MAP_FILES)})")
        self.files = {
            image: _only_map(image, by_stem.get(image.stem, []), folder) for image in images
        }

    def of(
        self, stages: Sequence[Tensor], paths: Sequence[Path], boxes: Tensor | None
    ) -> tuple[list[np.ndarray], list[float]]:
        """Read the maps; an image's score is its map's peak. See `Maps`."""
        del stages, boxes
        maps = [read_map(self.files[path]) for path in paths]
        return maps, [float(one.max()) for one in maps]

    def at_image(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Maps`."""
        H, W = size
        return cv2.resize(values.astype(np.float32), (W, H), interpolation=cv2.INTER_NEAREST_EXACT)


def read_map(path: Path) -> np.ndarray:
    """Read an anomaly map (h, w), 8-bit, 16-bit or .npy, with the values of the file.

    Raises:
        DataError: it cannot be read, is no map, or has values that are not finite.
    """
    try:
        values = (
            np.load(path, allow_pickle=False)
            if path.suffix.lower() == ".npy"
            else cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        )
    except (OSError, ValueError, cv2.error) as error:
        raise DataError(f"the map {path} cannot be read: {error}") from error
    if values is None:
        raise DataError(f"the map {path} cannot be read: no image that OpenCV knows")
    if values.ndim == 3 and len(values) == 1:
        values = values[0]  # (1, H, W), as networks return it
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]  # grey, saved in colours
    if values.ndim != 2:
        raise DataError(f"the map {path} is of shape {values.shape}: save one channel, (H, W)")
    if values.dtype.kind not in "uif" or not np.isfinite(values).all():
        raise DataError(f"the map {path} has values that are no finite numbers")
    return values


def _only_map(image: Path, candidates: Sequence[Path], folder: Path) -> Path:
    if not candidates:
        raise DataError(
            f"no map of {image}: none below {folder} is called {image.stem} "
            f"({', '.join(MAP_FILES)}); maps are found by the names of their images"
        )
    agreeing = {path: _parts_in_common(path, image) for path in candidates}
    most = max(agreeing.values())
    best = [path for path, count in agreeing.items() if count == most]
    if len(best) > 1:
        raise DataError(
            f"two maps may be of {image}: {best[0]} and {best[1]}; keep the folders of the images "
            "in the folder of the maps"
        )
    return best[0]


def _parts_in_common(path: Path, image: Path) -> int:
    """Count the folders that two paths share, from their names upwards."""
    count = 0
    for one, other in zip(reversed(path.parent.parts), reversed(image.parent.parts), strict=False):
        if one != other:
            break
        count += 1
    return count
