"""AUROC against the side p of the averaged neighbourhood: SimpleNet's Fig. 6, for any method.

python -m figures.patch_size RUN [RUN ...] --out FILE

Takes runs of structured data that differ in --patch-size; a column for each data set, image AUROC
above pixel AUROC. Ways of selecting are never mixed: each is a line of its own. Bands are the
standard deviation over seeds. Writes FILE.png, FILE.pdf, FILE.csv and FILE.md.
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
        module="figures.patch_size",
        option="patch_size",
        symbol="patch size",
        axis="neighbourhood size p, positions",
        scale="linear",
        source=(
            "SimpleNet paper, Fig. 6 (its p: 3); its curves are not in published.csv, so these "
            "are ours only."
        ),
        family=lambda config: str(config["method_name"]),
    )
    return make(sweep, argv, __doc__)


if __name__ == "__main__":
    main()
