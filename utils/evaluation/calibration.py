"""Split conformal prediction: thresholds with a guarantee, from normal images held out of the fit.

The p-value of an image is (1 + number of calibration scores at or above its score) / (n + 1), and
the image is anomalous where it is at most the false-alarm rate asked for. If the image is normal
and exchangeable with the n calibration images, that happens with at most that probability, whatever
the detector and the distribution of its scores (Vovk et al., "Algorithmic Learning in a Random
World", 2005; Laxhammar and Falkman, 2011, for anomalies). The probability is over image and
calibration images together: with one draw of few calibration images the rate seen later varies.

calibration/<category>-seed<k>.json of a run folder holds the scores, by head.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import betabinom

from utils.errors import RunError, UsageError
from utils.evaluation.selection import split_off
from utils.runs.files import corrupt, file_digest, file_stem, read_object, write_text

UNLIKELY = 1e-3
"""Probability of as many false alarms as seen below which a table remarks on them."""
SOURCES = ("training", "given")
"""Held out by --calibration-share, or given to predict.py --calibrate."""


@dataclass(frozen=True)
class Calibration:
    """Scores of n normal images that a head has not seen.

    Attributes:
        scores: (n,) float64, ascending.
        source: one of `SOURCES`.
    """

    scores: np.ndarray
    source: str

    @property
    def smallest_rate(self) -> float:
        """The smallest false-alarm rate that n images can promise, 1 / (n + 1)."""
        return 1 / (len(self.scores) + 1)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Return the p-value of each score, (N,) to (N,) float64 in (0, 1]."""
        below = np.searchsorted(self.scores, np.asarray(scores, dtype=np.float64), side="left")
        return (1 + len(self.scores) - below) / (len(self.scores) + 1)

    def threshold(self, rate: float) -> float:
        """Return the calibration score above which, and only above which, p <= rate < 1.

        Raises:
            UsageError: there are too few calibration images for that rate.
        """
        n = len(self.scores)
        allowed = _allowed(n, rate)
        if allowed == 0:
            raise UsageError(
                f"--false-alarm-rate {rate} needs {images_needed(rate)} calibration images or more "
                f"and there are {n}, which allow {self.smallest_rate:.4g} or above; calibrate with "
                "more (predict.py RUN IMAGES... --calibrate)"
            )
        return float(self.scores[n - allowed])


@dataclass(frozen=True)
class DecisionRule:
    """What is said of a score.

    Attributes:
        calibration: gives p-values; None for none.
        threshold: scores above it are anomalous; None where nothing is decided.
    """

    calibration: Calibration | None
    threshold: float | None

    def p_value(self, score: float) -> float | None:
        """Return the p-value of a score; None without calibration."""
        if self.calibration is None:
            return None
        return float(self.calibration.p_values(np.array([score]))[0])

    def decision(self, score: float) -> str | None:
        """Return "normal" or "anomalous"; None where nothing is decided."""
        if self.threshold is None:
            return None
        return "anomalous" if score > self.threshold else "normal"


def decision_rule(
    calibration: Calibration | None,
    *,
    rate: float | None,
    default: float,
    threshold: float | None,
    ways: str,
) -> DecisionRule:
    """Return how scores become p-values and decisions; on stderr, that they cannot.

    Args:
        calibration: of the head, if there is one.
        rate: the false-alarm rate asked for, if one is.
        default: the rate taken else, where the calibration can promise it.
        threshold: given instead.
        ways: to a calibration, for messages.

    Raises:
        UsageError: the rate cannot be promised.
    """
    if threshold is not None:
        return DecisionRule(calibration, threshold)
    if calibration is not None:
        smallest = calibration.smallest_rate
        if rate is None and default < smallest:
            sys.stderr.write(
                f"p-values but no decisions: {len(calibration.scores)} calibration images promise "
                f"no rate of {default:g}; ask for --false-alarm-rate {smallest:.4g} or above\n"
            )
            return DecisionRule(calibration, None)
        return DecisionRule(calibration, calibration.threshold(default if rate is None else rate))
    if rate is not None:
        raise UsageError(f"--false-alarm-rate {rate:g} needs a calibration: {ways}")
    sys.stderr.write(f"not calibrated, so no p-values and no decisions: {ways}\n")
    return DecisionRule(None, None)


def images_needed(rate: float) -> int:
    """Return the least n with 1 / (n + 1) <= rate."""
    n = math.ceil(1 / rate)
    while n > 0 and 1 / n <= rate:  # 1 / rate rounds
        n -= 1
    return n


def held_out_for_calibration(
    num_images: int, share: float, rate: float, *, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions 0 .. N-1 of the training images, the same for every seed.

    Args:
        num_images: N.
        share: to hold out.
        rate: the false-alarm rate that the held-out ones must be able to promise.
        what: category, for the message.

    Returns:
        Those to fit and select on, and those held out, both ascending.

    Raises:
        UsageError: too few are held out, or fewer than two are left.
    """
    num_held, needed = round(share * num_images), images_needed(rate)
    if num_held < needed or num_images - num_held < 2:
        raise UsageError(
            f"{what}: --calibration-share {share:g} holds {num_held} of {num_images} training "
            f"images out and leaves {num_images - num_held}; --false-alarm-rate {rate:g} needs "
            f"{needed} held out, and a fit 2: change one of the two, or leave both out and "
            "calibrate with other normal images (predict.py RUN IMAGES... --calibrate)"
        )
    return split_off(num_images, num_held)


def calibration_file(run_folder: Path, category: str, seed: int, suffix: str = "") -> Path:
    """Return where the calibration scores of a head lie."""
    return run_folder / "calibration" / f"{file_stem(category, seed, suffix)}.json"


def save_calibration(
    path: Path, *, head: Path, source: str, names: Sequence[str], scores: Iterable[float]
) -> Calibration:
    """Write the scores of calibration images, atomically, and return them as a calibration.

    Args:
        path: of the file.
        head: file of the head that gave the scores; later reads refuse another one.
        source: one of `SOURCES`.
        names: (n,), of the images.
        scores: (n,), finite.
    """
    record = {
        "head": file_digest(head),
        "source": source,
        "images": [str(name) for name in names],
        "scores": [float(score) for score in scores],
    }
    write_text(path, json.dumps(record, allow_nan=False) + "\n")
    return Calibration(np.sort(np.asarray(record["scores"], dtype=np.float64)), source)


def load_calibration(path: Path, *, head: Path) -> Calibration | None:
    """Read the calibration of a head; None where there is none.

    Raises:
        RunError: the file is corrupt, or belongs to another head.
    """
    if not path.is_file():
        return None
    record = read_object(path)
    images, scores = record.get("images"), record.get("scores")
    if not (isinstance(images, list) and isinstance(scores, list) and len(images) == len(scores)):
        raise corrupt(path, "it does not hold a score for each image")
    if not scores or not all(type(s) is float and math.isfinite(s) for s in scores):
        raise corrupt(path, "its scores are not finite numbers, one or more")
    if record.get("source") not in SOURCES:
        raise corrupt(path, f"its source is none of {', '.join(SOURCES)}")
    if record.get("head") != file_digest(head):
        raise RunError(
            f"{path}: made with another head than {head}; delete it, and calibrate again "
            "(predict.py RUN IMAGES... --calibrate)"
        )
    return Calibration(np.sort(np.asarray(scores, dtype=np.float64)), record["source"])


def false_alarm_columns(
    calibration: Calibration, normal_scores: np.ndarray, rate: float
) -> dict[str, int | float]:
    """Return what results.csv says of a calibrated head.

    Args:
        calibration: of the head.
        normal_scores: (N,), of the normal test images.
        rate: the false-alarm rate asked for.
    """
    alarms = calibration.p_values(normal_scores) <= rate
    return {
        "calibration_images": len(calibration.scores),
        "test_normals": len(alarms),
        "false_alarm_rate_asked": rate,
        "false_alarm_rate_seen": float(alarms.mean()) if len(alarms) else math.nan,
    }


def false_alarm_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say below a table which false-alarm rate was asked for and which was seen, per `select`."""
    by_select: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "calibration_images" in row and row["test_normals"]:
            by_select.setdefault(row["select"], []).append(row)
    notes = []
    for select, calibrated in by_select.items():
        normals = sum(row["test_normals"] for row in calibrated)
        alarms = sum(row["false_alarm_rate_seen"] * row["test_normals"] for row in calibrated)
        fewest = min(row["calibration_images"] for row in calibrated)
        which = f" ({select})" if len(by_select) > 1 else ""
        notes.append(
            f"False alarms{which}: asked {100 * calibrated[0]['false_alarm_rate_asked']:g} %, seen "
            f"{100 * alarms / normals:.1f} % ({round(alarms)} of {normals} scores of normal test "
            f"images; heads: {len(calibrated)}), calibrated with {fewest} or more held-out "
            "training images each."
        )
        unlikely = sum(chance_of_alarms(row) < UNLIKELY / len(calibrated) for row in calibrated)
        if unlikely:
            notes[-1] += (
                f" Of {unlikely} of the heads chance gives so many less often than once in "
                f"{round(1 / UNLIKELY):,} times: those test normals are not like the training "
                "normals, and only calibration with images like them keeps the rate "
                "(predict.py RUN IMAGES... --calibrate)."
            )
    return notes


def chance_of_alarms(row: Mapping[str, Any]) -> float:
    """Return how likely so many false alarms, or more, are if all normals are exchangeable.

    Over calibration sets the probability of an alarm has a Beta distribution (Vovk, "Conditional
    validity of inductive conformal predictors", 2012), so that their number is beta-binomial.

    Args:
        row: has the columns of `false_alarm_columns`.
    """
    n, m = row["calibration_images"], row["test_normals"]
    allowed = _allowed(n, row["false_alarm_rate_asked"])
    alarms = round(row["false_alarm_rate_seen"] * m)
    return float(betabinom(m, allowed, n + 1 - allowed).sf(alarms - 1))


def _allowed(num_images: int, rate: float) -> int:
    """Return how many of the p-values 1/(n+1), 2/(n+1), ... are at most `rate`."""
    return int((np.arange(1, num_images + 2) / (num_images + 1) <= rate).sum())
