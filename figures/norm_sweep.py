"""AUROC against the norm of the objective G: NoCo trained and in closed form, over data sets.

python -m figures.norm_sweep RUN [RUN ...] --out FILE

Tests the NoCo paper's main claim: the norm has a shared optimal range, about 1, over structured and
semantic tasks. Takes runs of `noco` and `noco_exact` that differ in --method.norm; a column for
each data set, with pixel AUROC below where there are masks. Ways of selecting are never mixed: each
is a line of its own. Bands are the standard deviation over seeds; the closed form has no random
part. Writes FILE.png, FILE.pdf, FILE.csv and FILE.md, which also names the norms within one point
of each curve's best and those that all data sets share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures.shared.option_curves import Sweep
from figures.shared.option_plots import make
from utils.cli import exits_cleanly
from utils.errors import RunError


def solver_of(config: dict[str, Any]) -> str:
    """Name how the projector was found.

    Raises:
        RunError: the run is of a method without an objective.
    """
    names = {"noco": "trained", "noco_exact": "closed form"}
    if config["method_name"] not in names:
        raise RunError(
            f"{config['method_name']} on {config['dataset']} has no objective whose norm could be "
            "swept; give runs of noco or noco_exact"
        )
    return names[config["method_name"]]


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    sweep = Sweep(
        module="figures.norm_sweep",
        option="method.norm",
        symbol="norm",
        axis="norm of the objective G",
        scale="log2",
        source=(
            "The NoCo paper claims a shared optimal range, about 1, over both kinds of task; its "
            "curves are not in published.csv, so these are ours only."
        ),
        family=solver_of,
        claim=1.0,
    )
    return make(sweep, argv, __doc__)


if __name__ == "__main__":
    main()
