"""Where a long fit is, checkpoints/<category>-seed<k>.pt: a killed one goes on from there."""

import json
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from utils.errors import RunError
from utils.runs.files import atomic_path, checkpoint_file, delete_checkpoint
from utils.runs.run import Run


class Checkpoint:
    """The file that holds the state of an unfinished fit.

    It holds what the fit is made of too: a fit on other images or weights starts again.

    Args:
        run: whose fit it is.
        categories: those that the head is for.
        seed: of the fit.
        minutes: least time between two states; 0 for one after every epoch.
    """

    def __init__(self, run: Run, categories: Sequence[str], seed: int, minutes: float) -> None:
        self._head = run.head_path(categories[0], seed)
        self.path = checkpoint_file(self._head)
        made_of = {one: asdict(run.made_of[one]) for one in categories if one in run.made_of}
        self._made_of = json.dumps(made_of, sort_keys=True)
        self._seconds = 60 * minutes
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last state is old enough for another one."""
        return time.monotonic() - self._last >= self._seconds

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file; a kill meanwhile leaves the old one.

        Args:
            state: tensors, numbers, strings, and lists or mappings of them.
        """
        import torch  # only fits need it

        with atomic_path(self.path) as temporary:
            torch.save({"made_of": self._made_of, "state": state}, temporary)
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state on the CPU; None where there is none, or of other images or weights.

        Raises:
            RunError: the file is corrupt.
        """
        import torch

        if not self.path.is_file():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            made_of, state = found["made_of"], found["state"]
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError) as error:
            raise self._unusable(f"corrupt ({error})") from error
        except pickle.UnpicklingError as error:
            raise self._unusable("corrupt, or not a checkpoint") from error
        if made_of != self._made_of:
            sys.stderr.write(
                f"warning: {self.path} is of other images or weights; the fit starts again\n"
            )
            return None
        return state

    def delete(self) -> None:
        """Delete the file, and the folder with the last one."""
        delete_checkpoint(self._head)

    def _unusable(self, why: str) -> RunError:
        return RunError(f"{self.path}: {why}; delete it, and the fit starts again")
