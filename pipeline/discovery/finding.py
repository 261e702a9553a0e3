"""From what was collected to kinds, by each method."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.anomalyncd import AnomalyNcdOptions
from configs.discovery import ContrastOptions, DiscoverOptions
from models.discovery.anomalyncd.anomalyncd import AnomalyNcd
from models.discovery.anomalyncd.merging import merged_probabilities
from models.discovery.pieces import Piece
from pipeline.discovery.base import labelled_pieces
from pipeline.discovery.collecting import Collected
from pipeline.discovery.looking import Looked
from utils.device import pick_device
from utils.discovery.files import GOOD
from utils.discovery.kinds import cluster, nearest
from utils.errors import UsageError

NORMAL = -1
"""The kind of an image without a mask, where the method leaves it aside."""


@dataclass(frozen=True)
class Found:
    """Kinds of N images and R regions.

    Attributes:
        kinds: (N,) int64, from 0; `NORMAL` for images that the method calls good.
        confidences: (N,), 0 to 1; nan for `NORMAL`.
        region_kinds: (R,) likewise.
        region_confidences: (R,).
        points: (R, D) vectors of the regions, for a map of them; (N, D) of the images where the
            method knows no regions.
        num_kinds: kinds of defects, and of good images where the method counts these as a kind.
        was_estimated: whether nobody gave their number.
        state: tensors by which new images get the same kinds.
    """

    kinds: np.ndarray
    confidences: np.ndarray
    region_kinds: np.ndarray
    region_confidences: np.ndarray
    points: np.ndarray
    num_kinds: int
    was_estimated: bool
    state: dict[str, Tensor]


def num_wanted(options: DiscoverOptions, looked: Looked) -> int | None:
    """Return how many kinds of defects are asked for; None to estimate it.

    Raises:
        UsageError: as many as there are names, and there are none.
    """
    if options.kinds == "auto":
        return None
    if options.kinds != "known":
        return options.kinds
    names = set(looked.names or ()) - {GOOD}
    if not names:
        raise UsageError(
            f"{looked.category}: --kinds known counts the names of the test set's defects, and "
            "there are none; give a number, or auto"
        )
    return len(names)


def find(options: DiscoverOptions, looked: Looked, collected: Collected, folder: Path) -> Found:
    """Tell kinds apart.

    Args:
        options: the method's, and how many kinds.
        looked: the images.
        collected: of them.
        folder: for files that a method needs meanwhile.

    Raises:
        UsageError: nothing is inside any mask, or a method cannot be used on these images.
    """
    number = num_wanted(options, looked)
    if not any(collected.has_mask):
        raise UsageError(
            f"{looked.category}: no image has a mask, so there is no kind of defect; a higher "
            "--false-alarm-rate masks more of them, and so may --masks mebin"
        )
    if isinstance(options.method, AnomalyNcdOptions):
        return _by_anomalyncd(options, options.method, looked, collected, number, folder)
    if isinstance(options.method, ContrastOptions):
        return _by_contrast(options, options.method, collected, number)
    return _by_whole_images(options, collected, number)


def _by_contrast(
    options: DiscoverOptions, method: ContrastOptions, collected: Collected, number: int | None
) -> Found:
    """Join images by what is inside their masks; a region is of the kind it is nearest to."""
    inside = np.array(collected.has_mask)
    vectors = np.stack(collected.image_vectors)  # (N, D)
    found = cluster(vectors[inside], number, method.clustering, random_seed=options.random_seed)
    kinds = np.full(len(vectors), NORMAL)
    kinds[inside] = found.kinds
    confidences = np.full(len(vectors), np.nan)
    confidences[inside] = certainty(vectors[inside], found.centres, found.kinds)
    regions = np.stack(collected.region_vectors)  # (R, D)
    region_kinds, region_confidences = nearest(regions, found.centres)
    # What an image shows has been told by all of it: its only region is no second opinion.
    alone = _only_regions(collected)
    owners = np.array([region.image for region in collected.regions])
    region_kinds[alone] = kinds[owners[alone]]
    region_confidences[alone] = confidences[owners[alone]]
    return Found(
        kinds,
        confidences,
        region_kinds,
        region_confidences,
        regions,
        len(found.centres),
        found.was_estimated,
        _numbered_state(len(found.centres), centres=torch.from_numpy(found.centres)),
    )


def _by_whole_images(options: DiscoverOptions, collected: Collected, number: int | None) -> Found:
    """Join whole images, good ones among them."""
    vectors = np.stack(collected.whole_vectors)  # (N, D)
    wanted = None if number is None else number + 1
    found = cluster(vectors, wanted, "kmeans", random_seed=options.random_seed)
    sure = certainty(vectors, found.centres, found.kinds)
    owners = np.array([region.image for region in collected.regions], dtype=np.int64)
    return Found(
        found.kinds,
        sure,
        found.kinds[owners],
        sure[owners],
        vectors[owners],
        len(found.centres),
        found.was_estimated,
        _numbered_state(len(found.centres), centres=torch.from_numpy(found.centres)),
    )


def _by_anomalyncd(
    options: DiscoverOptions,
    method: AnomalyNcdOptions,
    looked: Looked,
    collected: Collected,
    number: int | None,
    folder: Path,
) -> Found:
    """Train on the pieces, beside labelled ones; good images are one of the kinds."""
    assert options.base is not None
    labelled, names = labelled_pieces(options.base, looked.paths, folder / "base")
    if number is None:  # the method has to be told; Contrast counts the same masks
        inside = np.stack(collected.image_vectors)[np.array(collected.has_mask)]
        counted = cluster(inside, None, "ward", random_seed=options.random_seed)
        new_kinds = len(counted.centres) + 1
    else:
        new_kinds = number + 1
    network = AnomalyNcd(method, labelled_kinds=len(names), new_kinds=new_kinds)
    network = network.to(pick_device(options.device))
    pieces = [region.piece for region in collected.regions]
    generator = torch.Generator().manual_seed(options.random_seed)
    network.fit(labelled, pieces, generator=generator)
    kinds, confidences, own, embedded = anomalyncd_kinds(
        network, pieces, [region.image for region in collected.regions]
    )
    region_confidences, region_kinds = own.max(dim=1)
    return Found(
        kinds,
        confidences,
        region_kinds.numpy(),
        region_confidences.numpy(),
        embedded,
        new_kinds,
        number is None,
        _numbered_state(
            new_kinds,
            labelled_kinds=torch.tensor(len(names)),
            vit_digest=torch.tensor(list(network.vit.weights_digest.encode())),
            **{f"network.{key}": value for key, value in network.state_dict().items()},
        ),
    )


def anomalyncd_kinds(
    network: AnomalyNcd, pieces: Sequence[Piece], images: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, Tensor, np.ndarray]:
    """Return kinds (N,) and confidences (N,) of images, and of their pieces what they are made of.

    Returns:
        Beside those, the probabilities of pieces (R, U), and their class tokens (R, D).
    """
    tokens = network.embed(pieces)
    own = network.probabilities_of(tokens)  # (R, U)
    areas = [piece.area for piece in pieces]
    merged = merged_probabilities(own, areas, images, network.options.merge_temperature)
    confidences, kinds = merged.max(dim=1)
    return kinds.numpy(), confidences.numpy(), own, tokens.numpy()


def _numbered_state(num_kinds: int, **tensors: Tensor) -> dict[str, Tensor]:
    """Return a state in which kinds have the numbers that they were found with."""
    return {"numbers": torch.arange(num_kinds), **tensors}


def numbered(kinds: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the numbers of kinds (N,), which stay below 0 where they are."""
    return np.where(kinds < 0, kinds, numbers[kinds])


def certainty(vectors: np.ndarray, centres: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return how sure the kinds of vectors are, (N,); 0 where another centre is nearer."""
    closest, sure = nearest(vectors, centres)
    return np.where(closest == kinds, sure, 0.0)


def _only_regions(collected: Collected) -> np.ndarray:
    """Return which regions are the only ones of their images, (R,) bool."""
    owners = np.array([region.image for region in collected.regions])
    counts = np.bincount(owners, minlength=len(collected.scores))
    alone: np.ndarray = counts[owners] == 1
    return alone
