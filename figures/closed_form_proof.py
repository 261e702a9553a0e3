"""Gradient descent against the closed form of NoCo's training.

python -m figures.closed_form_proof --out FILE

A projector with bias is trained by full-batch gradient descent on small random features, for three
norms of the objective. Dots are the residual W f~ - G of the trained projector on unseen features,
lines that of the closed form, (W0 - G e') exp(-C s) f~ at s = 2 * learning rate * steps. The time
axis is t = s * trace(C). No run is read.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from figures.shared.drawing import COLOURS, save_figure

NORMS = (0.5, 1.0, 4.0)
CHANNELS = 6
NUM_NORMAL, NUM_UNSEEN = 24, 16
STEP = 1e-3
"""Time t of one step of gradient descent."""
STEPS = (10, 20, 40, 80, 160, 320, 640, 1250, 2500, 5000, 10_000, 20_000, 40_000)
"""Steps after which both are compared."""


@dataclass(frozen=True)
class Comparison:
    """Residuals of one norm.

    Attributes:
        trained: root mean squared length of the trained residual, one per element of `STEPS`.
        times: of `solved`, a fine grid over the same range.
        solved: the same of the closed form.
        error: largest relative error of the residuals themselves over `STEPS`.
    """

    trained: np.ndarray
    times: np.ndarray
    solved: np.ndarray
    error: float


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Train, solve and draw; return the files written."""
    parser = argparse.ArgumentParser(
        prog="python -m figures.closed_form_proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("closed_form_proof"),
        metavar="FILE",
        help="written as FILE.png and FILE.pdf (default: %(default)s)",
    )
    paths = save_figure(draw(), parser.parse_args(argv).out)
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return paths


def draw() -> Figure:
    """Draw the residual over the training time for each norm."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    worst = 0.0
    for colour, norm in zip(COLOURS, NORMS, strict=False):
        comparison = compare(norm)
        worst = max(worst, comparison.error)
        line = f"closed form, ||G|| = {norm:g}"
        axes.plot(comparison.times, comparison.solved, color=colour, label=line)
        axes.plot(STEP * np.array(STEPS), comparison.trained, "o", color=colour)
    axes.plot([], [], "o", color="0.3", label="gradient descent")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="training time t",
        ylabel="root mean squared ||W f~ - G||, unseen features",
        title=f"Training and its closed form: largest relative error {worst:.1e}",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def compare(norm: float) -> Comparison:
    """Train and solve for one norm of the objective, from one draw of features, W0 and G."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(CHANNELS, CHANNELS)) * np.logspace(0, -1, CHANNELS)
    normal, unseen = (
        _extend(rng.normal(size=(count, CHANNELS)) @ mixing + 0.4)
        for count in (NUM_NORMAL, NUM_UNSEEN)
    )
    bound = CHANNELS**-0.5  # PyTorch's initialisation
    weight = rng.uniform(-bound, bound, size=(CHANNELS, CHANNELS + 1))
    objective = rng.normal(size=CHANNELS)
    objective *= norm / np.linalg.norm(objective)

    moment = normal.T @ normal / len(normal)  # C, (D+1, D+1)
    values, vectors = np.linalg.eigh(moment / moment.trace())
    start = weight.copy()
    start[:, -1] -= objective  # W0 - G e'

    def solve(time: float) -> np.ndarray:
        flow = vectors * np.exp(-values * time) @ vectors.T  # exp(-C s)
        return np.asarray(unseen @ (start @ flow).T)  # (N, D)

    trained, errors = [], []
    learning_rate = STEP / 2 / moment.trace()
    for step in range(1, STEPS[-1] + 1):
        residual = normal @ weight.T - objective  # (N, D)
        weight -= learning_rate * 2 / len(normal) * residual.T @ normal
        if step in STEPS:
            left = unseen @ weight.T - objective  # (N, D)
            trained.append(_size(left))
            errors.append(np.linalg.norm(left - solve(step * STEP)) / np.linalg.norm(left))
    times = np.geomspace(STEPS[0], STEPS[-1], 200) * STEP
    solved = np.array([_size(solve(time)) for time in times])
    return Comparison(np.array(trained), times, solved, float(max(errors)))


def _extend(features: np.ndarray) -> np.ndarray:
    """Append the bias feature: (N, D) to (N, D + 1)."""
    return np.pad(features, ((0, 0), (0, 1)), constant_values=1.0)


def _size(residual: np.ndarray) -> float:
    """Return the root mean squared length of residuals (N, D)."""
    return float(np.sqrt(np.square(residual).sum(axis=1).mean()))


if __name__ == "__main__":
    main()
