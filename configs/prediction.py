"""The options of predict.py, evaluate.py and export.py."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

HEAD_SUFFIXES = {"reported": "", "last": "-last", "pixel": "-pixel"}
MIN_OPSET = 18
"""What PyTorch's ONNX exporter writes at least."""


@dataclass(frozen=True)
class PredictOptions:
    """Which head scores which images, what is decided, and what is written."""

    run: Positional[Path]
    """Run folder."""
    images: Positional[tuple[str, ...]]
    """Files, folders (with all below them) or quoted patterns."""
    category: str | None = None
    """Category or normal class whose head scores; needed where the run has several."""
    seed: int | None = None
    """Seed of the head; needed where the run has several."""
    head: Literal["reported", "last", "pixel"] = "reported"
    """Runs with --select best_test have more: the last, and the best by pixel AUROC."""

    calibrate: bool = False
    """The images are normal and new to the run: store their scores, from which p-values follow."""
    false_alarm_rate: float | None = None
    """Share of normal images that may be called anomalous; by default the run's, 0.05."""
    threshold: float | None = None
    """Call anomalous what scores higher; needs no calibration, and promises nothing."""
    fail_on_anomaly: bool = False
    """End with exit code 1 if an image is anomalous."""
    skip_unreadable: bool = False
    """Unreadable images do not make the exit code 2."""

    out: Path | None = None
    """Folder for scores.csv and maps; by default RUN/predictions/<head>, with --json none."""
    maps: Literal["auto", "none", "png16", "overlay", "both"] = "auto"
    """Maps to write beside scores.csv; auto is both, where the run has maps."""
    json: bool = False
    """Print one JSON object per image on stdout, and nothing else there."""

    device: str = "auto"
    """auto ($NOCO_DEVICE, else a GPU where there is one), cpu, cuda, cuda:1."""
    weights: str | None = None
    """File of the backbone's weights, where it is no longer where the run had it."""
    batch_size: int | None = None
    """Images at once; by default as in training."""
    workers: int = 2
    """Processes that decode images, and threads that write maps."""

    def __post_init__(self) -> None:
        if self.threshold is not None and self.false_alarm_rate is not None:
            raise ValueError("--threshold and --false-alarm-rate both decide; give one")
        if self.false_alarm_rate is not None and not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"--false-alarm-rate {self.false_alarm_rate} must lie between 0 and 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"--threshold {self.threshold} is not a finite number")
        if self.workers < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError("--workers cannot be negative, and --batch-size must be at least 1")
        if self.json and self.out is None and self.maps not in {"auto", "none"}:
            raise ValueError(f"--maps {self.maps} with --json needs --out, a folder for them")
        decides = self.threshold is not None or self.false_alarm_rate is not None
        if self.calibrate and (decides or self.json or self.fail_on_anomaly or self.out):
            raise ValueError(
                "--calibrate stores scores of normal images and decides nothing: leave out "
                "--out, --json, --fail-on-anomaly, --threshold and --false-alarm-rate"
            )

    @property
    def suffix(self) -> str:
        """The head's suffix in the run folder."""
        return HEAD_SUFFIXES[self.head]

    def map_kinds(self, *, has_maps: bool) -> frozenset[str]:
        """Return which of "png16" and "overlay" to write.

        Raises:
            ValueError: the run has no maps, and they are asked for by name.
        """
        if self.maps not in {"auto", "none"} and not has_maps:
            raise ValueError(f"--maps {self.maps}: the run is semantic, its images have no maps")
        if self.maps == "none" or not has_maps:
            return frozenset()
        return frozenset({"png16", "overlay"} if self.maps in {"auto", "both"} else {self.maps})


@dataclass(frozen=True)
class EvaluateOptions:
    """Which run is evaluated again, and from which images."""

    run: Positional[Path]
    """Run folder."""
    data_root: Path | None = None
    """Folder of the data set, where it is no longer where the run had it."""
    out: Path | None = None
    """File for the numbers; RUN/evaluation.csv by default."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1; equal to the last digit are only numbers of one kind of device."""
    weights: str | None = None
    """File of the backbone's weights, where it is no longer where the run had it."""
    workers: int = 2
    """Processes that decode images."""
    cache: Literal["auto", "device", "host", "disk", "none"] = "auto"
    """Where extracted features are kept, as in the training scripts."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError("--workers cannot be negative")


@dataclass(frozen=True)
class ExportOptions:
    """Which head becomes a file of which format."""

    run: Positional[Path]
    """Run folder."""
    format: Literal["onnx", "torchscript"] = "onnx"
    """onnx runs anywhere; torchscript in PyTorch and LibTorch, which call it deprecated."""
    category: str | None = None
    """Category or normal class whose head is exported; needed where the run has several."""
    seed: int | None = None
    """Seed of the head; needed where the run has several."""
    head: Literal["reported", "last", "pixel"] = "reported"
    """Runs with --select best_test have more: the last, and the best by pixel AUROC."""

    out: Path | None = None
    """File to write; by default RUN/export/<head>.onnx or .pt."""
    opset: int = 18
    """ONNX operator set, 18 or newer."""
    images: tuple[str, ...] = ()
    """Images to check the file on; by default test images of the run."""
    weights: str | None = None
    """File of the backbone's weights, where it is no longer where the run had it."""

    def __post_init__(self) -> None:
        if self.opset < MIN_OPSET:
            raise ValueError(f"--opset {self.opset}: PyTorch writes {MIN_OPSET} or newer")

    @property
    def suffix(self) -> str:
        """The head's suffix in the run folder."""
        return HEAD_SUFFIXES[self.head]
