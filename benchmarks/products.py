"""Products of float32 matrices as convolutions against PyTorch's own, on this CPU.

    python -m benchmarks.products --repeats 9

Times of `models/features/matmul.py` and of `F.linear` side by side, for positions of features and
the matrices of heads: the product, and those of its gradient with respect to weight and rows.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.stages import compared
from models.features.matmul import add_product, linear
from utils.device import keep_freed_memory

SHAPES = {
    "EfficientNet-Lite0, stages 2, 3: a filter": (2048, 152, 154),
    "WideResNet50-2, stage 2: a projector": (1568, 512, 1792),
    "SimpleNet's discriminator": (6272, 1536, 1024),
    "nearest neighbours among 4,096": (1024, 1792, 4096),
}
"""Rows, channels and outputs."""


def main() -> None:
    """Print the ratios for each shape, on all threads and on one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    keep_freed_memory()
    threads = torch.get_num_threads()
    print(f"PyTorch's own / ours, on {threads} and on 1 thread\n")
    print("| product | forward | gradient | forward, 1 thread | gradient, 1 thread |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, shape in SHAPES.items():
        cells = []
        for count in (threads, 1):
            torch.set_num_threads(count)
            cells += [
                compared(*ways, repeats=arguments.repeats, device=torch.device("cpu"))
                for ways in both_ways(*shape)
            ]
        print(f"| {name} | {' | '.join(cells)} |")


def both_ways(
    num_rows: int, channels: int, outputs: int
) -> list[tuple[Callable[[], object], Callable[[], object]]]:
    """Return (PyTorch's own, ours) of the forward product and of both of its gradient."""
    rows, weight = torch.randn(num_rows, channels), torch.randn(outputs, channels)
    slope, bias = torch.randn(num_rows, outputs), torch.randn(outputs)
    sums, across = torch.zeros_like(weight), weight.T.contiguous()

    def own() -> Tensor:
        sums.addmm_(slope.T, rows)
        return F.linear(slope, across)

    def ours() -> Tensor:
        add_product(sums, slope, rows)
        return linear(slope, across)

    return [(lambda: F.linear(rows, weight, bias), lambda: linear(rows, weight, bias)), (own, ours)]


if __name__ == "__main__":
    main()
