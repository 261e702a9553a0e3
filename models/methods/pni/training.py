"""Training of the network that predicts the class of a position from its neighbours."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.detector import FeatureSource, Monitor
from models.errors import ModelError
from models.methods.pni.network import NeighbourNetwork
from models.methods.pni.options import PniOptions
from models.training.generators import derived
from models.training.loop import Loop, Losses
from models.training.mixed_precision import bfloat16_autocast

HELD = 2**26
"""Entries of the features whose positions are shuffled together."""
DECAY = 0.1
"""Of the learning rate, every `decay_epochs`."""


@dataclass(frozen=True)
class Task:
    """Features and the class of each of their positions.

    Attributes:
        bank: the normal images.
        classes: (N, H * W) int32, on the CPU.
        reduced: makes of the bank's features (B, C, H, W) what neighbours are taken of.
        device: where the network is.
    """

    bank: FeatureSource
    classes: Tensor
    reduced: Callable[[Tensor], Tensor]
    device: torch.device

    def batches(
        self,
        network: NeighbourNetwork,
        wanted: Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield neighbours (P, count * C) and classes (P,) of the positions `wanted`, (N, H * W).

        Shuffled when a generator is given: images, then the positions of as many as are held.
        """
        count = len(self.bank)
        order = torch.arange(count)
        if generator is not None:
            order = torch.randperm(count, generator=generator)
        size = max(1, HELD // (self.bank.channels * self.classes.shape[1]))
        features_of = self.bank.subset(order).batches(size)
        for rows, features in zip(order.split(size), features_of, strict=True):
            places = wanted[rows].flatten().nonzero()[:, 0]
            if generator is not None:
                places = places[torch.randperm(len(places), generator=generator)]
            classes = self.classes[rows].flatten()[places].long()
            classes = classes.to(self.device, non_blocking=True)
            padded = network.neighbourhood.padded(self.reduced(features))
            places = places.to(self.device, non_blocking=True)
            for some, wanted_of in zip(
                places.split(batch_size), classes.split(batch_size), strict=True
            ):
                if len(some):
                    yield network.neighbourhood.gather(padded, some), wanted_of


def train(
    network: NeighbourNetwork,
    task: Task,
    options: PniOptions,
    generator: torch.Generator,
    monitor: Monitor | None,
) -> int:
    """Train an initialised network; return the epoch that is kept.

    Raises:
        FloatingPointError: the loss left the finite numbers.
        ModelError: fewer than two positions in any batch are left to train on.
    """
    is_held = _draw_held(task.classes, options.validation_share, generator)
    drops = derived(generator, task.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        is_empty = True
        for rows, classes in task.batches(network, ~is_held, options.batch_size, generator):
            if len(classes) > 1:
                yield rows, classes
                is_empty = False
        if is_empty:
            raise ModelError(
                f"the validation share {options.validation_share} leaves no two positions to train "
                "on",
                {"validation_share": "lower"},
            )

    def losses(batch: tuple[Tensor, Tensor]) -> Losses:
        rows, classes = batch
        with bfloat16_autocast(task.device, wanted=options.mixed_precision):
            logits = network(rows, drops)
        return {"loss": F.cross_entropy(logits.float(), classes)}

    loop = Loop(
        module=network,
        optimizer=optimizer,
        epochs=options.epochs,
        generator=generator,
        drawn={"drops": drops},
        rate=lambda passed: DECAY ** (passed // options.decay_epochs),
    )
    validate = functools.partial(_validate, network, task, is_held, options)
    trained = loop.run(
        batches, losses, monitor=monitor, validate=validate if is_held.any() else None
    )
    return trained.epoch


def _draw_held(classes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return which positions (N, H * W) are held out, a share of them rounded to whole ones."""
    is_held = torch.zeros(classes.numel(), dtype=torch.bool)
    count = round(share * len(is_held))
    if count:
        is_held[torch.randperm(len(is_held), generator=generator)[:count]] = True
    return is_held.view(classes.shape)


def _validate(
    network: NeighbourNetwork, task: Task, is_held: Tensor, options: PniOptions
) -> Tensor:
    """Return the mean loss of the positions held out."""
    losses = []
    for rows, classes in task.batches(network, is_held, options.batch_size):
        loss = F.cross_entropy(network(rows).float(), classes)
        losses.append(loss * len(classes))
    return torch.stack(losses).double().sum() / int(is_held.sum())
