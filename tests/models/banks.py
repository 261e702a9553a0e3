"""Normal features for detectors under test."""

from dataclasses import replace

import torch

from models.building import build_detector
from models.features.multiscale import join_stages
from models.method import find_method


class Bank:
    """Features (N, C, H, W) in memory, as a detector sees them."""

    held_out = None

    def __init__(self, features):
        self.features = features
        self.channels = features.shape[1]
        self.orders = []
        self.passes = 0

    def __len__(self):
        return len(self.features)

    def subset(self, rows):
        return Bank(self.features[rows])

    def batches(self, batch_size, *, generator=None):
        self.passes += 1
        order = torch.arange(len(self))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
            self.orders.append(order)
        for rows in order.split(batch_size):
            yield self.features[rows]

    def stage_batches(self, batch_size, *, generator=None):
        for features in self.batches(batch_size, generator=generator):
            yield [features]


class StagedBank(Bank):
    """The same features, given as the stages (N, C_l, H_l, W_l) they are joined from."""

    def __init__(self, stages):
        super().__init__(join_stages(stages))
        self.stages = stages

    def subset(self, rows):
        return StagedBank([stage[rows] for stage in self.stages])

    def stage_batches(self, batch_size, *, generator=None):
        order = torch.arange(len(self))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
        for rows in order.split(batch_size):
            yield [stage[rows] for stage in self.stages]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_bank(count=8, channels=6, side=5, seed=1):
    return Bank(torch.randn(count, channels, side, side, generator=seeded(seed)))


def draw_images(count, *, low=0, high=256, seed=1, side=32):
    """Images (N, 3, side, side), uint8, channels last as banks give them."""
    images = torch.randint(low, high, (count, 3, side, side), generator=seeded(seed)).byte()
    return images.contiguous(memory_format=torch.channels_last)


def as_positions(features):
    """Features (N, C, H, W) as (N * H * W, C)."""
    return features.movedim(1, -1).flatten(0, 2)


def fitted(method, bank, seed=0, **options):
    """A detector of a method on features, under its default options but for those given."""
    options = replace(find_method(method).options, **options)
    detector = build_detector(method, Stages(bank.channels), options)
    detector.fit(bank, generator=seeded(seed))
    return detector


def monitoring(function, *, scores_steps=False):
    """Make a function a monitor; only fine-tuned methods ask whether it scores."""
    function.scores_steps = scores_steps
    return function


def told(detector, bank):
    """Fit a detector; return what its monitor is told, one dictionary for each step."""
    values = []
    detector.fit(bank, generator=seeded(), monitor=monitoring(lambda _, said: values.append(said)))
    return values


class Stages:
    """The part of an extractor that heads on features need."""

    def __init__(self, *channels):
        self.stage_channels = channels
