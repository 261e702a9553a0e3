"""Images, true contours and anomaly maps over categories: SimpleNet's Fig. 8.

python -m figures.heatmaps RUN [RUN ...] [--seed K] [--by-defect] --out FILE

Needs structured runs made with --save-maps, and the images where the runs read them. A column for
each category, or for each kind of defect of each category with --by-defect; a row of maps for each
run, and below it, of a method that rebuilds images, a row of what it made of them. Nothing is
picked by hand: a column shows the anomalous image whose score in the first run is the median (of an
even number the lower one), and all runs show the same image. A map's colours go from the median of
the category's normal maps to the 99.9th percentile of all its maps. FILE.md names the images.
Of a run with --select best_test the best epoch on the test set is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from configs.tiles import resized_in
from datasets.reading.images import Reading, read_image
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError
from figures.shared.drawing import parser, save_with_table
from figures.shared.own_results import data_of, is_structured
from figures.shared.run_log import LoggedRun, beside_the_method, read_runs
from utils.cli import exits_cleanly
from utils.errors import RunError
from utils.pictures.overlays import colour_limits
from utils.runs.run import Run
from utils.tables import table as tables

MAX_COLUMNS = 8
"""Of pictures; more categories go on in further blocks of rows."""
_COLOUR_MAP = "inferno"
_TRUTH = "#00e5ff"
_SIDE = 1.45  # of a picture, inches


@dataclass(frozen=True)
class Column:
    """One image, as all runs see it.

    Attributes:
        category: of the image.
        defect: its kind.
        path: of the file.
        rank: its rank among the anomalous images it was chosen from, 1 = highest score.
        count: of those images.
        image: (S, S, 3) uint8, as the runs saw it.
        mask: (S, S) bool; None where the data set has none.
        levels: for each run its map (S, S), 0 to 1 between the limits of its category.
        reconstructions: for each run what its network makes of the image, (S, S, 3) uint8; None of
            a method that makes nothing.
    """

    category: str
    defect: str
    path: str
    rank: int
    count: int
    image: np.ndarray
    mask: np.ndarray | None
    levels: list[np.ndarray]
    reconstructions: list[np.ndarray | None]


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    options = parser("figures.heatmaps", __doc__)
    options.add_argument("--seed", type=int, help="default: the first one of the first run")
    options.add_argument("--by-defect", action="store_true", help="a column for each defect kind")
    arguments = options.parse_args(argv)
    runs = read_runs(arguments.runs, same_but=beside_the_method() - {"select"})
    columns = read_columns([run.run for run in runs], arguments.seed, arguments.by_defect)
    figure = draw(columns, [run.label for run in runs])
    return save_with_table(figure, arguments.out, table_of(columns, runs))


def read_columns(runs: Sequence[Run], seed: int | None, by_defect: bool) -> list[Column]:
    """Choose an image for each category (or defect kind) and read it with its maps.

    Raises:
        RunError: a run is semantic, of other data, has no maps or not this category and seed, or
            an image is gone.
    """
    first = runs[0]
    for run in runs:
        if not is_structured(run.config):
            raise RunError(
                f"{run.folder} is a semantic run: its images have one score each, no anomaly maps"
            )
        if data_of(run.config) != data_of(first.config):
            raise RunError(
                f"{run.folder} is of {data_of(run.config)}, {first.folder} of "
                f"{data_of(first.config)}; one figure shows one data set"
            )
    rows = first.rows()
    if not rows:
        raise RunError(f"{first.folder}: no category is finished")
    seed = int(rows[0]["seed"]) if seed is None else seed
    columns = []
    for category in dict.fromkeys(row["category"] for row in rows):
        columns += _of_category(runs, category, seed, by_defect)
    return columns


def _of_category(runs: Sequence[Run], category: str, seed: int, by_defect: bool) -> list[Column]:
    scores = [_scores_with_maps(run, category, seed) for run in runs]
    own = scores[0]
    limits = [colour_limits(torch.from_numpy(s["map"]), s["label"]) for s in scores]
    anomalous = own["label"] == 1
    kinds = sorted(set(own["defect"][anomalous])) if by_defect else [None]
    columns = []
    for kind in kinds:
        (places,) = (anomalous if kind is None else anomalous & (own["defect"] == kind)).nonzero()
        if len(places) == 0:
            continue  # a test set of normal images shows nothing
        # From the highest score; of an even number the lower of the two in the middle.
        order = places[np.argsort(-own["score"][places], kind="stable")]
        place, path = order[len(order) // 2], str(own["path"][order[len(order) // 2]])
        levels, rebuilt = [], []
        for run, found, (low, high) in zip(runs, scores, limits, strict=True):
            (here,) = (found["path"] == path).nonzero()
            if len(here) != 1:
                raise RunError(f"{run.folder}: {category}, seed {seed} has no image {path}")
            levels.append(((found["map"][here[0]] - low) / (high - low)).clip(0, 1))
            rebuilt.append(found["reconstruction"][here[0]] if "reconstruction" in found else None)
        size = own["map"].shape[-1]
        columns.append(
            Column(
                category, str(own["defect"][place]), path, len(order) // 2 + 1, len(order),
                read_shown(runs[0].located(Path(path)), runs[0].config, size),
                own["mask"][place] if "mask" in own else None, levels, rebuilt,
            )
        )  # fmt: skip
    return columns


def _scores_with_maps(run: Run, category: str, seed: int) -> dict[str, np.ndarray]:
    scores = run.load_scores(category, seed)
    if "map" not in scores:
        raise RunError(
            f"{run.scores_path(category, seed)} holds no maps; make the run with --save-maps"
        )
    return scores


def read_shown(path: Path, config: dict[str, Any], size: int) -> np.ndarray:
    """Read an image and cut it as the run did, (size, size, 3) uint8.

    Raises:
        RunError: the file is gone or cannot be read.
    """
    try:
        image = read_image(path, Reading(config.get("bit_depth", 16)))
    except DataError as error:
        where = "" if path.is_absolute() else ", relative to the folder the run was started in"
        raise RunError(f"{error}{where}; put it back, or make the run again") from None
    cut = PairTransform(*resized_in(config), config["resize"])
    return cv2.resize(cut.image(image), (size, size), interpolation=cv2.INTER_AREA)


def draw(columns: Sequence[Column], labels: Sequence[str]) -> Figure:
    """Draw a column of pictures for each image, in blocks of `MAX_COLUMNS`.

    Raises:
        RunError: there is no anomalous image.
    """
    if not columns:
        raise RunError("no category has an anomalous test image; there is nothing to show")
    names = ["image", "truth"]
    for label, rebuilt in zip(labels, columns[0].reconstructions, strict=True):
        names += [label] if rebuilt is None else [label, f"{label}: reconstruction"]
    width = min(MAX_COLUMNS, len(columns))
    blocks = -(-len(columns) // width)
    figure = Figure(
        figsize=(1.3 + _SIDE * width, 0.8 + blocks * (0.45 + _SIDE * len(names))),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01),
    )
    grid = figure.subplots(blocks * len(names), width, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, column in enumerate(columns):
        block, place = divmod(number, width)
        axes_of_column = list(grid[block * len(names) : (block + 1) * len(names), place])
        _draw_column(axes_of_column, column)
        if place == 0:
            for axes, name in zip(axes_of_column, names, strict=True):
                axes.text(
                    -0.06, 0.5, name.replace(", ", "\n"), transform=axes.transAxes, ha="right",
                    va="center", fontsize="small",
                )  # fmt: skip
    note = (
        f"each image: the median by score of {labels[0]} among the anomalous ones of its column; "
        "map colours: median of the category's normal maps to 99.9th percentile of all"
    )
    figure.supxlabel(fill(note, 16 + 22 * width), fontsize="small")
    return figure


def _draw_column(grid: Sequence[Axes], column: Column) -> None:
    for axes in grid:
        axes.set_axis_off()
    grid[0].set_title(f"{column.category}\n{column.defect}", fontsize="small", parse_math=False)
    grid[0].imshow(column.image)
    if column.mask is None:
        grid[1].imshow(np.full_like(column.image, 225))
        middle = column.image.shape[0] / 2
        grid[1].text(middle, middle, "no mask", ha="center", va="center", fontsize="small")
    else:
        grid[1].imshow(column.image)
        if column.mask.any():
            height, width = column.mask.shape
            padded = np.pad(column.mask.astype(float), 1)  # closes contours at the border
            for line_width, colour in ((2.6, "black"), (1.2, _TRUTH)):  # with a rim: on any image
                grid[1].contour(
                    np.arange(-1, width + 1), np.arange(-1, height + 1), padded, levels=[0.5],
                    colors=colour, linewidths=line_width,
                )  # fmt: skip
            grid[1].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    rest = iter(grid[2:])
    for level, rebuilt in zip(column.levels, column.reconstructions, strict=True):
        heat = mpl.colormaps[_COLOUR_MAP](level)[..., :3]
        blend = 0.75 * level[..., None]  # cold places keep the image
        next(rest).imshow((1 - blend) * column.image / 255 + blend * heat)
        if rebuilt is not None:
            next(rest).imshow(rebuilt)


def table_of(columns: Sequence[Column], runs: Sequence[LoggedRun]) -> tables.Table:
    """Return which image each column shows, and how it was chosen."""
    caption = (
        f"Anomaly maps on {data_of(runs[0].run.config)}, after SimpleNet's Fig. 8. Each image is "
        f"the one of median score by {runs[0].label} among the anomalous ones of its column; "
        "colours: from the median of the category's normal maps to the 99.9th percentile of all."
    )
    heads = [tables.Column(name, name) for name in ("defect", "image", "rank by score")]
    rows = [
        tables.Row(
            c.category,
            c.category,
            tuple(tables.Cell(text=t) for t in (c.defect, c.path, f"{c.rank} of {c.count}")),
        )
        for c in columns
    ]
    return tables.Table("category", caption, tuple(heads), tuple(rows))


if __name__ == "__main__":
    main()
