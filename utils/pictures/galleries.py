"""Pictures of one one-class task: its extreme test images, and the histogram of its scores."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.pictures.words import without_formulas
from utils.runs.files import atomic_path

# Blue and vermillion of Okabe and Ito's palette, which the colour-blind tell apart.
NORMAL_COLOUR = "#0072B2"
ANOMALOUS_COLOUR = "#D55E00"
_NUM_BINS = 40
_DPI = 120
_CELL_INCHES = 1.25


def save_gallery(
    path: Path,
    *,
    images: Callable[[int], np.ndarray],
    scores: np.ndarray,
    labels: np.ndarray,
    class_names_of_images: Sequence[str],
    title: str,
    auroc: float | None = None,
    count: int = 8,
) -> Path:
    """Draws the most and the least anomalous test images above the histogram of all scores.

    Each image carries its score and true class; the frame tells whether that class is anomalous.

    Args:
        path: The PNG to write; its folder is made when absent.
        images: The image of an index: (H, W, 3) uint8 of any size. Asked only for images shown.
        scores: (N,) finite, higher is more anomalous.
        labels: (N,), 1 = anomalous.
        class_names_of_images: True class of each of the N images.
        title: Heading, for instance data set, normal class and method.
        auroc: Stated after the title, in [0, 1]; nan where undefined.
        count: Images a row; fewer where N is smaller.

    Returns:
        path.

    Raises:
        ValueError: Lengths differ, there is no image, count is below 1, or a score is not finite.
    """
    scores, labels = _checked(scores, labels)
    if len(class_names_of_images) != len(scores):
        raise ValueError(f"{len(scores)} scores but {len(class_names_of_images)} class names")
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    ascending = np.argsort(scores, kind="stable")  # (N,)
    columns = min(count, len(scores))
    rows = {"most anomalous": ascending[::-1][:columns], "least anomalous": ascending[:columns]}
    # Even a gallery of one column leaves room for a legible histogram.
    width = max(columns, 5) * _CELL_INCHES + 0.6
    figure = Figure(figsize=(width, 6.4), layout="constrained")
    figure.suptitle(_heading(title, auroc))
    grids = figure.subfigures(3, 1, squeeze=False, height_ratios=[1.0, 1.0, 1.4])[:, 0]
    for grid, (name, indices) in zip(grids[:2], rows.items(), strict=True):
        grid.supylabel(name, fontsize="medium")
        for axes, index in zip(grid.subplots(1, columns, squeeze=False)[0], indices, strict=True):
            _draw_image(axes, images(int(index)), anomalous=bool(labels[index]))
            axes.set_title(
                f"{scores[index]:.4g}\n{_shortened(class_names_of_images[index])}", fontsize="small"
            )
    _draw_histogram(grids[2].subplots(), scores, labels)
    return _write(figure, path)


def save_histogram(
    path: Path, *, scores: np.ndarray, labels: np.ndarray, title: str, auroc: float | None = None
) -> Path:
    """Draws the histograms of normal and anomalous scores over each other, each of area 1.

    Args:
        path: The PNG to write; its folder is made when absent.
        scores: (N,) finite, higher is more anomalous.
        labels: (N,), 1 = anomalous.
        title: Heading.
        auroc: Stated after the title, in [0, 1]; nan where undefined.

    Returns:
        path.

    Raises:
        ValueError: Lengths differ, there is no score, or a score is not finite.
    """
    scores, labels = _checked(scores, labels)
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    figure.suptitle(_heading(title, auroc))
    _draw_histogram(figure.subplots(), scores, labels)
    return _write(figure, path)


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores and labels must be (N,), got shapes {scores.shape} and {labels.shape}"
        )
    if len(scores) == 0:
        raise ValueError("there is no score to draw")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite")
    return scores, labels.astype(bool)


def _heading(title: str, auroc: float | None) -> str:
    if auroc is None:
        return title
    return f"{title}: AUROC {'undefined' if math.isnan(auroc) else f'{100 * auroc:.1f} %'}"


def _shortened(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _draw_image(axes: Axes, image: np.ndarray, *, anomalous: bool) -> None:
    # Nearest: digits are 8 x 8, CIFAR's images 32 x 32, and smoothing would invent detail.
    small = max(image.shape[:2]) < _CELL_INCHES * _DPI
    axes.imshow(image, interpolation="nearest" if small else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(ANOMALOUS_COLOUR if anomalous else NORMAL_COLOUR)
        spine.set_linewidth(3.0)


def _draw_histogram(axes: Axes, scores: np.ndarray, anomalous: np.ndarray) -> None:
    low, high = _drawn_range(scores, anomalous)
    num_beyond = int(((scores < low) | (scores > high)).sum())
    drawn = scores.clip(low, high)  # (N,)
    groups = (
        ("normal", ~anomalous, NORMAL_COLOUR, None),
        ("anomalous", anomalous, ANOMALOUS_COLOUR, "///"),
    )
    for name, members, colour, hatch in groups:
        if members.any():
            axes.hist(
                drawn[members],
                bins=np.linspace(low, high, _NUM_BINS + 1).tolist(),
                density=True,
                histtype="stepfilled",
                facecolor=(colour, 0.4),
                edgecolor=colour,
                hatch=hatch,
                label=f"{name} (n = {members.sum()})",
            )
    beyond = f" ({num_beyond} beyond the axis, drawn in its outermost bins)" if num_beyond else ""
    axes.set_xlabel(f"score{beyond}")
    axes.set_ylabel("density")
    # Above the axes, where it covers no bar.
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)


def _drawn_range(scores: np.ndarray, anomalous: np.ndarray) -> tuple[float, float]:
    """The ends of the score axis, which a few extreme scores shall not squeeze to one bar.

    Each group keeps its 1 to 99 % range and once that width on both sides.
    """
    ends = []
    for group in (scores[~anomalous], scores[anomalous]):
        if len(group):
            first, last = np.quantile(group, [0.01, 0.99])
            width = last - first
            ends += [max(first - width, group.min()), min(last + width, group.max())]
    low, high = min(ends), max(ends)
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest:  # equal up to rounding: bins need some width
        margin = 1e-6 * largest or 0.5
        return low - margin, high + margin
    return low, high


def _write(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as temporary:
        without_formulas(figure).savefig(temporary, dpi=_DPI, format="png")
    return path
