"""AUROC against the generator's noise sigma: SimpleNet's Fig. 5, with nc_disc beside it.

python -m figures.sigma_sweep RUN [RUN ...] --out FILE

Takes runs of `simplenet`, `simplenet_released` and `nc_disc` that differ in --method.sigma; a
column for each data set, with pixel AUROC below where there are masks. Ways of selecting are never
mixed: each is a line of its own. Bands are the standard deviation over seeds. Writes FILE.png,
FILE.pdf, FILE.csv and FILE.md.
"""

from collections.abc import Sequence
from pathlib import Path

from figures.shared.option_curves import Sweep
from figures.shared.option_plots import make
from utils.cli import exits_cleanly


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the runs named on the command line; return the files written."""
    sweep = Sweep(
        module="figures.sigma_sweep",
        option="method.sigma",
        symbol="sigma",
        axis="sigma of the Gaussian generator",
        scale="log10",
        source=(
            "SimpleNet paper, Fig. 5 (its sigma: 0.015); its curves are not in published.csv, so "
            "these are ours only."
        ),
        family=lambda config: str(config["method_name"]),
    )
    return make(sweep, argv, __doc__)


if __name__ == "__main__":
    main()
