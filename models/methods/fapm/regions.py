"""Regions of a grid, and the normal features of each that FAPM compares others with."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from models.detector import SizedByFit
from models.errors import ModelError
from models.features.matmul import at_once

SPARE = 4
"""Features proposed by a product beside the nearest ones that are wanted."""
PRODUCT = 2**18
"""Entries of one product, for each image: bounds the regions searched at once."""
ROWS = 2**23
"""Entries of one product, for all images: bounds the features searched at once."""


class RegionMemory(SizedByFit):
    """Normal features of each of the R regions of a stage, as many as the largest region has.

    Attributes:
        grid: regions along each axis, (2,) int64.
        grid_size: the same, as numbers.
        shift: (R, C), the mean of each region's features: they are stored less that, since smaller
            norms round less.
        memory: (R * M, C).
        squares: (R * M,), squared norms; infinite where a region has fewer than M.
    """

    sized_by_fit = ("shift", "memory", "squares")

    grid: Tensor
    shift: Tensor
    memory: Tensor
    squares: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.grid_size = (1, 1)
        self.register_buffer("grid", torch.ones(2, dtype=torch.int64))
        self.register_buffer("shift", torch.zeros(1, channels))
        self.register_buffer("memory", torch.zeros(0, channels))
        self.register_buffer("squares", torch.zeros(0))

    @property
    def count(self) -> int:
        """Features of all regions."""
        return int(self.squares.isfinite().sum())

    def store(self, grid_size: tuple[int, int], memories: Sequence[Tensor]) -> None:
        """Take the features (M_r, C) of each region, row after row."""
        self.grid_size = grid_size
        self.grid = torch.tensor(grid_size).to(self.grid)
        self.shift = torch.stack([memory.mean(dim=0) for memory in memories]).to(self.shift)
        most = max(map(len, memories))
        self.memory = self.memory.new_zeros(len(memories) * most, self.memory.shape[1])
        self.squares = self.squares.new_full((len(memories) * most,), torch.inf)
        for i, memory in enumerate(memories):
            rows = slice(i * most, i * most + len(memory))
            self.memory[rows] = memory - self.shift[i]
            self.squares[rows] = self.memory[rows].square().sum(dim=1)

    def forward(self, maps: Tensor, count: int, *, bounded: bool) -> Tensor:
        """Return distances to the nearest of each position's region, ascending, (B, H * W, count).

        Args:
            maps: (B, C, H, W).
            count: how many.
            bounded: split products by the number of images too, which no graph can.

        Raises:
            ModelError: a side has fewer positions than regions.
        """
        H, W = int(maps.shape[2]), int(maps.shape[3])
        rows, cols = self.grid_size
        if rows > H or cols > W:
            raise ModelError(
                f"this FAPM has {rows} x {cols} regions, the features have {H} x {W} "
                "positions: fit and score at the same image size"
            )
        cells, places = (
            torch.tensor(one).to(maps.device, non_blocking=True)
            for one in _layout((H, W), self.grid_size)
        )
        R, K = cells.shape
        memory = rearrange(self.memory, "(r m) c -> r m c", r=R)
        squares = rearrange(self.squares, "(r m) -> r 1 m", r=R)
        positions = rearrange(maps, "b c h w -> b (h w) c").index_select(1, cells.flatten())
        queries = rearrange(positions, "b (r k) c -> r (b k) c", r=R) - self.shift.unsqueeze(1)
        size = max(1, at_once(PRODUCT, maps.device) // (K * memory.shape[1]))
        blocks = zip(queries.split(size), memory.split(size), squares.split(size), strict=True)
        search = _search_in_parts if bounded else _search
        found = torch.cat([search(*block, count) for block in blocks])  # (R, B * K, count)
        by_image = rearrange(found, "r (b k) n -> b (r k) n", k=K)
        return by_image.index_select(1, places)  # (B, H * W, count)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Also take the number of regions."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        rows, cols = self.grid.tolist()
        self.grid_size = rows, cols


def borders(length: int, parts: int) -> list[tuple[int, int]]:
    """Return where each part begins and ends; the first are one longer where it is uneven."""
    least, more = divmod(length, parts)
    ends = [least * i + min(i, more) for i in range(parts + 1)]
    return list(itertools.pairwise(ends))


def sources(
    size: tuple[int, int], target: tuple[int, int], grid_size: tuple[int, int], *, released: bool
) -> list[int]:
    """Return which position of a stage each position of a finer grid repeats, (H * W).

    Args:
        size: of the stage's grid.
        target: (H, W) of the finer one.
        grid_size: regions of the stage along each axis.
        released: within each region, one after the other in reading order (see `FapmOptions`);
            else the one that lies there.
    """
    (h, w), (H, W) = size, target
    if not released:
        return [(y * h // H) * w + x * w // W for y in range(H) for x in range(W)]
    found = [0] * (H * W)
    pairs = zip(_cells(size, grid_size), _cells(target, grid_size), strict=True)
    for coarse, fine in pairs:
        for i, place in enumerate(fine):
            found[place] = coarse[i * len(coarse) // len(fine)]
    return found


def _cells(size: tuple[int, int], grid_size: tuple[int, int]) -> list[list[int]]:
    """Return the flattened positions of each region, row after row."""
    H, W = size
    return [
        [y * W + x for y in range(top, bottom) for x in range(left, right)]
        for top, bottom in borders(H, grid_size[0])
        for left, right in borders(W, grid_size[1])
    ]


@functools.lru_cache(maxsize=16)
def _layout(size: tuple[int, int], grid_size: tuple[int, int]) -> tuple[list[list[int]], list[int]]:
    """Return positions by region, and where among these each position is.

    Returns:
        (R, K), filled up with a region's first position where it has fewer than K; and (H * W).
    """
    cells = _cells(size, grid_size)
    most = max(map(len, cells))
    places = [0] * (size[0] * size[1])
    for r, region in enumerate(cells):
        for k, place in enumerate(region):
            places[place] = r * most + k
    return [region + region[:1] * (most - len(region)) for region in cells], places


def _search_in_parts(queries: Tensor, memory: Tensor, squares: Tensor, count: int) -> Tensor:
    """Return what `_search` does, in products of bounded size."""
    gathered = (count + SPARE) * memory.shape[2]
    rows = at_once(ROWS, memory.device)
    size = max(1, rows // (len(memory) * max(memory.shape[1], gathered)))
    parts = queries.split(size, dim=1)
    return torch.cat([_search(part, memory, squares, count) for part in parts], dim=1)


def _search(queries: Tensor, memory: Tensor, squares: Tensor, count: int) -> Tensor:
    """Return distances to the nearest, ascending, (R, Q, count); subtraction ranks them.

    Args:
        queries: (R, Q, C).
        memory: (R, M, C).
        squares: (R, 1, M).
        count: how many, of which each memory has as many.
    """
    proposed = min(count + SPARE, memory.shape[1])
    rough = torch.baddbmm(squares, queries, memory.mT, alpha=-2)  # (R, Q, M)
    best, candidates = rough.topk(proposed, dim=2, largest=False)  # (R, Q, proposed)
    index = rearrange(candidates, "r q n -> r (q n) 1").expand(-1, -1, memory.shape[2])
    gathered = rearrange(memory.gather(1, index), "r (q n) c -> r q n c", n=proposed)
    distances = torch.linalg.vector_norm(queries.unsqueeze(2) - gathered, dim=3)
    distances = distances.masked_fill(best.isinf(), torch.inf)  # a row that fills up
    return distances.topk(count, dim=2, largest=False).values
