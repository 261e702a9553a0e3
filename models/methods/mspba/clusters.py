"""The term that draws embeddings to k-means centres of themselves."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from models.features.kmeans import lloyd, owners
from models.methods.mspba.networks import PatchNetwork
from models.methods.mspba.sampling import draw_corners
from models.methods.mspba.windows import embed_windows


def cluster_loss(embeddings: Tensor, centres: Tensor) -> Tensor:
    """Return the mean squared distance of embeddings (n, D) to the nearest of centres (K, D)."""
    with torch.no_grad():
        owner = owners(embeddings, centres)  # (n,)
    return (embeddings - centres[owner]).square().sum(dim=1).mean()


class Centres:
    """Those that count in an epoch; a checkpoint keeps them.

    Attributes:
        of_size: (K, D), by the patches' size; empty where none are used yet.
    """

    def __init__(self) -> None:
        self.of_size: dict[int, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the centres."""
        return {"of_size": self.of_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take centres."""
        self.of_size = state["of_size"]


@torch.no_grad()
def find_centres(
    network: PatchNetwork,
    batches: Iterable[Tensor],
    each: int,
    count: int,
    generator: torch.Generator,
) -> dict[int, Tensor]:
    """Return k-means centres (K, D) of the embeddings of random patches, for each size.

    Args:
        network: embeds them.
        batches: of pixels, (B, 3, S, S) each.
        each: random patches of each image, of each size.
        count: centres K, at most as many as patches.
        generator: draws the patches, and the first centres.
    """
    found: dict[int, list[Tensor]] = {size: [] for size in network.stages}
    for pixels in batches:
        for size, parts in found.items():
            corners = draw_corners(each, pixels.shape[-1] - size, generator)
            rows = torch.arange(each * len(pixels))
            parts.append(embed_windows(network, pixels, corners, rows, size))
    return {
        size: lloyd(torch.cat(parts), count, generator=generator) for size, parts in found.items()
    }
