"""MSPBA as one graph for export."""

import torch
from einops import rearrange
from torch import Tensor, nn

from models.deployment.memory import Memory
from models.methods.mspba.networks import PatchNetwork
from models.methods.mspba.windows import spread, spreading, window_corners

PASS_PIXELS = 2**20
"""Pixels of an image's windows that the network sees at once. Each pass is a copy of the network in
the graph: a smaller bound makes a longer graph, a larger one takes more memory."""


class Exported(nn.Module):
    """`Mspba` for a graph: the windows of an image are cut out at fixed places.

    Args:
        network: fitted.
        strides: of the windows, for each size.
        memories: embeddings (M, D) of normal windows, for each size.
        mean: of the pixels, (1, 3, S, S) or (1, 3, 1, 1).
    """

    mean: Tensor

    def __init__(
        self,
        network: PatchNetwork,
        strides: dict[int, int],
        memories: dict[int, Tensor],
        mean: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.strides = strides
        self.network = network.for_scoring()
        self.memories = nn.ModuleDict({str(size): Memory(m) for size, m in memories.items()})

    def forward(self, images: Tensor) -> Tensor:
        """Return maps (B, S, S) of uint8 images (B, 3, S, S)."""
        side = images.shape[-1]
        pixels = images.float() / 255 - self.mean
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        maps = [self._one_size(pixels, side, size) for size in self.strides]
        return torch.stack(maps).sum(dim=0)

    def _one_size(self, pixels: Tensor, side: int, size: int) -> Tensor:
        """Return one size's map (B, S, S) of normalised images."""
        stride, memory = self.strides[size], self.memories[str(size)]
        corners = window_corners(side, size, stride).to(pixels.device)
        span = torch.arange(size, device=pixels.device)
        found = []
        for some in corners.split(max(1, PASS_PIXELS // size**2)):
            rows, columns = (rearrange(axis, "p -> p 1") + span for axis in some.unbind(dim=1))
            windows = pixels[:, :, rows.unsqueeze(2), columns.unsqueeze(1)]  # (B, 3, P, K, K)
            windows = rearrange(windows, "b c p h w -> (b p) c h w")
            embeddings = self.network(windows)  # (B * P, D)
            distances, _ = memory(embeddings - memory.shift, 1)  # (B * P, 1)
            found.append(rearrange(distances, "(b p) 1 -> b p", p=len(some)))
        matrix = spreading(side, size, stride).to(pixels.device)  # (P, S)
        scores = rearrange(torch.cat(found, dim=1), "b (h w) -> b h w", h=len(matrix))
        return spread(scores, matrix)
