"""Sheets of pictures for one category: what the detector found, missed and mistook.

A sheet is one big RGB array, one screen pixel per array pixel, on which text and contours are drawn
in a single pair of axes: panels stay sharp and a sheet takes a fraction of a second.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patheffects import withStroke
from skimage.measure import find_contours
from torch import Tensor

from utils.runs.files import as_array, atomic_path

SHEET_NAMES = ("highest_normals.png", "lowest_defects.png", "samples.png")
PANEL, MAX_PANEL = 256, 320  # wished and greatest width of a panel; its height follows the image
GAP = 8
HEADER = 96  # title, panel names and colour bar
TITLE = 24  # the line of text above each row of panels
MAX_LINES = 40  # of the sample sheet: beyond it, a picture is too tall to be looked at
_DPI = 100
_COLOUR_MAP = "inferno"  # its lightness rises evenly, so it reads the same to colour-blind eyes
_FONT = "DejaVu Sans"  # comes with matplotlib, so the sheets look the same everywhere
_TRUTH, _PREDICTED = "#00e5ff", "#ffffff"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The test images of a category, and what is drawn of them.

    Attributes:
        images: gives image i as (H, W, 3), uint8; called only for those drawn.
        masks: (N, H, W), true where anomalous; None when the data set has none.
        anomaly_maps: (N, H, W), higher = more anomalous.
        scores: (N,), the images' scores.
        labels: (N,), 1 = anomalous.
        defects: (N,), the defect types, which group the sample; all normals are one group.
        names: (N,), file names for the titles.
        threshold: where the map's contour is drawn; None draws none.
        part_names: of maps that the anomaly map is the mean of, drawn beside it; mostly none.
        parts: gives these of image i, (H, W) each; called only for those drawn.
        reconstruction: gives what a network makes of image i, (H, W, 3) uint8, drawn beside it;
            None for methods that make nothing.

    Raises:
        ValueError: the arrays differ in length or size.
    """

    images: Callable[[int], np.ndarray]
    masks: Tensor | None
    anomaly_maps: Tensor
    scores: np.ndarray
    labels: np.ndarray
    defects: Sequence[str]
    names: Sequence[str]
    threshold: float | None = None
    part_names: Sequence[str] = ()
    parts: Callable[[int], Sequence[np.ndarray]] = lambda _: ()
    reconstruction: Callable[[int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        N = len(self.anomaly_maps)
        lengths = {len(self.scores), len(self.labels), len(self.defects), len(self.names), N}
        if N == 0 or lengths != {N}:
            raise ValueError(f"overlays: lengths {sorted(lengths)}, expected one length above 0")
        if self.masks is not None and self.masks.shape != self.anomaly_maps.shape:
            raise ValueError(
                f"overlays: masks {self.masks.shape} but maps {self.anomaly_maps.shape}"
            )


@dataclass(frozen=True)
class _Subject:
    """What the three sheets of a category share; the rank of each image, and the colours' scale."""

    shown: Shown
    ranks: np.ndarray
    low: float
    high: float


def save_overlays(
    folder: Path, shown: Shown, *, num_worst: int = 8, per_type: int = 2, title: str = ""
) -> list[Path]:
    """Write the three sheets of one category and return their paths.

    Each line of a sheet is one test image: the image; with the true mask's contour; its anomaly
    map; the map over the image with its contour at the threshold; what the network makes of the
    image, of a method that compares them; and the maps that the anomaly map is the mean of, where
    there are some. The colours mean the same on all
    three sheets: from the median of the normal images' maps to the 99.9th percentile of all maps,
    so that neither one hot pixel nor the number of defects sets the scale; beyond it they saturate.

    Args:
        folder: Made when absent.
        shown: What is drawn.
        num_worst: How many highest-scoring normals and lowest-scoring defects to draw.
        per_type: How many images of each defect type, and of the normals, the sample has; they are
            evenly spaced in the order given, so the choice owes nothing to the scores.
        title: Put before each sheet's own title, as "screw, seed 0".

    Returns:
        highest_normals.png, lowest_defects.png, samples.png; without the first two where the test
        set has no normal or no anomalous image.
    """
    labels = shown.labels
    descending = np.argsort(-shown.scores.astype(np.float64), kind="stable")
    subject = _Subject(
        shown, np.argsort(descending) + 1, *colour_limits(shown.anomaly_maps, labels)
    )
    normals = [int(i) for i in descending if labels[i] == 0]
    anomalies = [int(i) for i in descending[::-1] if labels[i] == 1]
    sample, remark = _sample(labels, shown.defects, per_type)
    prefix = f"{title}: " if title else ""
    sheets = (
        (normals[:num_worst], f"highest-scoring normals ({{}} of {len(normals)})"),
        (anomalies[:num_worst], f"lowest-scoring defects ({{}} of {len(anomalies)})"),
        (sample, f"sample of each type{remark}"),
    )
    paths = []
    for (chosen, heading), name in zip(sheets, SHEET_NAMES, strict=True):
        if chosen:
            figure = _sheet(subject, chosen, prefix + heading.format(len(chosen)))
            with atomic_path(folder / name) as temporary:
                figure.savefig(temporary, format="png", pil_kwargs={"compress_level": 3})
            paths.append(folder / name)
    return paths


def colour_limits(anomaly_maps: Tensor, labels: np.ndarray) -> tuple[float, float]:
    """Return the median of the normal images' maps and the 99.9th percentile of all maps.

    Of more than 2^24 values every k-th is used. Without normal images, the median is that of all.
    """
    maps = as_array(anomaly_maps)
    normal = maps[labels == 0] if (labels == 0).any() else maps
    thin_normal, thin = (a.reshape(-1)[:: a.size // 2**24 + 1] for a in (normal, maps))
    low, high = float(np.median(thin_normal)), float(np.percentile(thin, 99.9))
    return low, max(high, low + 1e-12 + 1e-6 * abs(low))  # constant maps still need a scale


def _sample(labels: np.ndarray, defects: Sequence[str], per_type: int) -> tuple[list[int], str]:
    """Return image places, normals first and then the types by name, and a remark on the cut."""
    groups: dict[tuple[int, str], list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        groups.setdefault((label, defects[place] if label else ""), []).append(place)
    per_type = max(1, min(per_type, MAX_LINES // len(groups)))
    chosen = []
    for _, places in sorted(groups.items())[:MAX_LINES]:
        spaced = np.linspace(0, len(places) - 1, min(per_type, len(places))).round().astype(int)
        chosen += [places[place] for place in spaced]
    return chosen, f" (of {len(groups)} types)" if len(groups) > MAX_LINES else ""


def _sheet(subject: _Subject, chosen: Sequence[int], heading: str) -> Figure:
    """Draw the lines of one sheet."""
    map_height, map_width = subject.shown.anomaly_maps.shape[1:]
    # Whole factors keep pixels crisp; only images wider than the widest panel are shrunk.
    scale = PANEL / map_width if map_width > MAX_PANEL else max(1, round(PANEL / map_width))
    width, height = round(scale * map_width), round(scale * map_height)
    columns = len(_panel_names(subject.shown))
    lefts = [GAP + column * (width + GAP) for column in range(columns)]
    tops = [HEADER + TITLE + line * (height + TITLE + GAP) for line in range(len(chosen))]
    canvas = np.full((tops[-1] + height + GAP, lefts[-1] + width + GAP, 3), 255, dtype=np.uint8)
    figure, axes = _pixel_axes(canvas)
    _draw_header(axes, canvas, subject, heading, lefts, width)
    truths: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for place, top in zip(chosen, tops, strict=True):
        for left, panel in zip(lefts, _panels(subject, place, width, height), strict=True):
            canvas[top : top + height, left : left + width] = panel.round()
        _draw_title(axes, subject, place, top - TITLE / 2, lefts[0], lefts[-1] + width)
        if subject.shown.masks is None:
            _write(axes, lefts[1] + width / 2, top + height / 2, "no mask", ha="center")
        else:
            mask = as_array(subject.shown.masks[place]) > 0
            truths += _contours(mask.astype(np.float32), 0.5, scale, lefts[1], top)
            if subject.shown.labels[place] == 1 and not mask.any():
                _write(axes, lefts[1] + width / 2, top + 12, "its mask is empty", ha="center",
                       backgroundcolor="white")  # fmt: skip
        if subject.shown.threshold is not None:
            anomaly_map = as_array(subject.shown.anomaly_maps[place])
            predictions += _contours(anomaly_map, subject.shown.threshold, scale, lefts[3], top)
    for lines, colour in ((truths, _TRUTH), (predictions, _PREDICTED)):
        # The dark rim keeps a bright contour visible on a bright image.
        rim = withStroke(linewidth=3, foreground="black")
        axes.add_collection(
            LineCollection(lines, colors=colour, linewidths=1.3, path_effects=[rim])
        )
    figure.figimage(canvas, origin="upper", zorder=-1)  # unlike imshow, it does not resample
    return figure


def _panels(subject: _Subject, place: int, width: int, height: int) -> list[np.ndarray]:
    """Return the panels of one image without their contours, each (height, width, 3)."""
    image, anomaly_map = subject.shown.images(place), as_array(subject.shown.anomaly_maps[place])
    if image.shape != (*anomaly_map.shape, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"overlays: image {subject.shown.names[place]} is {image.shape} {image.dtype}, "
            f"its anomaly map {anomaly_map.shape}"
        )
    maps = [anomaly_map, *subject.shown.parts(place)]
    levels = [(m.astype(np.float32) - subject.low) / (subject.high - subject.low) for m in maps]
    levels = [_resized(level.clip(0, 1), width, height) for level in levels]
    heat, *parts = (mpl.colormaps[_COLOUR_MAP](level)[..., :3] * 255 for level in levels)
    image = _resized(image, width, height)
    truth = np.full_like(image, 225) if subject.shown.masks is None else image
    blend = 0.75 * levels[0][..., None]  # cold places keep the image
    made = subject.shown.reconstruction
    rebuilt = [] if made is None else [_resized(made(place), width, height)]
    return [image, truth, heat, (1 - blend) * image + blend * heat, *rebuilt, *parts]


def _pixel_axes(canvas: np.ndarray) -> tuple[Figure, Axes]:
    """Return a figure of the canvas's size and axes over all of it, in canvas pixels."""
    # The renderer cuts the size to whole pixels: a hundredth more outlives the rounding of floats.
    figure = Figure(figsize=tuple((n + 0.01) / _DPI for n in canvas.shape[1::-1]), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(-0.5, canvas.shape[1] - 0.5), ylim=(canvas.shape[0] - 0.5, -0.5))
    axes.set_autoscale_on(False)
    return figure, axes


def _draw_header(
    axes: Axes,
    canvas: np.ndarray,
    subject: _Subject,
    heading: str,
    lefts: Sequence[int],
    width: int,
) -> None:
    """Write the sheet's title, the panels' names and the colour bar with its ends."""
    right = lefts[3] + width
    _write(axes, lefts[0], 16, _fitted(axes, heading, right - lefts[0], 12), size=12)
    _write(axes, lefts[0], 44, f"rank 1 = highest score of {len(subject.shown.scores)} test images")
    bar = np.linspace(0, 1, right - lefts[2])
    canvas[36:48, lefts[2] : right] = mpl.colormaps[_COLOUR_MAP](bar)[:, :3] * 255
    whose = "normal" if (subject.shown.labels == 0).any() else "all"
    _write(axes, lefts[2], 58, f"≤ {subject.low:.4g}, median of {whose} maps", size=8)
    _write(axes, right, 58, f"≥ {subject.high:.4g}, 99.9th percentile of all", size=8, ha="right")
    names = _panel_names(subject.shown)
    if subject.shown.threshold is not None:
        names[3] = f"contour at {subject.shown.threshold:.4g} (white)"
        place = (subject.shown.threshold - subject.low) / (subject.high - subject.low)
        if 0 <= place <= 1:
            x = lefts[2] + place * (right - lefts[2] - 1)
            axes.plot([x, x], [33, 50], color="white", linewidth=1.3,
                      path_effects=[withStroke(linewidth=3, foreground="black")])  # fmt: skip
    for left, name in zip(lefts, names, strict=True):
        _write(axes, left, HEADER - 10, _fitted(axes, name, width, 9))


def _panel_names(shown: Shown) -> list[str]:
    return [
        "image",
        "true mask" if shown.masks is None else "true mask (cyan)",
        "anomaly map",
        "map over image",
        *([] if shown.reconstruction is None else ["reconstruction"]),
        *(f"{name} map" for name in shown.part_names),
    ]


def _draw_title(axes: Axes, subject: _Subject, place: int, y: float, left: int, right: int) -> None:
    """Write name and defect on the left, score and rank on the right."""
    rank = f"score {subject.shown.scores[place]:.4g}    rank {subject.ranks[place]}"
    room = right - left - _text_width(axes, rank, 9) - 2 * GAP
    defect = _fitted(axes, subject.shown.defects[place], room * 0.4, 9)
    name = _fitted(
        axes, subject.shown.names[place], room - _text_width(axes, defect + "    ", 9), 9
    )
    _write(axes, left, y, f"{name}    {defect}")
    _write(axes, right, y, rank, ha="right")


def _write(axes: Axes, x: float, y: float, text: str, size: float = 9, **options: Any) -> None:
    # A dollar sign in a file name is no formula.
    axes.text(x, y, text, fontsize=size, family=_FONT, va="center", parse_math=False, **options)


def _text_width(axes: Axes, text: str, size: float) -> float:
    """Return the width of a text in pixels, as the renderer will draw it."""
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    font = FontProperties(family=_FONT, size=size)
    return canvas.get_renderer().get_text_width_height_descent(text, font, ismath=False)[0]


def _fitted(axes: Axes, text: str, room: float, size: float) -> str:
    """Return `text` in letters the font has, its middle left out where it is too wide."""
    font = get_font(findfont(_FONT))
    text = "".join(
        letter
        if letter.isprintable() and font.get_char_index(ord(letter))
        else f"\\u{ord(letter):04x}"
        for letter in text
    )
    if _text_width(axes, text, size) <= room:
        return text
    # How many letters fit: bisection, as measuring a long text takes milliseconds.
    fits = bisect(
        range(1, len(text)), room, key=lambda k: _text_width(axes, _shortened(text, k), size)
    )
    return _shortened(text, max(1, fits))


def _shortened(text: str, keep: int) -> str:
    """Return the first and last letters, `keep` in all, with an ellipsis between."""
    return text[: keep // 2] + "…" + text[len(text) - (keep - keep // 2) :]


def _resized(array: np.ndarray, width: int, height: int) -> np.ndarray:
    if array.shape[:2] == (height, width):
        return array
    how = cv2.INTER_AREA if width < array.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(array, (width, height), interpolation=how)


def _contours(
    values: np.ndarray, level: float, scale: float, left: int, top: int
) -> list[np.ndarray]:
    """Return the level's contours as (points, 2) canvas positions, closed along the border."""
    inside = float(values.max()) - level
    if inside <= 0:
        return []
    padded = np.pad(values.astype(np.float64), 1, constant_values=level - inside)
    height, width = (scale * size for size in values.shape)
    lines = []
    for line in find_contours(padded, level):
        # From centres of padded pixels to the canvas; there pixel k is k - 0.5 to k + 0.5.
        y, x = (scale * (line.T - 0.5)).clip(1, [[height - 1], [width - 1]])
        lines.append(np.stack([x + left - 0.5, y + top - 0.5], axis=1))  # (points, 2)
    return lines
