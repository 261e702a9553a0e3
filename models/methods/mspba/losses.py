"""What the network is trained on: directions of neighbours, likeness of patches, and clusters."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.methods.mspba.clusters import cluster_loss
from models.methods.mspba.networks import PatchNetwork
from models.methods.mspba.sampling import PatchSampler


def patch_losses(
    network: PatchNetwork,
    classifiers: nn.ModuleDict,
    pixels: Tensor,
    sampler: PatchSampler,
    centres: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """Return the terms of the loss, each a scalar, summed over the sizes of patch.

    Args:
        network: embeds patches.
        classifiers: of the direction of neighbours, one for each size.
        pixels: (B, 3, S, S).
        sampler: draws their patches.
        centres: (K, D) for each size; without any there is no term "cluster".
    """
    found: dict[str, list[Tensor]] = {"position": [], "svdd": [], "cluster": []}
    for size in network.stages:
        patches, directions = sampler(pixels, size)
        ones, others, near, jittered, far = network(patches).chunk(5)  # (B, D) each
        logits = classifiers[str(size)](ones, others).float()
        found["position"].append(F.cross_entropy(logits, directions))
        found["svdd"].append(svdd_loss(near, jittered, far))
        if centres:
            found["cluster"].append(cluster_loss(near, centres[size]))
    return {name: torch.stack(terms).sum() for name, terms in found.items() if terms}


def svdd_loss(near: Tensor, jittered: Tensor, far: Tensor) -> Tensor:
    """Draw patches that all but cover each other together, and compare them with far ones.

    Args:
        near: embeddings (n, D).
        jittered: of patches that all but cover those.
        far: of patches far from those.

    Returns:
        A scalar: the mean distance of the first two, and the mean of how much more the far ones
        point in the direction of the first than the second do.
    """
    distance = torch.linalg.vector_norm(near - jittered, dim=1)  # (n,)
    same = F.cosine_similarity(near, jittered, dim=1)
    other = F.cosine_similarity(near, far, dim=1)
    return distance.mean() + (other - same).mean()
