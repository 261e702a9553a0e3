"""The files that predict.py writes: scores as they come, maps that can be read back, overlays.

scores.csv          a row per image: number, path, score, p_value, decision, map, error
maps/<map>.png      16-bit map at the size of the original image
overlays/<map>.png  the same map over the image
maps.json           the scale of both, the same for all images of a run's head
"""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from utils.errors import RunError
from utils.runs.files import atomic_path, write_text

if TYPE_CHECKING:
    from utils.evaluation.calibration import DecisionRule

COLUMNS = ("number", "path", "score", "p_value", "decision", "map", "error")
LEVELS = 65534
"""16-bit values of a map beside 0, which says that there is no data."""
_MARGIN = 2.0  # times the largest maximum, beyond the maxima: what maps may reach
_COLOUR_MAP = "inferno"
_OPACITY = 0.75
_CONTOUR = (255, 255, 255)
_DIMMED = 0.35


@dataclass(frozen=True)
class Prediction:
    """What was found of one image; unreadable ones have an error and no score.

    Attributes:
        number: position among the images given.
        path: of the image.
        score: higher = more anomalous.
        anomaly_map: (S, S) of the transformed image; None where the run has no maps.
        error: why it could not be read.
    """

    number: int
    path: Path
    score: float | None = None
    anomaly_map: np.ndarray | None = None
    error: str | None = None

    def row(self, rule: "DecisionRule") -> dict[str, Any]:
        """Return what scores.csv says of the image; None is an empty cell."""
        return {
            "number": self.number,
            "path": str(self.path),
            "score": self.score,
            "p_value": None if self.score is None else rule.p_value(self.score),
            "decision": None if self.score is None else rule.decision(self.score),
            "map": None,
            "error": self.error,
        }


@dataclass(frozen=True)
class MapScale:
    """How values become pixels and colours.

    Attributes:
        low: value of pixel 1 of a 16-bit map.
        high: value of pixel 65535; beyond both, values are clipped.
        coldest: value up to which an overlay shows the bare image.
        hottest: value from which its colour is the hottest.
    """

    low: float
    high: float
    coldest: float
    hottest: float

    @classmethod
    def of_maxima(cls, maxima: np.ndarray, labels: np.ndarray) -> "MapScale":
        """Choose a scale from the maxima of some of a head's maps.

        The 16-bit range reaches beyond them by twice their largest size on both sides. Overlays
        colour what exceeds the median normal image's maximum.

        Args:
            maxima: (N,), of maps.
            labels: (N,), 1 = anomalous.
        """
        values = np.asarray(maxima, dtype=np.float64)
        margin = _MARGIN * max(float(np.abs(values).max()), 1e-12)
        coldest = float(np.median(values[labels == 0] if (labels == 0).any() else values))
        hottest = max(float(np.percentile(values, 95)), coldest + 1e-6 * margin)
        return cls(float(values.min()) - margin, float(values.max()) + margin, coldest, hottest)

    def encode(self, anomaly_map: np.ndarray) -> tuple[np.ndarray, int]:
        """Return a map (H, W), NaN for no data, as uint16, and how many values were clipped."""
        places = (anomaly_map.astype(np.float64) - self.low) / (self.high - self.low)
        clipped = int(((places < 0) | (places > 1)).sum())
        pixels = 1 + np.rint(places.clip(0, 1) * LEVELS)
        return np.nan_to_num(pixels, nan=0).astype(np.uint16), clipped

    def decode(self, pixels: np.ndarray) -> np.ndarray:
        """Return the values of `encode`, (H, W) float64, NaN for no data."""
        values = self.low + (pixels.astype(np.float64) - 1) * ((self.high - self.low) / LEVELS)
        return np.where(pixels == 0, np.nan, values)


@dataclass(frozen=True)
class Pictures:
    """What maps are written, and from what.

    Attributes:
        kinds: of "png16" and "overlay".
        read: gives the original image of a path, (H, W, 3) uint8, or raises one of `errors`.
        restore: brings a map (S, S) to the size (H, W) of its original, NaN for no data.
        errors: what `read` raises.
        test_maxima: (N,) maxima of the maps of the run's test images, and their labels (N,).
        threshold: of scores; overlays draw its contour. Where a score is not its map's maximum, the
            contour's level is the share of the maximum that the threshold is of the score, so that
            it vanishes where the decision turns.
        threads: that write at once.
    """

    kinds: frozenset[str]
    read: Callable[[Path], np.ndarray]
    restore: Callable[[np.ndarray, tuple[int, int]], np.ndarray]
    errors: tuple[type[Exception], ...]
    test_maxima: tuple[np.ndarray, np.ndarray]
    threshold: float | None
    threads: int


class PredictionFiles:
    """A folder of predictions, open for writing; use as a context.

    Rows go to scores.csv.part as they come, so that a kill loses at most the batch being scored;
    at the end it becomes scores.csv.

    Args:
        folder: made when absent.
        pictures: the maps to write; None for none.
        about: what maps.json says beside the scale.

    Raises:
        RunError: the folder cannot be written.
    """

    def __init__(self, folder: Path, pictures: Pictures | None, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self._pictures = pictures
        self._about = dict(about)
        self._clipped = 0
        self._scale: MapScale | None = None
        self._own_scores = False
        self._partial = folder / "scores.csv.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Names that are no valid UTF-8 keep their bytes.
            self._file = self._partial.open(
                "w", encoding="utf-8", errors="surrogateescape", newline=""
            )
        except OSError as error:
            raise RunError(f"--out {folder}: cannot be written ({error.strerror})") from error
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._writer.writeheader()
        self._pool = ThreadPoolExecutor(1 if pictures is None else max(1, pictures.threads))

    def __enter__(self) -> "PredictionFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        self._file.close()
        if kind is None:
            self._partial.replace(self.folder / "scores.csv")
            self._describe()

    def add(self, found: Sequence[Prediction], rows: Sequence[dict[str, Any]]) -> None:
        """Write the maps of some images, and then their rows.

        Args:
            found: the images.
            rows: of each; `map` is filled in, or `error` where the original is gone by now.
        """
        drawn = [
            (row, one.anomaly_map)
            for row, one in zip(rows, found, strict=True)
            if one.anomaly_map is not None
        ]
        if self._pictures is not None and drawn:
            if self._scale is None:
                self._choose_scale(drawn)
            self._clipped += sum(self._pool.map(lambda item: self._draw(*item), drawn))
        self._writer.writerows(rows)
        self._file.flush()  # the system has the rows from here on, whatever becomes of us

    def _choose_scale(self, drawn: Sequence[tuple[dict[str, Any], np.ndarray]]) -> None:
        assert self._pictures is not None
        maxima = np.array([anomaly_map.max() for _, anomaly_map in drawn])
        if np.allclose(maxima, [row["score"] for row, _ in drawn], rtol=1e-5, atol=0):
            self._scale = MapScale.of_maxima(*self._pictures.test_maxima)
        else:  # the method has image scores of its own, which say nothing of its maps
            self._own_scores = True
            self._scale = MapScale.of_maxima(maxima, np.zeros(len(maxima)))
        self._describe()

    def _draw(self, row: dict[str, Any], anomaly_map: np.ndarray) -> int:
        """Write the maps of an image at its original size; return how many values were clipped."""
        pictures, scale = self._pictures, self._scale
        assert pictures is not None
        assert scale is not None
        path = Path(row["path"])
        try:
            image = pictures.read(path)  # (H, W, 3)
        except pictures.errors as error:
            row["error"] = f"no map: {error}"
            return 0
        restored = pictures.restore(anomaly_map, image.shape[:2])  # (H, W)
        row["map"] = map_name(row["number"], path)
        clipped = 0
        if "png16" in pictures.kinds:
            pixels, clipped = scale.encode(restored)
            _write_png(self.folder / "maps" / f"{row['map']}.png", pixels)
        if "overlay" in pictures.kinds:
            contour = self._contour(row["score"], anomaly_map)
            drawn = overlay(image, restored, scale, contour)
            # OpenCV has BGR.
            _write_png(self.folder / "overlays" / f"{row['map']}.png", drawn[..., ::-1])
        return clipped

    def _contour(self, score: float, anomaly_map: np.ndarray) -> float | None:
        """Return the level of an image's contour; None for none."""
        assert self._pictures is not None
        threshold = self._pictures.threshold
        if threshold is None or not self._own_scores:
            return threshold
        if threshold <= 0 or score <= 0:
            return None  # no share of the other
        return threshold / score * float(anomaly_map.max())

    def _describe(self) -> None:
        if self._scale is None:
            return
        assert self._pictures is not None
        words = "threshold / score * the map's maximum" if self._own_scores else "threshold"
        text = {
            **self._about,
            **asdict(self._scale),
            "threshold": self._pictures.threshold,
            "contour": None if self._pictures.threshold is None else words,
            "value": f"low + (pixel - 1) * (high - low) / {LEVELS}",
            "no_data": "pixel 0 of a map; dimmed in an overlay: the transform cut it away",
            "clipped_pixels": self._clipped,
        }
        write_text(self.folder / "maps.json", json.dumps(text, indent=2) + "\n")


def overlay(
    image: np.ndarray, anomaly_map: np.ndarray, scale: MapScale, threshold: float | None
) -> np.ndarray:
    """Return an image (H, W, 3), uint8, with its map (H, W) over it and dimmed without data."""
    level = (anomaly_map - scale.coldest) / (scale.hottest - scale.coldest)
    level = np.nan_to_num(level, nan=0).clip(0, 1).astype(np.float32)
    from matplotlib import colormaps  # takes seconds to import, and only pictures need it

    # A table of 256 colours: colouring floats of large images takes seconds.
    table = (colormaps[_COLOUR_MAP](np.arange(256) / 255)[:, :3] * 255).astype(np.float32)
    blend = (_OPACITY * level)[..., None]  # cold places keep the image
    drawn = (1 - blend) * image + blend * table[(level * 255).astype(np.uint8)]
    drawn[np.isnan(anomaly_map)] *= _DIMMED
    pixels = drawn.round().astype(np.uint8)
    if threshold is not None:
        above = (np.nan_to_num(anomaly_map, nan=-np.inf) > threshold).astype(np.uint8)
        lines, _ = cv2.findContours(above, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        thickness = max(1, round(min(image.shape[:2]) / 250))
        cv2.drawContours(pixels, lines, -1, (0, 0, 0), thickness + 2)
        cv2.drawContours(pixels, lines, -1, _CONTOUR, thickness)
    return pixels


def map_name(number: int, path: Path) -> str:
    """Return the name of an image's map: its number, so that none meet, and what it is called."""
    return f"{number:06d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', path.stem)[:60]}"


def _write_png(path: Path, pixels: np.ndarray) -> None:
    done, data = cv2.imencode(
        ".png", np.ascontiguousarray(pixels), [cv2.IMWRITE_PNG_COMPRESSION, 1]
    )
    if not done:
        raise RunError(f"{path}: an image of {pixels.shape} cannot be written as PNG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())
