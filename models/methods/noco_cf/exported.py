"""A stage of the local closed form for a graph, which knows no number of images."""

import torch
from einops import rearrange
from torch import Tensor, nn

from models.methods.noco_cf.mixture import Mixture, edge


class ExportedMixture(nn.Module):
    """`Mixture` for a graph of any number of images: each feature fetches its centres' filters."""

    centres: Tensor
    filters: Tensor
    levels: Tensor
    lengths: Tensor

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.count = min(mixture.shape.nearest, len(mixture.centres))
        self.register_buffer("centres", mixture.centres)
        self.register_buffer("filters", mixture.filters)
        self.register_buffer("levels", mixture.levels)
        self.register_buffer("lengths", mixture.centres.square().sum(dim=1))

    def forward(self, positions: Tensor) -> Tensor:
        """Return energies (P,) of features (P, D)."""
        every = torch.addmm(self.lengths, positions, self.centres.T, alpha=-2)  # (P, K)
        count = min(self.count + 1, every.shape[1])
        distances, near = every.topk(count, dim=1, largest=False)  # (P, n) or one more
        found = torch.stack([self._energies(positions, near[:, i]) for i in range(self.count)])
        D = positions.shape[1]
        return (found + D * edge(distances.T, self.count)).amin(dim=0)  # (P,)

    def _energies(self, positions: Tensor, centre: Tensor) -> Tensor:
        offsets = positions - self.centres.index_select(0, centre)  # (P, D)
        filters = self.filters.index_select(0, centre)  # (P, D, D)
        filtered = torch.bmm(filters, rearrange(offsets, "p d -> p d 1"))  # (P, D, 1)
        return filtered.square().sum(dim=(1, 2)) + self.levels.index_select(0, centre)
