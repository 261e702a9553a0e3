"""The tables of a run report, read back from a run folder."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from figures.shared.run_log import Pair, images_of
from utils.metrics.metrics import metric_names, table_metrics
from utils.runs.files import corrupt
from utils.tables.results import SELECT_LABELS, Benchmark, build_table
from utils.tables.table import Table

_KEYS = ("category", "seed", "select")
_ALARMS = re.compile("false_alarm|calibration_images|test_normals")
"""Found in the names of columns about alarms on normal images."""


@dataclass(frozen=True)
class Facts:
    """A plain table: names of columns, and rows of texts with the category they are about."""

    names: list[str]
    rows: list[tuple[str, list[str]]]


def results_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return the table a run wrote, or one of what is finished; None where nothing is.

    Runs of the first version wrote none that can be read back.

    Raises:
        RunError: table.json is corrupt.
    """
    path = folder / "table.json"
    if not path.is_file():
        return _partial(rows)
    try:
        table = Table.from_json(path.read_bytes().decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise corrupt(path, str(error)) from None
    missing = {row["category"] for row in rows} - {row.key for row in table.rows}
    if not missing:
        return table
    note = f"Older than results.csv: without {', '.join(sorted(missing))}."
    return replace(table, notes=(note, *table.notes))


def _partial(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return the table over the categories that are finished for the seeds of the first one."""
    if not rows:
        return None
    selects = {row["select"] for row in rows}
    done = {(row["category"], row["seed"]) for row in rows}
    seeds = [seed for category, seed in sorted(done) if category == rows[0]["category"]]
    names = list(dict.fromkeys(row["category"] for row in rows))
    categories = [name for name in names if all((name, seed) in done for seed in seeds)]
    shown = [row for row in rows if row["category"] in categories and row["seed"] in seeds]
    metrics = [
        name
        for name in (metric.name for metric in table_metrics(metric_names(), has_maps=True))
        if all(isinstance(row.get(name), (int, float)) for row in shown)
        and any(not math.isnan(row[name]) for row in shown)
    ]
    if not metrics or len(shown) != len(categories) * len(seeds) * len(selects):
        return None
    about = Benchmark(title="What is finished", categories=categories, seeds=seeds, metrics=metrics)
    return build_table(shown, about)


def unfinished_pairs(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], seen: Sequence[Pair]
) -> list[str]:
    """Name what was asked for or begun and has no result yet."""
    wanted = {key: config.get(key) for key in ("categories", "seeds")}
    listed = {key: value if isinstance(value, list) else [] for key, value in wanted.items()}
    categories = listed["categories"] or list(dict.fromkeys(name for name, _ in seen))
    asked = [(str(name), seed) for name in categories for seed in listed["seeds"]]
    finished = {(row["category"], row["seed"]) for row in rows}
    return [f"{c}, seed {s}" for c, s in dict.fromkeys([*asked, *seen]) if (c, s) not in finished]


def head_facts(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return what stands at the head of the page."""
    select = str(config.get("select", "unknown"))
    seeds = sorted({row["seed"] for row in rows})
    commit = str(record.get("commit") or "unknown")[:12]
    if record.get("dirty"):
        commit += ", with uncommitted changes"
    versions = record.get("versions")
    named = versions.items() if isinstance(versions, dict) else ()
    facts = {
        "method": config["method_name"],
        "data set": ", ".join(
            str(part) for part in (images_of(config), config.get("protocol")) if part
        ),
        "backbone": config.get("backbone", "unknown"),
        "reported": SELECT_LABELS.get(select, select),
        "seeds": ", ".join(map(str, seeds)) or "none finished",
        "commit": commit,
        "device": " ".join(str(record[k]) for k in ("device", "device_name") if record.get(k)),
        "versions": ", ".join(f"{name} {version}" for name, version in named),
        "started": record.get("started", "unknown"),
        "command": record.get("command", "unknown (environment.json is missing)"),
    }
    if isinstance(continued := record.get("continued"), list):
        facts["continued"] = f"{len(continued)} x, see the environment below"
    return [(name, str(value)) for name, value in facts.items() if value]


def false_alarms(rows: Sequence[Mapping[str, Any]]) -> Facts | None:
    """Return the columns about false alarms; None where the run recorded none."""
    return _facts(rows, [name for name in _columns(rows) if _ALARMS.search(name)])


def other_facts(rows: Sequence[Mapping[str, Any]]) -> Facts | None:
    """Return every column that is neither a metric nor about false alarms, known or not."""
    return _facts(
        rows, [n for n in _columns(rows) if n not in metric_names() and not _ALARMS.search(n)]
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (rows[0] if rows else ()) if name not in _KEYS]


def _facts(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Facts | None:
    kept = [name for name in names if any(row.get(name) not in ("", None) for row in rows)]
    if not kept:
        return None
    return Facts(
        [name.replace("_", " ") for name in (*_KEYS, *kept)],
        [
            (row["category"], [_shown(row.get(name, "")) for name in (*_KEYS, *kept)])
            for row in rows
        ],
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
