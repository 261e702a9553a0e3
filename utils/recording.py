"""From the outcomes of one (category, seed) to the run folder and to a line on the terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from utils.evaluation import Outcome
from utils.metrics import METRIC_NAMES
from utils.runs import Run
from utils.table_formats import Table
from utils.tables import SELECT_LABELS, build_table

RANDOM_WEIGHTS = "RANDOM BACKBONE WEIGHTS (--weights random): these numbers measure no method."


def record_pair(
    run: Run,
    category: str,
    seed: int,
    outcomes: Sequence[Outcome],
    *,
    paths: Sequence[Path | str],
    labels: Tensor,
    defects: Sequence[str],
    facts: Mapping[str, float | int | str],
    metadata: Mapping[str, str],
    save_maps: bool = False,
) -> str:
    """Write scores, heads and, last of all, the rows that mark the pair as finished.

    Args:
        run: the open run.
        category: category or normal class.
        seed: of this fit.
        outcomes: one per way of selecting; the last one is what `--select` names.
        paths: (N,) test images.
        labels: (N,), 1 = anomalous.
        defects: (N,) kinds of defect, "good" for normal images.
        facts: further columns of results.csv, e.g. counts and seconds.
        metadata: kept inside the head's file.
        save_maps: keep the anomaly maps too.

    Returns:
        One summary line.
    """
    rows = []
    for outcome in outcomes:
        run.save_scores(
            category,
            seed,
            paths=paths,
            labels=labels,
            scores=outcome.scores.images,
            defects=defects,
            maps=outcome.scores.maps if save_maps else None,
            suffix="" if "" in outcome.states else next(iter(outcome.states)),
        )
        for suffix, state in outcome.states.items():
            run.save_head(category, seed, state, metadata, suffix=suffix)
        rows.append(
            {
                "category": category,
                "seed": seed,
                "select": outcome.select,
                **outcome.metrics,
                **outcome.steps,
                **facts,
                "undefined": "; ".join(f"{n}: {why}" for n, why in outcome.undefined.items()),
            }
        )
    run.finish(category, seed, rows)
    return summary_line(category, seed, outcomes, facts)


def summary_line(
    category: str, seed: int, outcomes: Sequence[Outcome], facts: Mapping[str, float | int | str]
) -> str:
    """Say in one line how a fit went, in percent."""
    shown = ("image_auroc", "pixel_auroc", "aupro")
    parts = []
    for outcome in outcomes:
        values = [(n, outcome.metrics[n]) for n in shown if not math.isnan(outcome.metrics[n])]
        head = "" if outcome.select == "last" else "best on test (optimistic): "
        parts.append(head + "  ".join(f"{name} {100 * value:.2f}" for name, value in values))
    seconds = facts.get("fit_seconds")
    took = "" if seconds is None else f"  (fit {float(seconds):.1f} s)"
    return f"{category}  seed {seed}:  " + "  |  ".join(parts) + took


def finish_tables(
    run: Run,
    *,
    title: str,
    dataset: str | None,
    metrics: Sequence[str],
    select: str,
    groups: Mapping[str, Sequence[str]] | None = None,
    display: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """Build the table from every row of the run, write it in all formats and print it.

    Args:
        run: with every requested pair finished.
        title: of the caption.
        dataset: whose published values stand beside ours; None for none.
        metrics: columns, in order.
        select: what `--select` was.
        groups: mean lines over some of the categories.
        display: printed names of categories.
        notes: printed below the table, before what the rows themselves have to say.

    Raises:
        RunError: a (category, seed) of the table is missing.
    """
    rows = run.rows()
    table = build_table(
        rows,
        title=f"{title}; reported: {SELECT_LABELS[select]}",
        categories=run.categories,
        seeds=run.seeds,
        metrics=metrics,
        dataset=dataset,
        groups=groups,
        display=display,
        notes=[*notes, *row_notes(rows)],
        nan_reasons=[f"{n}: {why}" for n, why in undefined_reasons(rows).items() if n in metrics],
    )
    table.write(run.folder)
    tqdm.write(table.to_text())
    tqdm.write(f"run folder: {run.folder}")
    return table


def row_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what the numbers leave out: unreadable images, and defects no map can find."""
    notes = []
    per_category = {row["category"]: row for row in rows}
    if skipped := sum(row["skipped"] for row in per_category.values()):
        notes.append(
            f"{skipped} unreadable images were left out (--skip-unreadable); metrics.jsonl names "
            "them."
        )
    if empty := sum(row["empty_masks"] for row in per_category.values()):
        notes.append(
            f"{empty} anomalous test images have an empty mask at this size (defect cropped away "
            "or thinner than a pixel): they count as anomalous, but no map can find them; "
            "metrics.jsonl names them."
        )
    return notes


def undefined_reasons(rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Collect why metrics of a table are nan, from the rows' `undefined` column."""
    reasons: dict[str, str] = {}
    for row in rows:
        for item in str(row.get("undefined", "")).split("; "):
            name, _, reason = item.partition(": ")
            if name in METRIC_NAMES and reason:
                reasons[name] = reason
    return reasons
