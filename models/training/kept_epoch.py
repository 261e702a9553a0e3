"""The epoch of least loss on what a fit keeps aside."""

import math
from typing import Any

from torch import Tensor, nn


class KeptEpoch:
    """Holds the state of a module at the epoch of least validation loss, the first of equals.

    Args:
        module: being trained.
        last: the epoch that counts where none is looked at.

    Attributes:
        epoch: the one that counts so far.
    """

    def __init__(self, module: nn.Module, last: int) -> None:
        self.epoch = last
        self._module = module
        self._least = math.inf
        self._state: dict[str, Tensor] | None = None

    def look(self, epoch: int, loss: float) -> None:
        """Keep the module as it is now if its loss is below all before."""
        if loss < self._least:
            self._least, self.epoch = loss, epoch
            state = self._module.state_dict()
            self._state = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def restore(self) -> None:
        """Give the module the state that was kept, if one was."""
        if self._state is not None:
            self._module.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {"epoch": self.epoch, "least": self._least, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.epoch, self._least, self._state = state["epoch"], state["least"], state["state"]
