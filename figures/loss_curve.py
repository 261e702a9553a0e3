"""The training loss of each epoch, from run folders (SimpleNet, Fig. 7).

python -m figures.loss_curve RUN [RUN ...] --out FILE

One run: a colour for each category. Several runs: a colour for each run. Thin lines are single
seeds and categories, thick ones their mean. The dashed line is the loss of a discriminator that
always answers zero.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.shared.drawing import parser, save_figure, style
from figures.shared.run_log import Curve, LoggedRun, read_runs
from utils.cli import exits_cleanly
from utils.errors import RunError


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    options = parser("figures.loss_curve", __doc__)
    options.add_argument("--log", action="store_true", help="logarithmic loss")
    arguments = options.parse_args(argv)
    figure = draw(read_runs(arguments.runs), log=arguments.log)
    paths = save_figure(figure, arguments.out)
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return paths


def draw(runs: Sequence[LoggedRun], *, log: bool = False) -> Figure:
    """Draw the loss over the epochs.

    Raises:
        RunError: a run logged no loss.
    """
    groups = _groups(runs)
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, (name, curves) in enumerate(groups.items()):
        several = len(curves) > 1
        for steps, losses in curves:
            thin = {"alpha": 0.3, "linewidth": 0.8} if several else {"label": name}
            axes.plot(steps, losses, **style(number), **thin)
        if several:
            steps, mean = _mean(curves)
            label = f"{name} (mean of {len(curves)})"
            axes.plot(steps, mean, linewidth=2.0, label=label, **style(number))
    for loss in sorted({t for run in runs if (t := trivial_loss(run.run.config)) is not None}):
        label = f"always answering 0: loss {loss:.3g}"
        axes.axhline(loss, color="0.4", linestyle=(0, (6, 3)), linewidth=0.9, label=label)
    axes.set(xlabel="epoch", ylabel="training loss", title=_title(runs))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def trivial_loss(config: dict[str, Any]) -> float | None:
    """Return the loss of a discriminator that always answers zero; None for other methods."""
    method = config["method"]
    if method.get("loss") == "truncated_l1":
        return 2 * float(method["threshold"])
    return 2 * math.log(2) if method.get("loss") == "cross_entropy" else None


def _groups(runs: Sequence[LoggedRun]) -> dict[str, list[Curve]]:
    """Return the curves by what gets a colour: the categories of one run, or the runs."""
    groups: dict[str, list[Curve]] = {}
    for run in runs:
        curves = run.curves("loss")
        if not curves:
            raise RunError(
                f"{run.run.folder}: no training loss was logged; is this a fit by steps?"
            )
        for (category, _), curve in curves.items():
            groups.setdefault(category if len(runs) == 1 else run.label, []).append(curve)
    return groups


def _mean(curves: Sequence[Curve]) -> tuple[list[int], list[float]]:
    """Return the mean over curves at the steps all of them have."""
    by_step = [dict(zip(*curve, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*(set(values) for values in by_step)))
    return shared, [float(np.mean([values[s] for values in by_step])) for s in shared]


def _title(runs: Sequence[LoggedRun]) -> str:
    if len(runs) == 1:
        return runs[0].title
    return ", ".join(dict.fromkeys(run.run.config["dataset"] for run in runs))


if __name__ == "__main__":
    main()
