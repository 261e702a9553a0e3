"""Norm of the projection and its angle to the objective, for each test image: NoCo's Fig. 3.

python -m figures.figure3 RUN [RUN ...] [--category C ...] [--seed K] --out FILE

A point is a test image: its radius is ||Z|| and its angle that between Z and G, both at the
position where its anomaly map is highest (a semantic task has only one). The dashed arc has the
radius ||G||, and the star on it is G. A column for each run, e.g.
norm 1 and 32, and a row for each category (default: the first of the first run). Only trained
`noco` has one Z; the closed form is an expectation over many and records none. The paper shows
CIFAR-10 frog at norm 1 and 32, MVTec grid at norm 1 and 8.

Writes FILE.png, FILE.pdf, and FILE.md and FILE.csv with the medians of all images and with the
AUROC of angle and norm taken alone: 50 says that it tells nothing, below 50 that it is smaller in
anomalous images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Arc
from matplotlib.ticker import MaxNLocator

from figures.shared.drawing import COLOURS, parser, save_with_table
from figures.shared.own_results import data_of
from utils.cli import exits_cleanly
from utils.errors import RunError
from utils.runs.run import Run
from utils.tables.results import SELECT_LABELS
from utils.tables.table import Cell, Column, Row, Table

MAX_POINTS = 400
"""Images of each kind that are drawn; of more, evenly spaced ones in the order of the file."""
KINDS = {"normal": COLOURS[0], "anomalous": COLOURS[1]}
"""Label 0, label 1."""
_COLUMNS = (
    Column("category", "category"),
    Column("seed", "seed", digits="d"),
    Column("norm_of_g", "norm of G", digits="g"),
    Column("select", "selection"),
    Column("image_auroc", "image AUROC"),
    Column("norm_normal", "median ‖Z‖, normal", digits=".4g"),
    Column("norm_anomalous", "median ‖Z‖, anomalous", digits=".4g"),
    Column("angle_normal", "median angle, normal", digits=".4g"),
    Column("angle_anomalous", "median angle, anomalous", digits=".4g"),
    Column("auroc_of_angle", "AUROC of the angle"),
    Column("auroc_of_norm", "AUROC of ‖Z‖"),
)
_CAPTION = (
    "Norm of Z and its angle to G (degrees) where the anomaly map is highest, after NoCo's Fig. 3; "
    "AUROC in percent, the last two of the angle or the norm taken alone as the score."
)


@dataclass(frozen=True)
class Panel:
    """One run, category and seed.

    Attributes:
        dataset: of the run.
        category: or normal class.
        seed: of the fit.
        select: how its epoch was chosen.
        goal: norm of G.
        auroc: image AUROC of the run's scores, percent.
        labels: (N,), 1 = anomalous.
        norms: (N,), of Z.
        angles: (N,), radians.
    """

    dataset: str
    category: str
    seed: int
    select: str
    goal: float
    auroc: float
    labels: np.ndarray
    norms: np.ndarray
    angles: np.ndarray

    def medians(self, values: np.ndarray) -> list[float]:
        """Return the median of the normal and of the anomalous images."""
        return [float(np.median(values[self.labels == label])) for label in range(len(KINDS))]

    def auroc_of(self, values: np.ndarray) -> float:
        """Return the AUROC of `values` taken as the score, percent."""
        import torch  # as the metrics: no other figure needs them

        from utils.metrics.evaluate import ranking_metrics

        labels = torch.from_numpy(self.labels)
        return 100 * ranking_metrics(torch.from_numpy(values), labels).auroc

    def row(self) -> Row:
        """Return what the table says of it."""
        numbers = [
            self.auroc, *self.medians(self.norms), *self.medians(np.degrees(self.angles)),
            self.auroc_of(self.angles), self.auroc_of(self.norms),
        ]  # fmt: skip
        words = (Cell(text=self.category), Cell(self.seed), Cell(self.goal))
        cells = (*words, Cell(text=SELECT_LABELS[self.select]), *map(Cell, numbers))
        return Row(self.dataset, self.dataset, cells)


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    options = parser("figures.figure3", __doc__)
    options.add_argument("--category", nargs="+", metavar="C", help="default: the first one")
    options.add_argument("--seed", type=int, help="default: the first one of each run")
    arguments = options.parse_args(argv)
    runs = [Run.read(folder) for folder in arguments.runs]
    categories = arguments.category or [_first_row(runs[0])["category"]]
    panels = [
        sorted(
            (read_panel(run, category, arguments.seed) for run in runs),
            key=lambda panel: (panel.dataset, panel.goal),
        )
        for category in categories
    ]
    rows = tuple(panel.row() for line in panels for panel in line)
    table = Table("data set", _CAPTION, _COLUMNS, rows)
    return save_with_table(draw(panels), arguments.out, table)


def read_panel(run: Run, category: str, seed: int | None = None) -> Panel:
    """Read norms and angles of a category; `seed` None stands for the first one finished.

    Raises:
        RunError: the pair is not finished, or its scores hold no norm and angle.
    """
    chosen: int = _first_row(run)["seed"] if seed is None else seed
    of_pair = [row for row in run.rows() if (row["category"], row["seed"]) == (category, chosen)]
    if not of_pair:
        known = ", ".join(dict.fromkeys(row["category"] for row in run.rows()))
        raise RunError(
            f"{run.folder}: {category!r}, seed {chosen} is not finished (categories: {known})"
        )
    row = of_pair[-1]  # the reported one: `last` stands before what was chosen on the test set
    scores = run.load_scores(category, chosen)
    if "norm" not in scores:
        raise RunError(
            f"{run.scores_path(category, chosen)} holds no norm and angle: only methods with "
            "one objective (noco) record them; make the run again with one"
        )
    return Panel(
        data_of(run.config), category, chosen, row["select"], float(run.config["method"]["norm"]),
        100 * float(row["image_auroc"]), scores["label"], scores["norm"], scores["angle"],
    )  # fmt: skip


def _first_row(run: Run) -> dict[str, Any]:
    rows = run.rows()
    if not rows:
        raise RunError(f"{run.folder}: no category is finished")
    return rows[0]


def draw(panels: Sequence[Sequence[Panel]]) -> Figure:
    """Draw a row of half discs for each category, a column for each run."""
    rows, columns = len(panels), len(panels[0])
    figure = Figure(figsize=(0.4 + 4.6 * columns, 1.2 + 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for line, places in zip(panels, grid, strict=True):
        for panel, axes in zip(line, places, strict=True):
            _draw_panel(axes, panel)
    keys = [
        *(
            Line2D([], [], linestyle="none", marker="o", markersize=5, color=colour, label=kind)
            for kind, colour in KINDS.items()
        ),
        Line2D([], [], color="black", linestyle="--", linewidth=1.2, label="norm of G"),
        Line2D([], [], color="black", linestyle="none", marker="*", markersize=9, label="G"),
    ]
    note = "radius: norm of Z; angle: between Z and G"
    if any(len(_thinned(p.labels)) < len(p.labels) for line in panels for p in line):
        note += f"; at most {MAX_POINTS}\nimages of each kind, evenly spaced in the file, are drawn"
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=2 if columns == 1 else 4,
        frameon=False,
        title=note,
        title_fontsize="small",
        fontsize="small",
    )
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw a half disc; matplotlib's polar axes would keep the room of the whole one."""
    top = 1.06 * max(float(panel.norms.max()), panel.goal)
    radii = [tick for tick in MaxNLocator(4).tick_values(0, top) if 0 < tick < top]
    for radius in (*radii, top):
        is_rim = radius == top
        axes.add_patch(
            Arc((0, 0), 2 * radius, 2 * radius, theta1=0, theta2=180, linewidth=0.8,
                color="black" if is_rim else "0.85")
        )  # fmt: skip
    for degrees in range(0, 181, 30):
        x, y = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        axes.plot([0, top * x], [0, top * y], color="0.85", linewidth=0.8, zorder=1)
        axes.text(
            1.08 * top * x, 1.08 * top * y, f"{degrees}°", ha="center", va="center", size="small"
        )
    axes.add_patch(
        Arc((0, 0), 2 * panel.goal, 2 * panel.goal, theta1=0, theta2=180, linestyle="--",
            linewidth=1.2, color="black", zorder=2)
    )  # fmt: skip
    axes.plot(panel.goal, 0, color="black", marker="*", markersize=9, zorder=4, clip_on=False)
    shown = _thinned(panel.labels)
    axes.scatter(
        panel.norms[shown] * np.cos(panel.angles[shown]),
        panel.norms[shown] * np.sin(panel.angles[shown]),
        c=np.array(list(KINDS.values()))[panel.labels[shown]], s=10, alpha=0.55, linewidths=0,
        zorder=3,
    )  # fmt: skip
    axes.set(xlim=(-1.16 * top, 1.16 * top), ylim=(0, 1.16 * top), aspect="equal")
    axes.set_xticks(radii, [f"{radius:g}" for radius in radii], fontsize="small")
    axes.set_yticks([])
    axes.spines[["top", "left", "right", "bottom"]].set_visible(False)
    chosen = "" if panel.select == "last" else f"\n{SELECT_LABELS[panel.select]}"
    axes.set_title(
        f"{panel.dataset}, {panel.category}, seed {panel.seed}\n"
        f"norm of G {panel.goal:g}, image AUROC {panel.auroc:.1f} %{chosen}",
        fontsize="medium",
    )


def _thinned(labels: np.ndarray) -> np.ndarray:
    """Return positions of at most `MAX_POINTS` images of each label, evenly spaced, shuffled.

    Drawn in file order, one kind would cover the other.
    """
    kept = []
    for label in range(len(KINDS)):
        (places,) = (labels == label).nonzero()
        count = min(len(places), MAX_POINTS)
        kept.append(places[np.linspace(0, len(places) - 1, count).round().astype(int)])
    return np.random.default_rng(0).permutation(np.concatenate(kept))


if __name__ == "__main__":
    main()
