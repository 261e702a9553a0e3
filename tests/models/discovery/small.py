"""A network that is small enough to be trained in a test, with random weights."""

import dataclasses

import torch

from configs.anomalyncd import AnomalyNcdOptions
from models.discovery.anomalyncd.anomalyncd import AnomalyNcd

OPTIONS = AnomalyNcdOptions(
    backbone="test_vit",
    weights="random",
    image_size=32,
    resize=36,
    mask_layers=4,
    batch_size=8,
    epochs=2,
    warmup_epochs=1,
    learning_rate=0.01,
)


def build(new_kinds=3, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return AnomalyNcd(options, labelled_kinds=2, new_kinds=new_kinds)


def fitted(labelled, unlabelled, seed=0, **changes):
    """A network and what it told of each epoch."""
    network = build(**changes)
    values = []
    network.fit(
        labelled,
        unlabelled,
        generator=torch.Generator().manual_seed(seed),
        monitor=lambda epoch, found: values.append((epoch, found)),
    )
    return network, values
