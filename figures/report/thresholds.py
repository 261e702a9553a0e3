"""What a threshold calls false, counted from the scores of a run: false alarms and misses.

An image is called anomalous where its score is above the threshold, as predict.py does it.
"""

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from figures.report.scores import Scored
from utils.evaluation.calibration import calibration_file, load_calibration
from utils.metrics.counting import curve_of
from utils.metrics.metrics import f1_threshold
from utils.runs.run import Run

RATES = (0.1, 0.05, 0.01, 0.001)
"""False-alarm rates whose thresholds are shown, as far as the calibration can promise them."""
MAX_DATA = 3_000_000
"""Characters of the scores that the page recounts, of all categories and seeds together."""


@dataclass(frozen=True)
class Counts:
    """What one threshold calls false.

    Attributes:
        threshold: scores above it are called anomalous.
        false_alarms: normal images above it.
        normals: all normal images.
        misses: anomalies at or below it.
        anomalies: all anomalies.
    """

    threshold: float
    false_alarms: int
    normals: int
    misses: int
    anomalies: int

    @property
    def false_alarm_rate(self) -> float:
        """Share of the normal images in [0, 1]; nan without any."""
        return _share(self.false_alarms, self.normals)

    @property
    def miss_rate(self) -> float:
        """Share of the anomalies in [0, 1]; nan without any."""
        return _share(self.misses, self.anomalies)

    @property
    def precision(self) -> float:
        """Share of anomalies among the images called anomalous; nan where none is called so."""
        found = self.anomalies - self.misses
        return _share(found, found + self.false_alarms)

    @property
    def recall(self) -> float:
        """Share of the anomalies that are called anomalous; nan without any."""
        return _share(self.anomalies - self.misses, self.anomalies)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall in [0, 1]; nan without anomalies."""
        if not self.anomalies:
            return math.nan
        found = self.anomalies - self.misses
        return 2 * found / (found + self.false_alarms + self.anomalies)


@dataclass(frozen=True)
class Preset:
    """A threshold with a reason.

    Attributes:
        label: by what it was chosen.
        counts: what it calls false.
    """

    label: str
    counts: Counts


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of one category and seed.

    Attributes:
        scored: the scores.
        presets: calibrated ones by falling rate, then those chosen on the test set.
        start: place of the preset that is shown first.
        remark: why there is no calibrated one, or "".
    """

    scored: Scored
    presets: list[Preset]
    start: int
    remark: str

    @property
    def first(self) -> float:
        """The threshold that is shown first."""
        return self.presets[self.start].counts.threshold


def count(scored: Scored, threshold: float) -> Counts:
    """Count what a threshold calls false."""
    is_anomalous, is_called = scored.labels == 1, scored.scores > threshold
    return Counts(
        threshold,
        int((is_called & ~is_anomalous).sum()),
        int((~is_anomalous).sum()),
        int((~is_called & is_anomalous).sum()),
        int(is_anomalous.sum()),
    )


def thresholds_of(run: Run, scored: Scored) -> Thresholds:
    """Return the thresholds of a category and seed.

    Args:
        run: whose calibration counts, where it has one.
        scored: of a category and seed of it.

    Raises:
        RunError: the calibration is corrupt or of another head.
    """
    asked = run.config.get("false_alarm_rate", 0.05)
    rates, remark = _calibrated(run, scored, asked)
    presets = [
        Preset(f"calibrated for {100 * rate:g} % false alarms", count(scored, threshold))
        for rate, threshold in rates.items()
    ]
    start = list(rates).index(asked) if asked in rates else 0
    is_anomalous = scored.labels == 1
    if is_anomalous.any() and not is_anomalous.all():
        best = _below(scored.scores, f1_threshold(curve_of(scored.scores, is_anomalous)))
        presets.append(Preset("F1-max (chosen on the test set, optimistic)", count(scored, best)))
    if not is_anomalous.all():
        highest = float(scored.scores[~is_anomalous].max())
        label = "no false alarm (chosen on the test set, optimistic)"
        presets.append(Preset(label, count(scored, highest)))
    if not presets:
        lowest = _below(scored.scores, float(scored.scores.min()))
        presets.append(Preset("all called anomalous", count(scored, lowest)))
    return Thresholds(scored, presets, start, remark)


def page_data(seeds: Sequence[Thresholds], num_characters: int) -> list[dict[str, Any]]:
    """Return what the page needs to recount, as JSON values: of the first seeds, while they fit.

    Scores of single precision are shortened to the digits that give them back in it.

    Args:
        seeds: of one category.
        num_characters: that the JSON text may have.
    """
    data: list[dict[str, Any]] = []
    for one in seeds:
        scores = np.sort(one.scored.scores)
        is_single = bool((scores.astype(np.float32) == scores).all())
        record = {
            "seed": one.scored.seed,
            "single": is_single,
            "start": one.start,
            "presets": [
                {"label": preset.label, "threshold": preset.counts.threshold}
                for preset in one.presets
            ],
        } | {
            name: _digits(one.scored.scores[one.scored.labels == label], is_single=is_single)
            for label, name in enumerate(("normal", "anomalous"))
        }
        num_characters -= len(json.dumps(record, separators=(",", ":")))
        if num_characters < 0:
            break
        data.append(record)
    return data


def _calibrated(run: Run, scored: Scored, asked: float) -> tuple[dict[float, float], str]:
    """Return thresholds by false-alarm rate, and why there are none."""
    category, seed = scored.category, scored.seed
    path, head = calibration_file(run.folder, category, seed), run.head_path(category, seed)
    if not path.is_file():
        return {}, "Not calibrated: no normal image was held out (--calibration-share)."
    if not head.is_file():
        return {}, f"{head.name} is missing, so nothing says that the calibration is of this head."
    calibration = load_calibration(path, head=head)
    assert calibration is not None
    rates = sorted({asked, *RATES}, reverse=True)
    promised = [rate for rate in rates if calibration.smallest_rate <= rate < 1]
    few = f"{len(calibration.scores)} calibration images are too few for any of the rates."
    return {rate: calibration.threshold(rate) for rate in promised}, "" if promised else few


def _below(scores: np.ndarray, score: float) -> float:
    """Return the next lower score, above which lies `score`; a number below all for the lowest."""
    ordered = np.unique(scores).tolist()
    place = bisect.bisect_left(ordered, score)
    return ordered[place - 1] if place else math.nextafter(score, -math.inf)


def _digits(scores: np.ndarray, *, is_single: bool) -> list[float]:
    ordered = np.sort(scores)
    if not is_single:
        return ordered.tolist()
    return [float(text) for text in ordered.astype(np.float32).astype(str)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
