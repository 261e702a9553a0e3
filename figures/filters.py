"""Both filters of `noco_cf` against the eigenvalues they filter.

python -m figures.filters RUN [RUN ...] [--category NAME] [--seed K] --out FILE

Takes runs of `noco_cf`, of one filter or of both. Above: the squared gain on a direction of
variance v, relative to one that normal features do not fill, as a line for the ridge and one for
the flow, with dots for the stored heads. Below: how many directions of the first run's centres have
which variance, by stage. Variances are in units of lambda, which is where both filters turn. Writes
FILE.png and FILE.pdf.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from figures.shared.drawing import COLOURS, parser, save_figure
from utils.cli import exits_cleanly
from utils.errors import RunError
from utils.runs.finished import finished_pairs
from utils.runs.run import Run

if TYPE_CHECKING:
    from torch import Tensor

CENTRES = 16
"""Centres of each stage that are drawn, spread over all of them."""
DOTS = 40
"""Directions of each head that are dots."""
LINES = {
    "ridge": ("1 / (1 + v / lambda)", lambda ratio: 1 / (1 + ratio)),
    "flow": ("exp(-v / lambda)", lambda ratio: np.exp(-ratio)),
}


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    command = parser("figures.filters", __doc__)
    command.add_argument("--category", help="default: the first that is finished")
    command.add_argument("--seed", type=int, help="default: the first that is finished")
    arguments = command.parse_args(argv)
    heads = [read(folder, arguments.category, arguments.seed) for folder in arguments.runs]
    paths = save_figure(draw(heads), arguments.out)
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return paths


def read(folder: Path, category: str | None, seed: int | None) -> tuple[str, list[np.ndarray]]:
    """Return a run's filter, and of each stage the variances in units of lambda, ascending.

    Raises:
        RunError: the run is of another method, or has no head of that category and seed.
    """
    run = Run.read(folder)
    if run.config["method_name"] != "noco_cf":
        raise RunError(f"{folder}: {run.config['method_name']} has no such filters; give noco_cf")
    pairs = [
        (name, number)
        for name, number in finished_pairs(run)
        if category in (None, name) and seed in (None, number)
    ]
    if not pairs:
        raise RunError(f"{folder}: no finished head of category {category}, seed {seed}")
    state, _ = run.load_head(*pairs[0])
    kind = str(run.config["method"]["filter"])
    names = sorted(name for name in state if name.endswith(".filters"))
    return kind, [_variances(state, name, kind) for name in names]


def _variances(state: "dict[str, Tensor]", name: str, kind: str) -> np.ndarray:
    """Return variances in units of lambda from a stage's filters, (CENTRES * D,) or fewer."""
    filters = state[name].double().numpy()  # (K, D, D)
    ridge = state[f"{name.removesuffix('filters')}ridge"].item()
    chosen = np.linspace(0, len(filters) - 1, min(CENTRES, len(filters))).astype(int)
    gains = ridge * np.square(np.linalg.svd(filters[chosen], compute_uv=False)).ravel()
    gains = gains.clip(1e-30, 1)  # rounding may leave a little more than 1
    return np.sort(1 / gains - 1 if kind == "ridge" else -np.log(gains))


def draw(heads: Sequence[tuple[str, list[np.ndarray]]]) -> Figure:
    """Draw the gains, and the variances of the first head."""
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    ratio = np.geomspace(1e-3, 1e4, 300)
    for colour, (kind, (formula, gain)) in zip(COLOURS, LINES.items(), strict=False):
        above.plot(ratio, gain(ratio), color=colour, label=f"{kind}: {formula}")
    for kind, stages in heads:
        values = np.sort(np.concatenate(stages))
        some = values[np.linspace(0, len(values) - 1, DOTS).astype(int)]
        colour = COLOURS[list(LINES).index(kind)]
        above.plot(some, LINES[kind][1](some), "o", color=colour, markersize=4)
    above.plot([], [], "o", color="0.3", markersize=4, label="directions of the stored heads")
    above.set(xscale="log", ylabel="squared gain * lambda", ylim=(-0.03, 1.05), xlim=(1e-3, 1e4))
    bins = np.geomspace(1e-3, 1e4, 57)
    for number, values in enumerate(heads[0][1], start=1):
        counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
        below.stairs(counts / len(values), bins, color=COLOURS[number + 1], label=f"stage {number}")
    below.set(xlabel="variance v of a direction / lambda", ylabel="share of a stage's directions")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
