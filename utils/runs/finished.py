"""Which heads a run folder has, and with which options each was made."""

import json
from collections.abc import Mapping
from typing import Any

from utils.errors import RunError, UsageError
from utils.runs.files import read_records
from utils.runs.run import Run


def finished_pairs(run: Run) -> list[tuple[str, int]]:
    """Return the finished (category, seed) of a run, in the order of results.csv.

    Raises:
        RunError: there is none.
    """
    pairs = list(dict.fromkeys((row["category"], row["seed"]) for row in run.rows()))
    if not pairs:
        raise RunError(f"{run.folder}: no (category, seed) is finished; train it first")
    return pairs


def choose_pair(run: Run, category: str | None, seed: int | None) -> tuple[str, int]:
    """Return the finished (category, seed) that is meant; None leaves the choice open.

    Raises:
        UsageError: none is, or several are; the message lists them.
    """
    pairs = finished_pairs(run)
    meant = [p for p in pairs if category in (None, p[0]) and seed in (None, p[1])]
    if len(meant) == 1:
        return meant[0]
    names = ", ".join(dict.fromkeys(name for name, _ in meant or pairs))
    seeds = ", ".join(dict.fromkeys(str(number) for _, number in meant or pairs))
    raise UsageError(
        f"{run.folder} has {'several heads' if meant else 'no such head'}: choose one by "
        f"--category ({names}) and --seed ({seeds})"
    )


def chosen_options(
    run: Run, category: str, seed: int, suffix: str, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Return the options that `--select synthetic` chose for a pair, as JSON values.

    They are in the head's metadata; runs of earlier versions have them in metrics.jsonl alone.

    Raises:
        RunError: neither says so, or they are no object.
    """
    path = run.head_path(category, seed, suffix)
    of = "" if run.is_joint else category
    if (metadata.get("category"), metadata.get("seed")) != (of, str(seed)):
        raise RunError(f"{path}: not the head of {category!r}, seed {seed}; train it again")
    if "options" in metadata:
        try:
            options = json.loads(metadata["options"])
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise RunError(f"{path}: its options are no JSON object; train the pair again")
        return options
    if run.config.get("select") != "synthetic":
        return {}
    log = run.folder / "metrics.jsonl"
    for record in read_records(log):
        pair = (record.get("category"), record.get("seed"), record.get("event"))
        if pair == (category, seed, "chosen") and isinstance(record.get("options"), dict):
            return dict(record["options"])
    raise RunError(f"{log}: does not say what was chosen for {category!r}, seed {seed}")
