"""The files of a run folder: their names, atomic writing, and values that read back unchanged."""

import hashlib
import json
import numbers
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from utils.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

SELECTS = ("last", "best_test", "synthetic")
_TOP_FILES = (
    "results.csv",
    "metrics.jsonl",
    "table.md",
    "table.tex",
    "table.csv",
    "table.json",
    "evaluation.csv",
    "report.html",
    "environment.json",
    "config.json",
)
_STEM = r"(.+-)?seed-?\d+"  # without a category where a head is for all
_SUFFIX = r"(-[a-z_]+)?"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which it replaces when the block ends without error.

    Its content is on the disk before that, so that a power loss leaves the old file or the new one.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        # An error of write() names no file; one that names another file is not about this one.
        ours = (None, *map(str, (temporary, path, *path.parents)))
        if error.filename not in ours:
            raise
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # the first error says more
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, written to the disk."""
    with suppress(FileNotFoundError):  # who was to write it did not
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unwritable(path: Path, error: OSError) -> RunError:
    """Return the error of a file that cannot be written."""
    return RunError(
        f"{path}: cannot be written ({error.strerror or error}); make room, or make the folder "
        "writable: the same command then continues after what is finished"
    )


def make_folder(folder: Path) -> None:
    """Make a run folder, if it is not there.

    Raises:
        RunError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot make the run folder ({error.strerror})") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, line ends as given."""
    with atomic_path(path) as temporary:
        # Category names come from folder names, which need not be valid UTF-8.
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))


def append_text(path: Path, text: str) -> None:
    """Append UTF-8 text; a kill or a full disk can leave a part of it."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise unwritable(path, error) from error


def file_stem(category: str, seed: int, suffix: str = "") -> str:
    """Return the file name, without extension, of a (category, seed).

    A category that is a plain file name keeps it. Any other (a slash, a space, a leading dot, the
    name of a device of Windows, too long) is made readable and gets a tilde and a hash of the true
    name, so no two categories meet.
    """
    if suffix and not re.fullmatch(_SUFFIX, suffix):
        raise ValueError(f"suffix {suffix!r}: expected a hyphen and lower-case letters, as -last")
    name = category
    is_device = category.partition(".")[0].rstrip().lower() in _DEVICES
    if is_device or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", category):
        digest = hashlib.sha256(category.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        name = re.sub(r"[^\w.-]+", "_", category).lstrip(".")[:30] + "~" + digest
        name = f"_{name}" if is_device else name
    return f"{name}-seed{seed}{suffix}"


_DEVICES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10))}
_FOLDERS = ("scores", "heads", "calibration", "online", "data", "checkpoints")
_FINDINGS = ("*/metrics.csv", "*/table.md", "*/*/state.json", "*/*/state.safetensors")


def delete_leftovers(folder: Path) -> None:
    """Delete the temporary files a killed run left behind."""
    below = (folder / name for name in _FOLDERS)
    for place in (folder, *below, *(folder / "overlays").glob("*")):
        for path in place.glob(".*.tmp"):
            if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name):
                path.unlink()


def delete_run(folder: Path) -> None:
    """Delete what a run writes and nothing else; results.csv first: no row outlives its files."""
    written = [
        *(folder / name for name in _TOP_FILES[:-1]),
        *(p for p in folder.glob("scores/*.npz") if re.fullmatch(_STEM + _SUFFIX, p.stem)),
        *(p for p in folder.glob("heads/*.safetensors") if re.fullmatch(_STEM + _SUFFIX, p.stem)),
        *(p for p in folder.glob("calibration/*.json") if re.fullmatch(_STEM + _SUFFIX, p.stem)),
        *(p for p in folder.glob("data/*.json") if re.fullmatch(_STEM, p.stem)),
        *(p for p in folder.glob("overlays/*/*.png") if re.fullmatch(_STEM, p.parent.name)),
        *(p for p in folder.glob("online/*") if re.fullmatch(_STEM, p.stem)),
        *(p for p in folder.glob("checkpoints/*.pt") if re.fullmatch(_STEM, p.stem)),
        # What was found with the heads; the user's names of kinds stay for those found next.
        *(p for name in _FINDINGS for p in folder.glob(f"discovery/{name}")),
        folder / _TOP_FILES[-1],
    ]
    delete_leftovers(folder)
    for path in written:
        path.unlink(missing_ok=True)
    for place in (
        *folder.glob("overlays/*"),
        *map(folder.joinpath, ("overlays", *_FOLDERS)),
    ):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def checkpoint_file(head: Path) -> Path:
    """Return where a run folder has the state of the fit of a head, while it lasts."""
    return head.parents[1] / "checkpoints" / f"{head.stem}.pt"


def delete_checkpoint(head: Path) -> None:
    """Delete the state of the fit of a head, and its folder with the last one."""
    path = checkpoint_file(head)
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def file_digest(path: Path) -> str:
    """Return a short hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def corrupt(path: Path, reason: str) -> RunError:
    """Return the error of a file that cannot be read."""
    return RunError(f"{path}: corrupt ({reason}); repair it, use another --run name, or --restart")


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, or raise RunError naming it."""
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            flat(value)  # Python's own limit of nesting may be lower than that of its JSON reader
    except (ValueError, RecursionError) as error:
        raise corrupt(path, str(error)) from None
    if not isinstance(value, dict):
        raise corrupt(path, "not a JSON object")
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics.jsonl, in order, without a last line still being written.

    Raises:
        RunError: the file is missing or corrupt.
    """
    if not path.is_file():
        raise RunError(f"{path}: missing, this run has logged nothing yet")
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):  # only the last line can be one that is being written
                raise corrupt(path, f"line {number} is not JSON") from None
            continue
        if not isinstance(record, dict):
            raise corrupt(path, f"line {number} is not a JSON object")
        records.append(record)
    return records


def keep_metrics(path: Path, pairs: Set[tuple[str, int]]) -> None:
    """Rewrite a metrics.jsonl, if there is one, with only the lines of `pairs`."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            keep = (record["category"], record["seed"]) in pairs
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines):  # no line end after it: the write was cut by a kill
                continue
            raise corrupt(path, f"line {number} is not a record of a run") from None
        if keep:
            kept.append(line + b"\n")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def jsonable(value: Any) -> Any:
    """Return `value` with NaN as None, infinities as text and numpy numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, numbers.Integral)):
        value = float(value)
        return value if np.isfinite(value) else None if np.isnan(value) else str(value)
    return int(value) if isinstance(value, np.integer) else value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a config as dotted keys and JSON texts: 1 and 1.0 differ, NaN equals NaN."""
    leaves: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flat(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return leaves


def as_array(values: "ArrayLike | Tensor") -> np.ndarray:
    """Return an array; a tensor may lie on any device and require gradients."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # numpy has no bfloat16; float32 holds each of its values.
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    return np.asarray(values)
