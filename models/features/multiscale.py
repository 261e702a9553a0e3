"""Linear maps of features, computed on the stages that the features are joined from.

Features are the stages' maps, resized bilinearly to the largest one and concatenated: f = [R_1 f_1;
R_2 f_2; ...]. Resizing acts on positions and a matrix on channels, so the two commute: W f is the
sum of R_l (W_l f_l), where W_l f_l is computed at the few positions that stage l has. For stages 1
to 3 of a WideResNet50 that is a quarter of the products, and the joined features never exist.

Stages are maps (B, C_l, H_l, W_l), channels last in memory; (H, W) is the size of the largest.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from models.features.matmul import add_product, full_precision, linear

CACHE_BYTES = 3 << 20
"""Results of `project`, for each thread, that a CPU's cache keeps until the next step."""
BLOCK = 64
"""Columns of a second moment added at once."""


def join_stages(stages: Sequence[Tensor]) -> Tensor:
    """Resize the stages' maps to the largest one and concatenate them.

    Returns:
        (B, C, H, W) float32, channels last in memory, so that flattening to positions is a view.
        Where the only stage is images, (B, 3, S, S) uint8, it stays what it is.
    """
    maps, images = split_images(stages)
    if images is not None and not maps:
        return images
    size = grid_size(maps)
    resized = [_resized(stage.float(), size) for stage in maps]
    joined = resized[0] if len(resized) == 1 else torch.cat(resized, dim=1)  # (B, C, H, W)
    return joined.contiguous(memory_format=torch.channels_last)


def split_images(stages: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Return the stages' maps, and the images (B, 3, S, S), uint8, that may come after them."""
    if stages[-1].is_floating_point():
        return list(stages), None
    return list(stages[:-1]), stages[-1]


def grid_size(stages: Sequence[Tensor]) -> tuple[int, int]:
    """Return the size (H, W) of the joined features."""
    H, W = max((m.shape[2:] for m in stages), key=lambda s: s[0] * s[1])
    return H, W


def parts_in_cache(stages: Sequence[Tensor], width: int) -> Iterator[list[Tensor]]:
    """Split a batch into parts whose projections to `width` rows stay in a CPU's cache.

    Each of the few cheap steps that follow a product would otherwise wait for main memory. On
    other devices the batch stays whole.
    """
    if stages[0].device.type != "cpu":
        yield list(stages)
        return
    H, W = grid_size(stages)
    room = torch.get_num_threads() * CACHE_BYTES
    images = max(1, room // (H * W * width * stages[0].element_size()))
    yield from (list(part) for part in zip(*(m.split(images) for m in stages), strict=True))


def project(stages: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(features, weight, bias)` of the joined features at each position.

    Args:
        stages: B images.
        weight: (R, C).
        bias: (R,).

    Returns:
        (B, H, W, R), contiguous.
    """
    size = grid_size(stages)
    widths = [m.shape[1] for m in stages]
    # Weights of a resize sum to 1, so the bias may join any stage; at the largest it is never
    # resized.
    largest = next(i for i, m in enumerate(stages) if m.shape[2:] == size)
    parts = weight.split(widths, dim=1)
    total = _linear(stages[largest], parts[largest], bias)  # (B, H, W, R)
    for i, (maps, part) in enumerate(zip(stages, parts, strict=True)):
        if i != largest:
            product = _linear(maps, part, None)  # (B, H_l, W_l, R)
            total += _channels_last(_resized(rearrange(product, "b h w r -> b r h w"), size))
    return total


def add_outer(sums: Tensor, stages: Sequence[Tensor], rows: Tensor) -> None:
    """Add the outer products of `rows` and the joined features, summed over positions.

    The adjoint of `project`: its gradient with respect to the weight.

    Args:
        sums: (R, C), changed.
        stages: B images.
        rows: (B, H, W, R), contiguous.
    """
    _, H, W, _ = rows.shape
    widths = [m.shape[1] for m in stages]
    for maps, part in zip(stages, sums.split(widths, dim=1), strict=True):
        gathered = rows
        if maps.shape[2:] != (H, W):
            gathered = resize_adjoint(rows, maps.shape[2:])  # (B, H_l, W_l, R)
        features = rearrange(maps, "b c h w -> (b h w) c")
        add_product(part, rearrange(gathered, "b h w r -> (b h w) r"), features)


def resize_adjoint(rows: Tensor, size: Sequence[int]) -> Tensor:
    """Apply the adjoint of the bilinear resize of maps (H_l, W_l) to (H, W).

    On a GPU PyTorch's own adds atomically, so that its last bits differ each time: there it is what
    `adjoint_by_products` says. On a CPU that takes twice as long.

    Args:
        rows: (B, H, W, R), contiguous.
        size: H_l and W_l.

    Returns:
        (B, H_l, W_l, R).
    """
    if rows.device.type == "cuda":
        return adjoint_by_products(rows, size)
    B, H, W, R = rows.shape
    # The adjoint of `F.interpolate` itself: autograd would run the resize first.
    return _channels_last(
        torch.ops.aten.upsample_bilinear2d_backward(
            rearrange(rows, "b h w r -> b r h w"),
            [H, W],
            [B, R, *size],
            False,  # corners are not aligned
            None,
            None,
        )
    )


def adjoint_by_products(rows: Tensor, size: Sequence[int]) -> Tensor:
    """Do as `resize_adjoint` by the two matrices of the resize, with the same bits each time."""
    H, W = rows.shape[1:3]
    with full_precision(rows.device):
        return _mixed(rows, resize_matrix(size[0], H, rows).T, resize_matrix(size[1], W, rows).T)


def add_second_moment(sums: Tensor, stages: Sequence[Tensor]) -> None:
    """Add f~ f~', summed over all positions, of joined features with a one below: f~ = [f; 1].

    The block of stages l and m is f_l' R_l' R_m f_m; R_l' R_m is a small fixed matrix for each axis
    and is applied to the finer stage, so that the product runs at the positions of the coarser.

    Args:
        sums: (C + 1, C + 1) float64, of which the upper triangle is changed. What stands below the
            diagonal is undefined.
        stages: B images.
    """
    B, (H, W) = len(stages[0]), grid_size(stages)
    stages = [m.double() for m in stages]
    widths = [m.shape[1] for m in stages]
    blocks = [row.split([*widths, 1], dim=1) for row in sums.split([*widths, 1], dim=0)]
    maps = [_channels_last(m) for m in stages]  # (B, H_l, W_l, C_l)
    resize = [
        (resize_matrix(m.shape[1], H, m), resize_matrix(m.shape[2], W, m)) for m in maps
    ]  # (H, H_l), (W, W_l)
    for i, (first, (down, across)) in enumerate(zip(maps, resize, strict=True)):
        own = first
        if first.shape[1:3] != (H, W):
            # R'R = L L', so the stage's own block is that of L'f with itself: half of it is enough.
            factors = [torch.linalg.cholesky(resized.T @ resized) for resized in (down, across)]
            own = _mixed(first, factors[0].T, factors[1].T)
        _add_gram(blocks[i][i], rearrange(own, "b h w c -> (b h w) c"))
        for j in range(i + 1, len(maps)):
            second, (down_2, across_2) = maps[j], resize[j]
            if first[0, ..., 0].numel() >= second[0, ..., 0].numel():
                left, right = _mixed(first, down_2.T @ down, across_2.T @ across), second
            else:
                left, right = first, _mixed(second, down.T @ down_2, across.T @ across_2)
            blocks[i][j].addmm_(
                rearrange(left, "b h w c -> c (b h w)"), rearrange(right, "b h w c -> (b h w) c")
            )
    sums[:-1, -1] += position_sums(stages)
    sums[-1, -1] += B * H * W


def position_sums(stages: Sequence[Tensor]) -> Tensor:
    """Return the sum of the joined features over all positions of all images, (C,) float64."""
    H, W = grid_size(stages)
    sums = []
    for maps in (_channels_last(m).double() for m in stages):
        down = resize_matrix(maps.shape[1], H, maps).sum(dim=0, keepdim=True)  # (1, H_l)
        across = resize_matrix(maps.shape[2], W, maps).sum(dim=0, keepdim=True)  # (1, W_l)
        sums.append(_mixed(maps, down, across).sum(dim=(0, 1, 2)))  # (C_l,)
    return torch.cat(sums)


def squared_lengths(stages: Sequence[Tensor]) -> Tensor:
    """Return the squared Euclidean length of the joined features at each position, (B, H, W)."""
    size = grid_size(stages)
    parts = [_resized(maps, size).square().sum(dim=1) for maps in stages]  # (B, H, W)
    return torch.stack(parts).sum(dim=0)


def features_at(stages: Sequence[Tensor], places: Tensor) -> Tensor:
    """Return the joined features at some positions of each image, without joining the rest.

    Args:
        stages: B images.
        places: (B, N) int64, positions of the flattened grid, in [0, H * W).

    Returns:
        (B, N, C).
    """
    H, W = grid_size(stages)
    found = []
    for maps in stages:
        down = resize_matrix(maps.shape[2], H, maps)[places // W]  # (B, N, H_l)
        across = resize_matrix(maps.shape[3], W, maps)[places % W]  # (B, N, W_l)
        weights = einsum(down, across, "b n h, b n w -> b n h w")
        positions = rearrange(maps, "b c h w -> b (h w) c")
        found.append(torch.bmm(rearrange(weights, "b n h w -> b n (h w)"), positions))
    return torch.cat(found, dim=2)


def resize_matrix(length: int, target: int, like: Tensor) -> Tensor:
    """Return the bilinear resize of one axis as a matrix (target, length), of `like`'s kind."""
    identity = torch.eye(length, dtype=like.dtype, device=like.device)
    if length == target:
        return identity
    return F.interpolate(rearrange(identity, "i j -> 1 i j"), target, mode="linear")[0].T


def mirrored(sums: Tensor) -> Tensor:
    """Return symmetric matrices (..., D, D) of which `sums` holds the upper triangles."""
    return sums.triu() + sums.triu(1).mT


def _add_gram(sums: Tensor, rows: Tensor) -> None:
    """Add rows' rows, (P, D) to (D, D), to the upper triangle of `sums`.

    In blocks of `BLOCK` columns; those below the diagonal are left out, which saves up to half of
    the work. What stands below the diagonal is undefined.
    """
    for top in range(0, rows.shape[1], BLOCK):
        bottom = top + BLOCK
        sums[top:bottom, top:].addmm_(rows[:, top:bottom].T, rows[:, top:])


def _channels_last(maps: Tensor) -> Tensor:
    return rearrange(maps, "b c h w -> b h w c")


def _linear(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    B, _, H, W = maps.shape
    product = linear(rearrange(maps, "b c h w -> (b h w) c"), weight, bias)
    return rearrange(product, "(b h w) r -> b h w r", b=B, h=H, w=W)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode="bilinear")


def _mixed(maps: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Apply a matrix to each axis of maps (B, h, w, C): (B, H, W, C)."""
    B, _, w, C = maps.shape
    rows = down @ rearrange(maps, "b h w c -> b h (w c)")  # (B, H, w * C)
    mixed = across @ rearrange(rows, "b y (w c) -> (b y) w c", w=w)  # (B * H, W, C)
    return rearrange(mixed, "(b y) x c -> b y x c", b=B, c=C)
