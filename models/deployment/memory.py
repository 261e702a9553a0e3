"""Nearest stored features, and normalised pixels, written so that a graph for export can hold them.

Where `models.features.nearest` looks again at whatever rounding could hide, `Memory` always
proposes `SPARE` features more than are wanted by a product, and ranks them by subtraction.
"""

import torch
from torch import Tensor, nn

SPARE = 2
"""Features proposed beside the nearest ones that are wanted."""
BLOCK = 2048
"""Features of a memory compared at once, at least: bounds the product's memory for each image."""
MAX_BLOCKS = 64
"""Blocks of a memory, at most: bounds the length of the graph."""


class Memory(nn.Module):
    """Nearest stored features, all seen from the stored features' mean: smaller norms round less.

    Args:
        memory: (M, C).
    """

    shift: Tensor
    memory: Tensor
    squares: Tensor

    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        shift = memory.mean(dim=0)
        centred = memory - shift
        self.block = max(BLOCK, -(-len(memory) // MAX_BLOCKS))
        self.register_buffer("shift", shift)
        self.register_buffer("memory", centred)
        self.register_buffer("squares", centred.square().sum(dim=1))

    def forward(self, centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return distances, ascending, and rows, (P, count) each, of features (P, C) - shift."""
        proposed = min(count + SPARE, len(self.memory))
        values, rows = [], []
        for start in range(0, len(self.memory), self.block):
            block = self.memory[start : start + self.block]
            squares = self.squares[start : start + self.block]
            rough = torch.addmm(squares, centred, block.T, alpha=-2)  # (P, R)
            found = rough.topk(min(proposed, len(block)), dim=1, largest=False)
            values.append(found.values)
            rows.append(found.indices + start)
        best = torch.cat(values, dim=1).topk(proposed, dim=1, largest=False).indices
        candidates = torch.cat(rows, dim=1).gather(1, best)  # (P, proposed)
        distances = self.distances(centred, candidates)
        nearest = distances.topk(count, dim=1, largest=False)
        return nearest.values, candidates.gather(1, nearest.indices)

    def distances(self, centred: Tensor, rows: Tensor) -> Tensor:
        """Return Euclidean distances (P, k) of features (P, C) - shift to rows (P, k)."""
        return torch.linalg.vector_norm(centred.unsqueeze(1) - self.memory[rows], dim=2)


def normalised_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 images (B, 3, S, S) as a backbone takes them, channels last in memory."""
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
