"""The run folder: everything a training script leaves behind, written so that a kill loses nothing.

config.json       the resolved options; the same ones continue the run, others are refused
environment.json  command, commit, versions, device; one record more for each continuation
metrics.jsonl     one JSON object per logged step, each with its category and seed
scores/           <category>-seed<k>.npz: path, label, score, defect of each test image, and
                  what else there is (`utils.runs.scores`)
heads/            <category>-seed<k>.safetensors: the trained head; seed<k>.safetensors where one is
                  for all categories (`--protocol multi-class`)
calibration/      scores of normal images that a head has not seen (`utils.evaluation.calibration`)
data/             <category>-seed<k>.json: what images and weights a pair was made of
checkpoints/      <category>-seed<k>.pt: where an unfinished fit is (`utils.runs.checkpoints`)
results.csv       one row per (category, seed, select); a pair is finished when its rows are here
table.{md,tex,csv}, overlays/<category>-seed<k>/*.png
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from configs.earlier import upgraded
from configs.structured import JOINT
from utils.errors import RunError
from utils.runs.environment import environment_record
from utils.runs.files import (
    SELECTS,
    append_text,
    atomic_path,
    delete_checkpoint,
    delete_leftovers,
    delete_run,
    file_stem,
    flat,
    jsonable,
    keep_metrics,
    make_folder,
    read_object,
    write_text,
)
from utils.runs.lock import lock_run
from utils.runs.made_of import MadeOf, check_made_of, made_of_file, save_made_of
from utils.runs.rows import read_rows, with_later_columns, write_rows
from utils.runs.scores import TestScores, read_scores, write_scores

if TYPE_CHECKING:
    from torch import Tensor

OTHER_DATA = (
    "--restart computes all of it again, another --run name keeps both, or put the data back."
)


class Run:
    """One run folder. `open` starts or continues it, `read` only reads."""

    def __init__(
        self, folder: Path, config: dict[str, Any], categories: Sequence[str], seeds: Sequence[int]
    ) -> None:
        self.folder = folder
        self.config = config
        self.categories = tuple(categories)
        self.seeds = tuple(seeds)
        self.made_of: dict[str, MadeOf] = {}
        self._lock: FileLock | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        config: dict[str, Any],
        *,
        categories: Sequence[str],
        seeds: Sequence[int],
        command: Sequence[str],
        device: str,
        restart: bool = False,
        made_of: Mapping[str, MadeOf] | None = None,
    ) -> "Run":
        """Start a run, or continue it after its last finished (category, seed).

        Lines of metrics.jsonl that belong to unfinished pairs are dropped: those pairs start again.
        Finished pairs that are not requested this time stay in results.csv, after the others.

        Args:
            folder: `results/<dataset>-<method>/<run>`; made when absent.
            config: What must be equal for two commands to be the same run; JSON values and paths.
            categories: In the order of the table.
            seeds: In the order of the table.
            command: The command line, recorded in environment.json.
            device: The resolved device, as "cpu" or "cuda:0".
            restart: Delete the files of an earlier run (only those a run writes), then start.
            made_of: The images and weights that are there, by category: finished pairs must have
                been made of the same, and those to come are recorded with it.

        Raises:
            RunError: The folder holds a run of another config, data or weights, a file of it is
                corrupt, or another process works on it.
        """
        if len(set(categories)) != len(categories) or len(set(seeds)) != len(seeds):
            raise ValueError(f"a category or seed is given twice: {categories}, {seeds}")
        for category in categories:
            if "\r" in category:
                raise RunError(f"category {category!r} holds a line break: rename it")
            try:
                category.encode()
            except UnicodeEncodeError:
                raise RunError(
                    f"category {category!r} is no UTF-8, which no head can be called by: rename it"
                ) from None
        run = cls(folder, json.loads(json.dumps(config, default=os.fspath)), categories, seeds)
        make_folder(folder)
        run._lock = lock_run(folder)
        if restart:
            delete_run(folder)
        run._check_config()
        finished = run._finished()
        run.made_of = dict(made_of or {})
        unknown = check_made_of(folder, finished, run.made_of, way_out=OTHER_DATA)
        if unknown:
            sys.stderr.write(
                f"warning: {folder}: an earlier version made {len(unknown)} of its results and did "
                "not keep of which data; --restart computes all of it again\n"
            )
        delete_leftovers(folder)
        for category, seed in finished:
            delete_checkpoint(run.head_path(category, seed))
        keep_metrics(folder / "metrics.jsonl", finished)
        run._record_environment(environment_record(command, device), len(finished))
        return run

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read an existing run, of an earlier version too; what writes refuses every pair.

        Raises:
            RunError: The folder holds no run, or config.json is corrupt.
        """
        if not (folder / "config.json").is_file():
            raise RunError(f"{folder}: not a run folder, config.json is missing")
        return cls(folder, upgraded(read_object(folder / "config.json")), (), ())

    def located(self, path: Path) -> Path:
        """Return a path of the run, from the folder it was started in if it is not from here."""
        record = self.folder / "environment.json"
        if path.is_absolute() or path.exists() or not record.is_file():
            return path
        there = Path(str(read_object(record).get("folder", ""))) / path
        return there if there.exists() else path

    def pending(self, category: str) -> list[int]:
        """Return the requested seeds of a category that are not finished, in order."""
        finished = self._finished()
        for seed in self.seeds:
            self._check_pair(category, seed)
        return [seed for seed in self.seeds if (category, seed) not in finished]

    def log(self, category: str, seed: int, **values: Any) -> None:
        """Append one line to metrics.jsonl: numbers, strings, and lists or mappings of them.

        NaN is written as null and an infinity as "inf" or "-inf", because JSON has neither.
        """
        self._check_pair(category, seed)
        record = {"category": category, "seed": seed, **jsonable(values)}
        append_text(self.folder / "metrics.jsonl", json.dumps(record, allow_nan=False) + "\n")

    def save_scores(self, category: str, seed: int, scores: TestScores, suffix: str = "") -> Path:
        """Write the scores of the test images.

        Args:
            category: A requested one.
            seed: A requested one.
            scores: Of a head.
            suffix: "" or, when several states are kept, one such as "-last".
        """
        self._check_pair(category, seed)
        write_scores(path := self.scores_path(category, seed, suffix), scores)
        return path

    def load_scores(self, category: str, seed: int, suffix: str = "") -> dict[str, np.ndarray]:
        """Return the arrays of a pair's scores; see `utils.runs.scores.read_scores`."""
        path = self.scores_path(category, seed, suffix)
        if not path.is_file():
            raise RunError(f"{path}: no scores of {category!r}, seed {seed}")
        return read_scores(path)

    def save_head(
        self,
        category: str,
        seed: int,
        state: "Mapping[str, Tensor]",
        metadata: Mapping[str, str],
        suffix: str = "",
    ) -> Path:
        """Write a head's state as safetensors; tensors may lie on any device and share memory."""
        import torch  # as safetensors.torch: only heads need them
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._check_pair(category, seed)
        path = self.head_path(category, seed, suffix)
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
        with atomic_path(path) as temporary:
            try:
                save_file(tensors, temporary, metadata=dict(metadata))
            except SafetensorError as error:  # what it makes of the system's errors
                raise OSError(str(error)) from error
        return path

    def load_head(
        self, category: str, seed: int, suffix: str = ""
    ) -> "tuple[dict[str, Tensor], dict[str, str]]":
        """Return the state (CPU tensors) and the metadata that `save_head` was given."""
        path = self.head_path(category, seed, suffix)
        if not path.is_file():
            raise RunError(f"{path}: no head of {category!r}, seed {seed}; train it first")
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())  # the file is no mapping: iterating it fails
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except Exception as error:  # SafetensorError, and PyTorch's own where it reads a tensor
            raise RunError(f"{path}: corrupt ({error}); train the pair again") from error

    def finish(self, found: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> None:
        """Add the rows of pairs to results.csv; call it last, all of them then count as finished.

        Args:
            found: Rows of each requested (category, seed), one per `select`; each row has category,
                seed, select and the same further columns, whose values are ints, floats or strings.

        Raises:
            RunError: The columns differ from those of the rows already there.
        """
        finished = self._finished()
        for (category, seed), rows in found.items():
            self._check_pair(category, seed)
            selects = [row["select"] for row in rows]
            if not rows or len(set(selects)) != len(selects) or not set(selects) <= set(SELECTS):
                raise ValueError(f"rows of {category!r}, seed {seed}: selects {selects}")
            if any((row["category"], row["seed"]) != (category, seed) for row in rows):
                raise ValueError(f"rows of {category!r}, seed {seed} name another pair")
            if (category, seed) in finished:
                raise ValueError(f"{category!r}, seed {seed} is finished already")
        new = [row for rows in found.values() for row in rows]
        existing, added = with_later_columns(self.rows(), new)
        columns = list(dict.fromkeys(["category", "seed", "select", *(existing or added)[0]]))
        for row in added:
            if differing := sorted(set(row) ^ set(columns)):
                raise RunError(
                    f"{self.folder / 'results.csv'}: the row of {row['category']!r}, seed "
                    f"{row['seed']} differs from the others in columns {differing}; the code has "
                    "changed since: use another --run name, or --restart"
                )
        order = {
            pair: place
            for place, pair in enumerate((c, s) for c in self.categories for s in self.seeds)
        }
        everything = sorted(  # stable: pairs not requested this time keep their order, at the end
            [*existing, *added],
            key=lambda row: order.get((row["category"], row["seed"]), len(order)),
        )
        for category, seed in found:
            if category in self.made_of:
                path = made_of_file(self.folder, category, seed)
                save_made_of(path, self.made_of[category])
        write_rows(self.folder / "results.csv", columns, everything)

    def rows(self) -> list[dict[str, Any]]:
        """Return results.csv: ints, strings, and floats to the last bit.

        Raises:
            RunError: The file is corrupt.
        """
        path = self.folder / "results.csv"
        return read_rows(path) if path.exists() else []

    def scores_path(self, category: str, seed: int, suffix: str = "") -> Path:
        """Return the path of the scores of a pair."""
        return self.folder / "scores" / f"{file_stem(category, seed, suffix)}.npz"

    @property
    def is_joint(self) -> bool:
        """Whether one head is for all categories."""
        return self.config.get("protocol") == JOINT

    def head_path(self, category: str, seed: int, suffix: str = "") -> Path:
        """Return the path of the head of a pair, which may be that of all categories."""
        stem = f"seed{seed}{suffix}" if self.is_joint else file_stem(category, seed, suffix)
        return self.folder / "heads" / f"{stem}.safetensors"

    def overlays_folder(self, category: str, seed: int) -> Path:
        """Return the folder for the pictures of a pair."""
        return self.folder / "overlays" / file_stem(category, seed)

    def _check_pair(self, category: str, seed: int) -> None:
        if category not in self.categories or seed not in self.seeds:
            raise ValueError(f"{category!r}, seed {seed} was not requested of this run")

    def _finished(self) -> set[tuple[str, int]]:
        return {(row["category"], row["seed"]) for row in self.rows()}

    def _check_config(self) -> None:
        path = self.folder / "config.json"
        if not path.exists():
            if (self.folder / "results.csv").exists():
                raise RunError(
                    f"{path} is missing beside results.csv, so nobody knows how those results were "
                    "made: use another --run name, or --restart"
                )
            write_text(path, json.dumps(self.config, indent=2) + "\n")
            return
        old, new = flat(upgraded(read_object(path))), flat(self.config)
        differences = [
            f"  {key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        if differences:
            raise RunError(
                f"{self.folder} holds a run of another configuration:\n"
                + "\n".join(differences)
                + "\nUse another --run name to keep both, or --restart to replace it."
            )

    def _record_environment(self, record: dict[str, Any], num_finished: int) -> None:
        path = self.folder / "environment.json"
        if path.exists():
            first = read_object(path)
            records = [first, *first.get("continued", [])]
            others = {entry.get("commit") for entry in records} - {None, record["commit"]}
            if num_finished and record["commit"] and others:
                sys.stderr.write(
                    f"warning: {self.folder} ({num_finished} finished) was made at commit "
                    f"{', '.join(sorted(commit[:10] for commit in others))} and this is "
                    f"{record['commit'][:10]}; --restart computes all of it again\n"
                )
            if not any(self.pending(category) for category in self.categories):
                return
            record = {**first, "continued": [*first.get("continued", []), record]}
        write_text(path, json.dumps(record, indent=2) + "\n")
