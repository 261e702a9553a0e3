"""Normal features for detectors under test."""

import torch

from models.features.multiscale import join_stages


class Bank:
    """Features (N, C, H, W) in memory, as a detector sees them."""

    def __init__(self, features):
        self.features = features
        self.channels = features.shape[1]
        self.orders = []

    def __len__(self):
        return len(self.features)

    def subset(self, rows):
        return Bank(self.features[rows])

    def batches(self, batch_size, *, generator=None):
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


def monitoring(function, *, scores_steps=False):
    """Make a function a monitor; only fine-tuned methods ask whether it scores."""
    function.scores_steps = scores_steps
    return function


class Stages:
    """The part of an extractor that heads on features need."""

    def __init__(self, *channels):
        self.stage_channels = channels
