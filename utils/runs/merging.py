"""One run folder from run folders of single (category, seed) pairs."""

import json
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import RunError
from utils.runs.files import atomic_path, flat, read_object, write_text
from utils.runs.run import Run

Pair = tuple[str, int]


def merge(
    folder: Path,
    config: Mapping[str, Any],
    *,
    categories: Sequence[str],
    seeds: Sequence[int],
    parts: Mapping[Pair, Path],
    command: Sequence[str],
    may_differ: Collection[str],
) -> Run:
    """Bring finished pairs into the run folder that one command for all of them would have made.

    Pairs that the folder has already stay as they are. Files are hard links of those of the parts
    where the file system can, so they take no room twice; either may be deleted.

    Args:
        folder: of the whole.
        config: of the whole, as `Run.open` takes it.
        categories: of the whole, in the order of its table.
        seeds: of the whole, in the order of its table.
        parts: the run folder in which each pair was made.
        command: the one for all pairs, for environment.json.
        may_differ: options in which a part may differ from the whole.

    Raises:
        RunError: a pair has no part or is not finished in it, a part was made with other options,
            or the folder holds another run.
    """
    is_new = not (folder / "environment.json").exists()
    run = Run.open(
        folder, dict(config), categories=categories, seeds=seeds, command=command, device="cpu"
    )
    missing: dict[Path, list[Pair]] = {}  # a part has several pairs where they share a head
    for pair in ((category, seed) for category in categories for seed in run.pending(category)):
        if pair not in parts:
            raise RunError(f"{folder}: nothing to merge for {pair[0]!r}, seed {pair[1]}")
        if parts[pair] not in missing:
            _check_same(Run.read(parts[pair]), run, may_differ)
        missing.setdefault(parts[pair], []).append(pair)
    for place, pairs in missing.items():
        _bring(Run.read(place), run, pairs)
    if missing:
        _record_origins(folder, list(missing), command if is_new else None)
    return run


def _check_same(part: Run, whole: Run, may_differ: Collection[str]) -> None:
    mine, its = flat(whole.config), flat(part.config)
    differing = [
        key for key in {**mine, **its} if mine.get(key) != its.get(key) and key not in may_differ
    ]
    if differing:
        raise RunError(
            f"{part.folder} cannot be merged into {whole.folder}: they differ in "
            f"{', '.join(sorted(differing))}"
        )


def _bring(part: Run, whole: Run, pairs: Sequence[Pair]) -> None:
    rows: dict[Pair, list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for row in part.rows():
        if (row["category"], row["seed"]) in rows:
            rows[row["category"], row["seed"]].append(row)
    for (category, seed), found in rows.items():
        if not found:
            raise RunError(f"{part.folder}: {category!r}, seed {seed} is not finished")
    for path in sorted(part.folder.rglob("*")):
        name = path.relative_to(part.folder)
        # What lies beside results.csv belongs to a run, what lies deeper to a pair.
        if path.is_file() and len(name.parts) > 1 and path.suffix != ".tmp":
            with atomic_path(whole.folder / name) as temporary:
                _link(path, temporary)
    lines = (part.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with (whole.folder / "metrics.jsonl").open("ab") as file:
        for line in lines:
            record = json.loads(line)
            if (record["category"], record["seed"]) in rows:
                file.write(line)
    whole.finish(rows)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _record_origins(folder: Path, parts: Sequence[Path], command: Sequence[str] | None) -> None:
    """Add to environment.json where the pairs were made, as further starts of the run.

    Args:
        folder: of the whole.
        parts: the run folders that were merged.
        command: the run's own, where its folder is new and all it records so far is the merging;
            the rest of the first record is then that of the machine that made the first pair.
    """
    path = folder / "environment.json"
    record = read_object(path)
    starts = [start for part in parts for start in _starts(read_object(part / "environment.json"))]
    if command is None:
        first, *earlier = _starts(record)
        starts = [*earlier, *starts]
    else:
        first = {**starts[0], "command": shlex.join(command)}
    write_text(path, json.dumps({**first, "continued": starts}, indent=2) + "\n")


def _starts(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "continued"}, *record.get("continued", [])]
