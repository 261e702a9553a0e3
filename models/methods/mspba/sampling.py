"""Patches of images, drawn in pairs and triples for a whole batch at once, and cut out.

Corners are (row, column) of a patch's first pixel. All patches lie inside their image: where the
first one may be follows from where the others are to it. (PatchSVDD, on which MSPBA builds, moves a
patch that leaves the image back inside, which at a border makes a wrong direction of its label.)
"""

import math
from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor

from models.detector import FeatureSource
from models.errors import ModelError
from models.training.generators import derived

READ = 16
"""Images read at once where nothing is trained."""
DIRECTIONS = 12
"""Of a neighbour, 30 degrees apart."""
SIGMA = 0.02
"""Standard deviation of shift and noise, of pixels in 0 to 1."""


def least_side(size: int) -> int:
    """Return the pixels of the smallest image that holds a patch and each of its neighbours."""
    return size + 3 * size // 4 + size // 4 - 1


def draw_neighbours(
    count: int, side: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs of patches of which the second lies in one of `DIRECTIONS` of the first.

    Along each axis their distance is the direction's component times a length of its own, 3/4 of
    the patch to 1 pixel less than all of it.

    Args:
        count: pairs n.
        side: pixels of the square images, at least `least_side`.
        size: pixels K of the square patches.
        generator: of the CPU.

    Returns:
        Corners of both, (n, 2) each, and the directions (n,), int64.
    """
    offsets, directions = _draw_offsets(count, size, generator)
    first = draw_corners(count, side - size, generator, [offsets])
    return first, first + offsets, directions


def draw_triples(
    count: int, side: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw patches, each with one that all but covers it and one that is far.

    The second is at most 1/16 of the patch away along each axis, and never the same; the third
    twice as far as a neighbour, or as far as the image is large.

    Args:
        count: triples n.
        side: pixels of the square images, at least `least_side`.
        size: pixels K of the square patches.
        generator: of the CPU.

    Returns:
        Corners of the three, (n, 2) each, int64.
    """
    most = max(1, size // 16)
    width = 2 * most + 1
    drawn = torch.randint(width**2 - 1, (count,), generator=generator)
    drawn += drawn >= width**2 // 2  # all but no jitter, which is in the middle
    jitter = torch.stack([drawn // width, drawn % width], dim=1) - most  # (n, 2)
    neighbours, _ = _draw_offsets(count, size, generator)
    limit = side - size - most
    far = (2 * neighbours).clamp(-limit, limit)
    first = draw_corners(count, side - size, generator, [jitter, far])
    return first, first + jitter, first + far


def draw_corners(
    count: int, room: int, generator: torch.Generator, offsets: Sequence[Tensor] = ()
) -> Tensor:
    """Draw corners in 0 to `room`, both included.

    Args:
        count: corners n.
        room: side of the images less that of the patches.
        generator: of the CPU.
        offsets: (n, 2) each; corners so far away lie in 0 to `room` too.

    Returns:
        (n, 2), int64.
    """
    ways = torch.stack([torch.zeros(count, 2, dtype=torch.int64), *offsets])  # (1 + others, n, 2)
    low = -ways.amin(dim=0)
    high = room - ways.amax(dim=0)
    share = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return low + (share * (high - low + 1)).long()


def crop(images: Tensor, owners: Tensor, corners: Tensor, size: int) -> Tensor:
    """Cut patches out.

    Args:
        images: (B, C, H, W), best with channels last in memory.
        owners: image of each patch, (n,).
        corners: (n, 2).
        size: pixels K of the square patches.

    Returns:
        (n, C, K, K), channels last in memory.
    """
    span = torch.arange(size, device=images.device)
    rows, columns = (rearrange(axis, "n -> n 1") + span for axis in corners.unbind(dim=1))  # (n, K)
    owners, rows = rearrange(owners, "n -> n 1 1"), rearrange(rows, "n h -> n h 1")
    found = images[owners, :, rows, rearrange(columns, "n w -> n 1 w")]  # (n, K, K, C)
    return rearrange(found, "n h w c -> n c h w")


def repeated(
    bank: FeatureSource, batch_size: int, passes: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield images (B, 3, S, S) of several passes, each in a new order.

    A batch may hold the end of one pass and the start of the next: only the very last is smaller.
    """
    left: Tensor | None = None
    for _ in range(passes):
        for images in bank.batches(batch_size, generator=generator):
            left = images if left is None else torch.cat([left, images])
            if len(left) >= batch_size:
                yield left[:batch_size]
                left = left[batch_size:]
    if left is not None and len(left):
        yield left


def find_side(bank: FeatureSource, size: int) -> int:
    """Return the side of the images in pixels.

    Raises:
        ModelError: they have no room for a patch of `size` pixels and its neighbour.
    """
    side = next(iter(bank.batches(1))).shape[-1]
    if side < (least := least_side(size)):
        raise ModelError(
            f"a patch of {size} pixels and its neighbour need images of at least {least} pixels; "
            f"these have {side}: --image-size {least} --crop-size none, or smaller "
            "--method.patch-sizes"
        )
    return side


def find_mean_image(bank: FeatureSource) -> Tensor:
    """Return the mean of all images, in 0 to 1, float64, flattened: (3 * S * S,)."""
    total: Tensor | int = 0
    for images in bank.batches(READ):
        total = total + images.sum(dim=0, dtype=torch.int64)  # (3, S, S)
    assert isinstance(total, Tensor)
    return total.contiguous().flatten().double() / (255 * len(bank))


class PatchSampler:
    """Draws the patches of both tasks, one pair and one triple of each image.

    The colour of each patch of a pair is shifted, and noise is added: neither shall tell where the
    patch was. The generator of both is on the device of the images, seeded by one draw of the one
    given.

    Args:
        generator: of the CPU; draws where the patches are.
        device: of the images.
    """

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator = generator
        self.noise = derived(generator, device)

    def __call__(self, pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return patches of images (B, 3, S, S), in units of 0 to 1.

        Returns:
            Patches (5 B, 3, K, K): those of the pairs, one after the other, and those of the
            triples; and the directions of the pairs, (B,).
        """
        B, _, _, side = pixels.shape
        *pair, directions = draw_neighbours(B, side, size, self.generator)
        triple = draw_triples(B, side, size, self.generator)
        corners = torch.cat([*pair, *triple]).to(pixels.device, non_blocking=True)  # (5 B, 2)
        owners = torch.arange(B, device=pixels.device).repeat(5)
        patches = crop(pixels, owners, corners, size)
        perturbed = self.perturb(patches[: 2 * B])
        return torch.cat([perturbed, patches[2 * B :]]), directions.to(
            pixels.device, non_blocking=True
        )

    def perturb(self, patches: Tensor) -> Tensor:
        """Return patches (n, 3, K, K), shifted in colour and noisy."""
        shift = patches.new_empty(*patches.shape[:2], 1, 1)
        noise = torch.empty_like(patches)
        for drawn in (shift, noise):
            drawn.normal_(0, SIGMA, generator=self.noise)
        return patches + shift + noise


def _draw_offsets(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the ways from patches to their neighbours, (n, 2), and their directions, (n,)."""
    directions = torch.randint(DIRECTIONS, (count,), generator=generator)
    lengths = 3 * size // 4 + torch.randint(size // 4, (count, 2), generator=generator)
    angles = directions.double() * (2 * math.pi / DIRECTIONS)
    components = torch.stack([angles.sin(), angles.cos()], dim=1)  # (n, 2)
    return (components * lengths).round().long(), directions
