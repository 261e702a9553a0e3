"""Tells which kinds of defects there are, after a detector has run and without a single label.

    python discover.py RUN                                  # contrast; the number is estimated
    python discover.py RUN --kinds 5                        # five kinds of defects
    python discover.py RUN --kinds known                    # as published: as many as have names
    python discover.py RUN --images "line3/*.png"           # in images without labels
    python discover.py RUN --names names.csv                # call the kinds by your names
    python discover.py RUN --assign new_images/             # new images get the kinds found before
    python discover.py RUN --kinds known anomalyncd --base AeBAD_S
    python discover.py --maps maps/ --images photos/ --out found    # maps of other software

RUN is a run folder of train_mvtec.py. Each category's maps become masks, masks become regions, and
regions that look alike are one kind. RUN/discovery/<method>/ gets metrics.csv and table.md (with
the folders' names: NMI, ARI and F1 beside published values) and a folder for each category, whose
files utils/discovery/files.py lists. Exit code: 0; 2 where something went wrong.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from configs.discovery import DiscoverOptions
from utils.cli import exits_cleanly, require_device

if TYPE_CHECKING:
    from pipeline.discovery.looking import Looked


@exits_cleanly(interrupted="interrupted; finished categories are in their folders")
def main(argv: Sequence[str] | None = None) -> Path:
    """Find the kinds of each category, or give new images theirs; return the folder written."""
    options = tyro.cli(
        DiscoverOptions,
        args=argv,
        prog="discover.py",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.CascadeSubcommandArgs),
    )
    require_device(options.device)

    from pipeline.discovery.looking import look  # only now: it imports torch
    from pipeline.discovery.summary import folder_of, require_found, say, write_row, write_summary

    folder = folder_of(options)
    if options.assign:
        require_found(folder)
        for looked in look(options, needs_levels=False):
            assign_category(options, looked, folder / looked.category)
        return folder

    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for looked in look(options, needs_levels=options.needs_levels):
        row = find_category(options, looked, folder / looked.category)
        row["seconds"] = time.perf_counter() - start
        rows = write_row(row, folder)
        say(row, folder)
        start = time.perf_counter()
    write_summary(options, rows, folder)
    return folder


def find_category(options: DiscoverOptions, looked: "Looked", folder: Path) -> dict[str, Any]:
    """Find the kinds of a category, write them down, and return its row of metrics.csv."""
    from pipeline.discovery.assigning import Kept, keep, made_by
    from pipeline.discovery.collecting import Collector
    from pipeline.discovery.cutting import cutter_of, scale_of
    from pipeline.discovery.finding import find
    from pipeline.discovery.writing import renumbered, write_found

    standard = looked.standard()
    scale = None
    if options.needs_scale:
        scale = scale_of(looked, guarded=options.masks_by != "mebin_released")
    cut = cutter_of(options.masks_by, options.most_regions, looked, scale)
    collected = Collector(options.method, looked, cut, standard, scale, folder).collect()
    found = renumbered(find(options, looked, collected, folder), looked, folder)
    row = write_found(options, looked, collected, found, folder)
    kept = Kept(
        options.method,
        options.masks_by,
        options.most_regions,
        standard,
        looked.levels,
        scale,
        found.state,
        found.num_kinds,
        made_by(looked),
    )
    keep(folder, kept)
    return row


def assign_category(options: DiscoverOptions, looked: "Looked", folder: Path) -> None:
    """Give new images of a category the kinds that were found before, and write them down."""
    from pipeline.discovery.assigning import assign, read_kept
    from pipeline.discovery.collecting import Collector
    from pipeline.discovery.cutting import cutter_of
    from pipeline.discovery.writing import names_of, write_rows

    kept = read_kept(looked, folder)
    looked = replace(looked, levels=kept.levels)
    cut = cutter_of(kept.masks, kept.most_regions, looked, kept.scale)
    out = folder / "assigned"
    collected = Collector(kept.method, looked, cut, kept.standard, kept.scale, out).collect()
    write_rows(
        out, looked, collected, assign(kept, collected, options.device), names_of(options, folder)
    )
    sys.stdout.write(f"{out / 'images.csv'}\n")


if __name__ == "__main__":
    main()
