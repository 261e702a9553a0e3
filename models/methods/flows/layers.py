"""Invertible layers, of which normalising flows are made.

Sources: "Glow: Generative Flow with Invertible 1x1 Convolutions" (Kingma and Dhariwal, NeurIPS
2018), table 1, and the papers of the methods. A layer works on maps (B, C, H, W), some of them on
vectors (B, D) too. All its log-determinants are sums over positions, so each position's part is
known: it is what anomaly maps are made of.

| paper | here | meaning |
| --- | --- | --- |
| s, b | log_scale, bias | of an actnorm: y = exp(log_scale) (x + bias) |
| W = P L (U + diag(s)) | permutation, factors, sign | of an invertible 1 x 1 convolution |
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CONSTANT = 1e-6
"""Deviation below which a channel counts as constant."""


class Invertible(nn.Module, ABC):
    """A differentiable layer with an inverse and a log-determinant."""

    @abstractmethod
    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and where its log-determinant comes from.

        Args:
            x: (B, C, H, W), or (B, D).

        Returns:
            y, and the parts of log |det dy/dx|: (B, H', W') of y (B, C', H', W'), or (B,).
        """

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Return the x that gives y."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log |det dy/dx|, (B,)."""
        y, parts = self.located(x)
        return y, parts if parts.ndim == 1 else parts.sum(dim=(1, 2))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all parameters anew from a CPU generator; nothing where there are none."""
        del generator


class Chain(Invertible):
    """Invertible layers one after the other; a squeeze may only be the first."""

    def __init__(self, layers: Iterable[Invertible]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[Invertible]:
        return cast(Iterator[Invertible], iter(self.layers))

    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Invertible.located`."""
        total: Tensor | None = None
        for layer in self:
            x, parts = layer.located(x)
            total = parts if total is None else total + parts
        assert total is not None
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        """See `Invertible.inverse`."""
        for layer in reversed(list(self)):
            y = layer.inverse(y)
        return y

    def initialise(self, generator: torch.Generator) -> None:
        """See `Invertible.initialise`."""
        for layer in self:
            layer.initialise(generator)

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """Set each actnorm by what it gets of x; return y."""
        for layer in self:
            if isinstance(layer, ActNorm):
                layer.adapt(x)
            x, _ = layer.located(x)
        return x

    @torch.no_grad()
    def folded(self) -> "Chain":
        """Return the same function with each actnorm made a part of the convolution after it."""
        layers: list[Invertible] = []
        for layer in self:
            if isinstance(layer, InvertibleConv) and layers and isinstance(layers[-1], ActNorm):
                layers.append(FoldedConv(layers.pop(), layer))
            else:
                layers.append(layer)
        return Chain(layers)


class ActNorm(Invertible):
    """An affine map of each channel, set so that the first batch has mean 0 and variance 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Become the identity, until `adapt` is called."""
        del generator
        self.bias.zero_()
        self.log_scale.zero_()

    @torch.no_grad()
    def adapt(self, maps: Tensor) -> None:
        """Set mean and variance of each channel of y, over a batch; constant ones keep scale 1."""
        std = maps.std(dim=(0, 2, 3), correction=0)  # (C,)
        self.bias.copy_(-maps.mean(dim=(0, 2, 3)))
        self.log_scale.copy_(-torch.where(std > CONSTANT, std, 1.0).log())

    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Invertible.located`; of maps only."""
        y = (x + per_channel(self.bias)) * per_channel(self.log_scale.exp())
        return y, _everywhere(self.log_scale.sum(), y)

    def inverse(self, y: Tensor) -> Tensor:
        """See `Invertible.inverse`."""
        return y * per_channel((-self.log_scale).exp()) - per_channel(self.bias)


class InvertibleConv(Invertible):
    """A 1 x 1 convolution by a matrix that is kept as its LU decomposition.

    Attributes:
        factors: (C, C): below the diagonal L, above it U, on it the log of the absolute value of
            U's diagonal. These are as many parameters as the matrix has entries.
        permutation: (C,), the row of L that row i of the matrix is.
        sign: (C,), of U's diagonal; it stays as it was drawn.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(channels, channels))
        self.register_buffer("permutation", torch.arange(channels))
        self.register_buffer("sign", torch.ones(channels))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw a rotation, whose log-determinant is 0."""
        C = len(self.sign)
        drawn = torch.randn(C, C, generator=generator, dtype=torch.float64)
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(drawn).Q)
        diagonal = upper.diagonal()
        factors = lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag()
        self.factors.copy_(factors)
        self.permutation.copy_(permutation.argmax(dim=1))
        self.sign.copy_(diagonal.sign())

    def triangles(self) -> tuple[Tensor, Tensor]:
        """Return L and U, (C, C) each."""
        lower = self.factors.tril(-1) + torch.eye(len(self.sign), device=self.sign.device)
        diagonal = self.sign * self.factors.diagonal().exp()
        return lower, self.factors.triu(1) + diagonal.diag()

    def matrix(self) -> Tensor:
        """Return W, (C, C)."""
        lower, upper = self.triangles()
        return (lower @ upper)[self.permutation]

    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Invertible.located`; of maps only."""
        parts = _everywhere(self.factors.diagonal().sum(), x)
        if parts.numel() >= len(self.sign):
            return F.conv2d(x, _kernel(self.matrix())), parts
        # For few positions the product of the triangles would be most of the work.
        lower, upper = self.triangles()
        y = F.conv2d(F.conv2d(x, _kernel(upper)), _kernel(lower))
        return y[:, self.permutation], parts

    def inverse(self, y: Tensor) -> Tensor:
        """See `Invertible.inverse`."""
        lower, upper = self.triangles()
        columns = rearrange(y, "b c h w -> c (b h w)")[self.permutation.argsort()]
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(upper, columns, upper=True)
        return rearrange(columns, "c (b h w) -> b c h w", b=len(y), h=y.shape[2])


class FoldedConv(Invertible):
    """An actnorm and the 1 x 1 convolution after it as a single convolution, for graphs."""

    kernel: Tensor
    bias: Tensor
    log_det: Tensor

    def __init__(self, norm: Invertible, convolution: InvertibleConv) -> None:
        super().__init__()
        assert isinstance(norm, ActNorm)
        weight = convolution.matrix() * norm.log_scale.exp()  # (C, C)
        self.register_buffer("kernel", _kernel(weight))
        self.register_buffer("bias", weight @ norm.bias)
        log_det = convolution.factors.diagonal().sum() + norm.log_scale.sum()
        self.register_buffer("log_det", log_det)

    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Invertible.located`; of maps only."""
        return F.conv2d(x, self.kernel, self.bias), _everywhere(self.log_det, x)

    def inverse(self, y: Tensor) -> Tensor:
        """See `Invertible.inverse`."""
        kernel = torch.linalg.inv(self.kernel[..., 0, 0])  # (C, C)
        return F.conv2d(y - per_channel(self.bias), _kernel(kernel))


class Permutation(Invertible):
    """Channels in another order, drawn once and fixed; of maps and of vectors."""

    order: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(channels))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw the order."""
        self.order.copy_(torch.randperm(len(self.order), generator=generator))

    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Invertible.located`."""
        return x[:, self.order], torch.zeros_like(x[:, 0])

    def inverse(self, y: Tensor) -> Tensor:
        """See `Invertible.inverse`."""
        return y[:, self.order.argsort()]


class Squeeze(Invertible):
    """Each square of 2 x 2 positions becomes one, with four times the channels."""

    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Invertible.located`; (B, C, H, W) to (B, 4C, H / 2, W / 2)."""
        y = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        return y, torch.zeros_like(y[:, 0])

    def inverse(self, y: Tensor) -> Tensor:
        """See `Invertible.inverse`."""
        return rearrange(y, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


def standard_normal(latents: Tensor) -> Tensor:
    """Return the negative log-density at each position, (B, H, W), of latents (B, C, H, W)."""
    return 0.5 * (latents.square().sum(dim=1) + latents.shape[1] * math.log(2 * math.pi))


def per_channel(values: Tensor) -> Tensor:
    """Return values (C,) as they are broadcast over maps, (1, C, 1, 1)."""
    return rearrange(values, "c -> 1 c 1 1")


def _kernel(matrix: Tensor) -> Tensor:
    return rearrange(matrix, "r c -> r c 1 1")


def _everywhere(value: Tensor, maps: Tensor) -> Tensor:
    return torch.zeros_like(maps[:, 0]) + value  # (B, H, W)
