"""The training of anomalib's models by Lightning; importing this imports both."""

import contextlib
import functools
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import huggingface_hub
import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from tqdm import tqdm

from models.detector import FeatureSource
from models.errors import ModelError
from models.methods.anomalib.wrapper import LibraryModel

NETWORK_TIMEOUT = 5.0
"""Seconds without an answer after which the network counts as absent."""


def train(
    model: LibraryModel,
    module: Any,
    bank: FeatureSource,
    pixels: Callable[[Tensor], Tensor],
    *,
    generator: torch.Generator,
    device: torch.device,
    stderr: TextIO,
) -> None:
    """Let a model train itself, its own draws from the global random state.

    Validation comes once, at the end, on a batch of training images: some models are fitted there,
    and the others show that they can score. What they measure on "validation images" (quantiles of
    the maps in EfficientAD) they measure on the training images.

    Args:
        model: what to train.
        module: of `model.build`.
        bank: normal training images.
        pixels: makes the model's input of uint8 images.
        generator: shuffles the images.
        device: where to train.
        stderr: where a terminal shows the progress.

    Raises:
        FloatingPointError: the loss left the finite numbers.
        ModelError: the model cannot be trained like that.
    """
    data = _Data(bank, model.batch_size, pixels, generator)
    trained = module.learning_type == LearningType.ONE_CLASS
    settings: dict[str, Any] = dict(module.trainer_arguments)
    if trained:
        settings |= duration(model, settings)
    elif model.epochs is not None:
        raise ModelError(f"anomalib's {model.name} is not trained; leave --method.epochs out")
    cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder, model.explained("cannot be trained"):
        trainer = Trainer(
            **settings
            | {
                "accelerator": "gpu" if cuda else "cpu",
                "devices": [device.index or 0] if cuda else 1,
                "callbacks": [_Watch(model.name, stderr)],
                "check_val_every_n_epoch": sys.maxsize,
                "limit_val_batches": 1,
                "num_sanity_val_steps": 0,
                "inference_mode": False,  # what a model stores there must stay loadable
                "default_root_dir": folder,
                "plugins": [LightningEnvironment()],  # one process, whatever cluster this is
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            }
        )
        try:
            if trained:
                trainer.fit(module, datamodule=data)
            trainer.validate(module, datamodule=data, verbose=False)
        except SIGTERMException as error:
            raise SystemExit(128 + signal.SIGTERM) from error  # its own would pass for a success
        except SystemExit as error:
            raise KeyboardInterrupt from error  # how Lightning answers Ctrl-C


def duration(model: LibraryModel, own: dict[str, Any]) -> dict[str, int]:
    """Return the trainer's `max_epochs` and `max_steps`, given the model's own arguments for it.

    Raises:
        ModelError: nobody says how long, or the experiment says it of a model that knows itself.
    """
    if "max_epochs" in own:
        if model.epochs not in {None, own["max_epochs"]}:
            raise ModelError(
                f"anomalib's {model.name} fits in exactly {own['max_epochs']} epochs; leave "
                "--method.epochs out"
            )
        return {}
    if model.epochs is not None:
        return {"max_epochs": model.epochs, "max_steps": -1}
    epochs, max_steps = model.facts.epochs, model.facts.max_steps
    if epochs is None and max_steps < 0:
        raise ModelError(
            f"anomalib does not say how long {model.name} trains; give --method.epochs"
        )
    return {"max_epochs": -1 if epochs is None else epochs, "max_steps": max_steps}


@contextlib.contextmanager
def isolated(seed: int) -> Iterator[TextIO]:
    """Run library code on its own: seeded, silent, and giving up quickly without a network.

    Yields stderr as it was. Afterwards the global random state is what it was before.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  libraries draw there
    logging_level, timeout = logging.root.manager.disable, socket.getdefaulttimeout()
    stderr = sys.stderr
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, legacy)
        stack.callback(logging.disable, logging_level)
        stack.callback(socket.setdefaulttimeout, timeout)
        stack.enter_context(warnings.catch_warnings())
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        socket.setdefaulttimeout(NETWORK_TIMEOUT)
        if not _hub_answers():
            # Its client would try again for most of a minute. What is in its cache is still found.
            constants: Any = huggingface_hub.constants
            stack.callback(setattr, constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
            constants.HF_HUB_OFFLINE = True
        yield stderr


@functools.cache
def _hub_answers() -> bool:
    if urllib.request.getproxies():
        return True  # no telling from here
    address = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        host = (address.hostname or "", address.port or 443)
        socket.create_connection(host, timeout=NETWORK_TIMEOUT).close()
    except OSError:
        return False
    return True


class _Batches:
    """Batches of a bank of images in anomalib's form; all of them normal."""

    def __init__(
        self,
        bank: FeatureSource,
        batch_size: int,
        pixels: Callable[[Tensor], Tensor],
        generator: torch.Generator | None,
    ) -> None:
        self._bank = bank
        self._batch_size = batch_size
        self._pixels = pixels
        self._generator = generator

    def __len__(self) -> int:
        return -(-len(self._bank) // self._batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        for images in self._bank.batches(self._batch_size, generator=self._generator):
            pixels = self._pixels(images)
            B, _, H, W = pixels.shape
            yield ImageBatch(
                image=pixels,
                gt_label=torch.zeros(B, dtype=torch.bool, device=pixels.device),
                gt_mask=torch.zeros(B, H, W, dtype=torch.bool, device=pixels.device),
            )


class _Data(LightningDataModule):
    """A bank of images as models find it through their trainer."""

    def __init__(
        self,
        bank: FeatureSource,
        batch_size: int,
        pixels: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.train_batch_size = batch_size
        self._train = _Batches(bank, batch_size, pixels, generator)
        self._validation = _Batches(bank, batch_size, pixels, None)

    def train_dataloader(self) -> _Batches:
        return self._train

    def val_dataloader(self) -> _Batches:
        return self._validation


class _Watch(Callback):
    """Shows the progress on a terminal, and stops where the loss is not finite."""

    def __init__(self, name: str, stderr: TextIO) -> None:
        self._name = name
        self._stderr = stderr
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Open the bar, over epochs where their number is known."""
        total = trainer.max_epochs if trainer.max_steps < 0 else None
        self._bar = tqdm(total=total, desc="epochs", leave=False, disable=None, file=self._stderr)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """Keep the loss of a step, on its device: `loss`, or the sum of several."""
        del trainer, module
        values = outputs if isinstance(outputs, dict) else {"loss": outputs}
        wanted = [values["loss"]] if "loss" in values else list(values.values())
        losses = [value.detach().float().mean() for value in wanted if isinstance(value, Tensor)]
        if losses:
            self._losses.append(torch.stack(losses).sum())

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Look at the losses of an epoch."""
        self._bar.update()
        values = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)
        self._losses = []
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"the loss of anomalib's {self._name} is {values[bad[0]].item()} at epoch "
                f"{trainer.current_epoch + 1}, step {bad[0] + 1}"
            )

    def on_train_end(self, *_: Any) -> None:
        """Close the bar."""
        self._bar.close()
