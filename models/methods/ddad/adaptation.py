"""A copy of the backbone learns that normal images and what is made of them are alike."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureSource
from models.methods.ddad.distances import stage_maps, to_unit
from models.methods.ddad.options import DdadOptions
from models.training.generators import derived
from models.training.loop import Loop, Losses

LEAST_ADAPTED = 4
"""Images of a step, at least: two pairs, for batch statistics."""
Rebuild = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images that are noised, images they are drawn towards, and noise, to images."""


def adapt(
    network: nn.Module,
    backbone: FrozenExtractor,
    rebuild: Rebuild,
    bank: FeatureSource,
    options: DdadOptions,
    *,
    seed: int,
    num_noises: int,
) -> None:
    """Train a copy of a backbone, from the backbone's weights.

    Half of a batch is noised, by noise of its own, and drawn towards the other half. What comes of
    it shall look like the other half to the copy, which shall stay near the backbone on both.

    Args:
        network: the copy; in eval mode afterwards. It trains with batch statistics (released code).
        backbone: it is a copy of.
        rebuild: makes normal images.
        bank: uint8 images, at least `LEAST_ADAPTED`. Smaller batches are left out.
        options: how it trains.
        seed: of the order of the images and of the noise.
        num_noises: images of noise that each rebuilt image takes.
    """
    device = backbone.device
    generator = torch.Generator().manual_seed(seed)
    drawn = derived(generator, device)
    network.load_state_dict(backbone.net.state_dict())

    def losses(images: Tensor) -> Losses:
        pairs = len(images) // 2
        target, start = to_unit(images[: 2 * pairs]).split(pairs)
        noise = torch.randn((num_noises, *start.shape), generator=drawn, device=device)
        with torch.no_grad():
            rebuilt = rebuild(start, target, noise)
            frozen = [stage_maps(backbone.net, backbone, part) for part in (rebuilt, target)]
        learning = [stage_maps(network, backbone, part) for part in (rebuilt, target)]
        alike = apart(*learning)
        kept = apart(learning[0], frozen[0]) + apart(learning[1], frozen[1])
        return {"loss": alike + options.adaptation_weight * kept, "alike": alike, "kept": kept}

    loop = Loop(
        module=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=options.adaptation_learning_rate),
        epochs=options.adaptation_epochs,
        generator=generator,
        drawn={"noise": drawn},
        mixed_precision=options.mixed_precision,
        phase="adaptation",
    )
    batches = min(options.batch_size, len(bank))
    loop.run(
        lambda: (
            images
            for images in bank.batches(max(batches, LEAST_ADAPTED), generator=generator)
            if len(images) >= LEAST_ADAPTED
        ),
        losses,
    )


def apart(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return 1 - cosine of whole maps (B, C_l, H_l, W_l), averaged over images, summed over l."""
    distances = [
        (1 - F.cosine_similarity(one.float().flatten(1), other.float().flatten(1), dim=1)).mean()
        for one, other in zip(maps, others, strict=True)
    ]
    return torch.stack(distances).sum()
