"""The loop over epochs of a trained head: losses, the epoch that counts, and checkpoints."""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.detector import KeepsFits, Monitor
from models.training.epochs import epochs, mean_of_finite
from models.training.kept_epoch import KeptEpoch
from models.training.mixed_precision import bfloat16_autocast

SHOWN_EVERY = 1.0
"""Seconds between two looks at the loss while an epoch runs."""
Batch = TypeVar("Batch")
Losses = dict[str, Tensor]
"""Scalars of a step: "loss" is what is minimised, the others are logged beside it."""


class Stateful(Protocol):
    """What a checkpoint holds beside the trained module: anything with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take a state."""
        ...


def summed(terms: Losses) -> Losses:
    """Return the terms of a loss and, first, their sum as the loss."""
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


@dataclass(frozen=True)
class Trained:
    """What came of a loop.

    Attributes:
        epoch: that of the state which the module has now: the last, or the one of least validation
            loss.
        values: of each epoch, as they were logged.
    """

    epoch: int
    values: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How a module is trained, epoch after epoch.

    A fit that was killed goes on after the last epoch that its monitor kept, with the same bits:
    module, optimizer, generators and the kept epoch are restored. So all that changes while it
    trains must be in one of these.

    Attributes:
        module: in train mode during an epoch, in eval mode after it.
        optimizer: of its parameters; the learning rates it comes with are those that `rate` scales.
        second_optimizer: of parameters that another kind of optimizer moves, in the same steps.
        epochs: how many.
        generator: of the fit, on the CPU.
        drawn: further generators that training draws from, by name, on any device.
        others: further things that change while it trains, by name.
        rate: factor of the learning rates by the number of epochs that have passed, which is
            fractional within one where `steps` is known; None for a constant rate.
        steps: optimizer steps of an epoch, if `rate` is to change with each.
        clip_norm: largest norm of the gradient of all parameters; None for any.
        mixed_precision: losses are computed in bfloat16 where a CUDA device does that.
        report_every: epochs between two reports to the monitor, which is told their mean values.
        phase: names the loop where a fit has several.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    second_optimizer: torch.optim.Optimizer | None = None
    epochs: int
    generator: torch.Generator
    drawn: dict[str, torch.Generator] = field(default_factory=dict)
    others: dict[str, Stateful] = field(default_factory=dict)
    rate: Callable[[float], float] | None = None
    steps: int | None = None
    clip_norm: float | None = None
    mixed_precision: bool = False
    report_every: int = 1
    phase: str = "epochs"

    def run(
        self,
        batches: Callable[[], Iterable[Batch]],
        losses: Callable[[Batch], Losses],
        *,
        monitor: Monitor | None = None,
        validate: Callable[[], Tensor] | None = None,
        before_epoch: Callable[[int], None] | None = None,
        after_epoch: Callable[[int], dict[str, float] | None] | None = None,
        complete: Callable[[], None] | None = None,
        is_first_phase: bool = False,
    ) -> Trained:
        """Train.

        Args:
            batches: gives those of an epoch; at least one.
            losses: of a batch.
            monitor: is told of each epoch, and keeps checkpoints where it can.
            validate: gives the loss on what is held out, in eval mode; the epoch where it is least
                is the one that counts.
            before_epoch: is called with the epoch's number, in eval mode.
            after_epoch: is called with it before the monitor, in eval mode; what it returns is
                logged beside the losses.
            complete: does what the module needs to score beside being trained: after the last
                epoch, and after each that the monitor scores.
            is_first_phase: the fit goes on after it: the monitor keeps checkpoints, but is not told
                of the epochs.

        Raises:
            FloatingPointError: a loss left the finite numbers; epoch and step are named.
        """
        kept = KeptEpoch(self.module, self.epochs)
        base = [group["lr"] for group in self._groups()]
        values = self._restore(monitor, kept)
        for group in self._groups():
            _fuse(group)
        bar = epochs(self.epochs, self.phase, start=len(values))
        for epoch in bar:
            self._scale(base, epoch - 1)
            if before_epoch is not None:
                before_epoch(epoch)
            self.module.train()
            found: list[Losses] = []
            for step, batch in enumerate(batches()):
                if self.steps is not None:
                    self._scale(base, epoch - 1 + step / self.steps)
                found.append(self._step(losses, batch))
                _show(bar, step + 1, found[-1]["loss"])
            self.module.eval()
            values.append(
                {name: mean_of_finite([one[name] for one in found], epoch) for name in found[0]}
            )
            if validate is not None:
                with torch.no_grad():
                    loss = mean_of_finite([validate()], epoch)
                values[-1]["validation_loss"] = loss
                kept.look(epoch, loss)
            if after_epoch is not None:
                values[-1] |= after_epoch(epoch) or {}
            is_scored = monitor is not None and monitor.scores_steps
            if complete is not None and (is_scored or epoch == self.epochs):
                complete()
            is_told = epoch % self.report_every == 0 or epoch == self.epochs
            if monitor is not None and is_told and not is_first_phase:
                since = (epoch - 1) // self.report_every * self.report_every
                monitor(epoch, _mean(values[since:]))
            if isinstance(monitor, KeepsFits):
                ended = is_first_phase and epoch == self.epochs
                monitor.keep(self.phase, functools.partial(self._state, kept, values), ended=ended)
        kept.restore()
        return Trained(kept.epoch, values)

    def _step(self, losses: Callable[[Batch], Losses], batch: Batch) -> Losses:
        device = self.optimizer.param_groups[0]["params"][0].device
        with bfloat16_autocast(device, wanted=self.mixed_precision):
            found = losses(batch)
        for optimizer in self._optimizers().values():
            optimizer.zero_grad(set_to_none=True)
        found["loss"].backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        for optimizer in self._optimizers().values():
            optimizer.step()
        return {name: loss.detach() for name, loss in found.items()}

    def _scale(self, base: list[float], passed: float) -> None:
        if self.rate is None:
            return
        factor = self.rate(passed)
        for rate, group in zip(base, self._groups(), strict=True):
            group["lr"] = rate * factor

    def _restore(self, monitor: Monitor | None, kept: KeptEpoch) -> list[dict[str, float]]:
        """Take the state that a monitor kept of this phase; return the values of its epochs."""
        state = monitor.kept(self.phase) if isinstance(monitor, KeepsFits) else None
        if state is None:
            return []
        for name, part in self._parts(kept).items():
            part.load_state_dict(state[name])
        for name, generator in self._generators().items():
            generator.set_state(state["generators"][name])
        return list(state["values"])

    def _state(self, kept: KeptEpoch, values: list[dict[str, float]]) -> dict[str, Any]:
        """Return what `_restore` takes."""
        parts = {name: part.state_dict() for name, part in self._parts(kept).items()}
        generators = {name: one.get_state() for name, one in self._generators().items()}
        return {**parts, "generators": generators, "values": values}

    def _parts(self, kept: KeptEpoch) -> dict[str, Stateful]:
        return {"module": self.module, **self._optimizers(), "kept": kept, **self.others}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        second = self.second_optimizer
        both = {"optimizer": self.optimizer}
        return both if second is None else {**both, "second_optimizer": second}

    def _groups(self) -> list[dict[str, Any]]:
        return [group for one in self._optimizers().values() for group in one.param_groups]

    def _generators(self) -> dict[str, torch.Generator]:
        return {"": self.generator, **self.drawn}


def _fuse(group: dict[str, Any]) -> None:
    """Let a step on a CUDA device be one kernel, where the optimizer has such a one."""
    if "fused" in group and all(one.is_cuda for one in group["params"]):
        group["fused"], group["foreach"] = True, False


def _show(bar: tqdm, step: int, loss: Tensor) -> None:
    """Show step and loss beside a bar, rarely: to read the loss waits for the device."""
    if not bar.disable and time.time() - bar.last_print_t > SHOWN_EVERY:
        bar.set_postfix_str(f"step {step}, loss {loss.item():.4g}")


def _mean(values: list[dict[str, float]]) -> dict[str, float]:
    if len(values) == 1:
        return values[0]
    return {name: sum(one[name] for one in values) / len(values) for name in values[0]}
