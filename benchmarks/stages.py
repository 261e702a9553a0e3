"""NoCo's head on the stages of the backbone against the same head on joined features.

    python -m benchmarks.stages --repeats 7

Features are the stages' maps resized to the largest and concatenated. A projector can be applied
after that, as written in the papers, or to each stage at its own size before it is resized
(`models/features/multiscale.py`): the same numbers up to rounding. Timed side by side, on random
features of the shapes of EfficientNet-Lite0 and WideResNet50-2 at 224 pixels: a training step
(joining, loss and gradient), the scoring of a batch, and the second moment of the closed form with
one centre.
"Joined" does all of it with PyTorch's own operations and autograd.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.detector import FeatureShape
from models.features.multiscale import join_stages
from models.methods.noco import Noco, NocoOptions
from models.methods.noco_cf.noco_exact import NocoExact, NocoExactOptions
from utils.device import keep_freed_memory, pick_device

SHAPES = {
    "EfficientNet-Lite0, stages 1, 2, 3": ((24, 56), (40, 28), (112, 14)),
    "EfficientNet-Lite0, stages 2, 3": ((40, 28), (112, 14)),
    "WideResNet50-2, stages 1, 2, 3": ((256, 56), (512, 28), (1024, 14)),
    "WideResNet50-2, stages 2, 3": ((512, 28), (1024, 14)),
}
"""Channels and side of each stage."""


def main() -> None:
    """Time both ways for each backbone and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8, help="in a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = pick_device(arguments.device)
    print(
        f"{arguments.images} images, {device}, {torch.get_num_threads()} threads: joined / ours\n"
    )
    print("| features | training step | scoring | second moment |\n| --- | ---: | ---: | ---: |")
    for name, shapes in SHAPES.items():
        stages = [
            torch.randn(arguments.images, C, side, side, device=device).to(
                memory_format=torch.channels_last
            )
            for C, side in shapes
        ]
        cells = [
            compared(*ways, repeats=arguments.repeats, device=device) for ways in both_ways(stages)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def both_ways(stages: list[Tensor]) -> list[tuple[Callable[[], object], Callable[[], object]]]:
    """Return (on joined features, ours) for a training step, scoring and the second moment."""
    shape = FeatureShape(tuple(stage.shape[1] for stage in stages))
    trained = Noco(shape, NocoOptions()).to(stages[0].device)
    one_centre = NocoExactOptions(time=(1e4,))
    closed = NocoExact(shape, one_centre).to(stages[0].device)
    closed.start(torch.Generator())

    def step(loss: Callable[[], Tensor]) -> None:
        trained.zero_grad()
        loss().backward()

    def joined_loss() -> Tensor:
        return F.relu(trained(join_stages(stages)) - trained.radius**2).mean() / trained.options.nu

    def joined_moment() -> Tensor:
        positions = rearrange(join_stages(stages), "b c h w -> (b h w) c").double()
        extended = F.pad(positions, (0, 1), value=1.0)  # (P, C + 1)
        return extended.T @ extended

    def without_gradient(way: Callable[[], object]) -> Callable[[], object]:
        return torch.inference_mode()(way)

    return [
        (lambda: step(joined_loss), lambda: step(lambda: trained.loss(stages))),
        (
            without_gradient(lambda: trained(join_stages(stages))),
            without_gradient(lambda: trained.score_stages(stages)),
        ),
        (without_gradient(joined_moment), without_gradient(lambda: closed.partial_fit(stages))),
    ]


def compared(
    other: Callable[[], object], ours: Callable[[], object], *, repeats: int, device: torch.device
) -> str:
    """Return the median ratio of the other time to ours, and its range."""
    for way in (other, ours):  # warm
        seconds(way, device)
    ratios = [seconds(other, device) / seconds(ours, device) for _ in range(repeats)]
    return f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def seconds(way: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
