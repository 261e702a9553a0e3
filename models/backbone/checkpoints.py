"""Weights files as training scripts, hubs and papers leave them; nothing in them is executed."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import ModelError

WRAPPINGS = (
    *("state_dict_ema", "model_ema", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model", "net"),
)
"""Keys under which training scripts keep the weights; averaged ones come first."""
INDEX = ".safetensors.index.json"
"""How the list of a model's shards ends; it says which file has which tensor."""
LFS = "version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a weights file.

    Attributes:
        tensors: by name.
        taken: what of the file they are, in a few words; empty where they are all of it.
    """

    tensors: dict[str, Tensor]
    taken: str = ""

    def fitted_to(self, expected: Collection[str]) -> "Checkpoint":
        """Drop what wrappers put before every name ("module.", "backbone."), if that fits better.

        Where several parts have such names, as an encoder and a head, the part is taken whose
        names are most of the network's.

        Args:
            expected: names of the network that they are for.
        """

        def fitting(state: dict[str, Tensor]) -> int:
            return len(state.keys() & expected)

        best, prefix = self.tensors, ""
        found, path = self.tensors, ""
        while fitting(found) < len(expected):
            parts: dict[str, dict[str, Tensor]] = {}
            for name, tensor in found.items():
                head, dot, rest = name.partition(".")
                if dot:
                    parts.setdefault(head, {})[rest] = tensor
            if not parts:
                break
            # Of equals the larger part, below which more wrappers may be.
            head, found = max(parts.items(), key=lambda part: (fitting(part[1]), len(part[1])))
            path += f"{head}."
            if fitting(found) > fitting(best):
                best, prefix = found, path
        if not prefix:
            return self
        words = f"what is named {prefix}*"
        return Checkpoint(best, f"{self.taken}, {words}" if self.taken else words)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read tensors from safetensors, one file or shards, or from a file of torch.save.

    Args:
        path: the file; of shards the index, `*.safetensors.index.json`, or the folder that has it.

    Raises:
        ModelError: a file is missing, unreadable, or holds more than tensors; the message says what
            it is instead, where that can be told.
    """
    if path.is_dir():
        path = _only_file_of(path)
    if not path.is_file():
        raise ModelError(f"weights file {path} does not exist")
    if path.name.lower().endswith(INDEX):
        return _read_shards(path)
    _refuse_text(path)
    return _unwrapped(path, _read(path))


def _only_file_of(folder: Path) -> Path:
    """Return the weights file of a folder as hubs make it."""
    for pattern in (f"*{INDEX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(one.name for one in found[:5])
            raise ModelError(f"weights folder {folder} has several files ({names}): name one")
    raise ModelError(f"weights folder {folder} has no .safetensors file: name a file")


def _read(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError) as error:
        if "TorchScript" in str(error):
            raise ModelError(
                f"weights file {path} is a TorchScript program: save the state_dict() of its module"
            ) from error
        raise ModelError(f"weights file {path} cannot be read: {error}") from error
    except Exception as error:  # torch raises pickle.UnpicklingError for anything but tensors
        raise ModelError(
            f"weights file {path} is not a plain state dict ({type(error).__name__}); convert it "
            "to safetensors"
        ) from error


def _read_shards(index: Path) -> Checkpoint:
    """Read the files that an index names, and check that each tensor is there."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"weights file {index} is no index of shards") from error
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = index.parent / Path(file).name
        if not shard.is_file():
            raise ModelError(f"weights file {index} names {file}, which is not beside it")
        _refuse_text(shard)
        tensors |= _read(shard)
    if missing := sorted(places.keys() - tensors.keys()):
        raise ModelError(f"the shards of {index} lack {len(missing)} tensors, {missing[0]} first")
    return Checkpoint(tensors, f"{len(files)} shards")


def _unwrapped(path: Path, state: Any) -> Checkpoint:
    """Take off the dictionaries around the tensors."""
    taken: list[str] = []
    while isinstance(state, dict):
        key = next((key for key in WRAPPINGS if isinstance(state.get(key), dict)), None)
        if key is None:
            break
        taken.append(key)
        state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ModelError(f"weights file {path} holds no state dict of tensors")
    return Checkpoint(state, f"its {'.'.join(taken)}" if taken else "")


def _refuse_text(path: Path) -> None:
    """Say of a text file, such as the pointer that Git LFS leaves or a web page, what it is."""
    with path.open("rb") as file:
        first = file.read(200)
    if not first or not all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in first):
        return
    text = first.decode("ascii").lstrip()
    if text.startswith(LFS):
        raise ModelError(
            f"weights file {path} is a Git LFS pointer, not the file: fetch that (git lfs pull)"
        )
    if text[:1] == "<":
        raise ModelError(f"weights file {path} is a web page, as failed downloads are")
    begins = text.split("\n")[0][:60]
    raise ModelError(f"weights file {path} is a text file (it begins {begins!r}): no weights")
