"""Products of float32 matrices, by the faster of the two libraries PyTorch has for x86 processors.

PyTorch gives products to MKL, which uses half of the vector width of processors that are not
Intel's, and convolutions to oneDNN, which uses all of it. A product is a convolution of 1 x 1
pixels. On an AMD EPYC (Zen 5) that is about twice as fast, with the same rounding errors.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

FEW_ROWS = 512
"""Below, preparing a convolution takes longer than it saves."""
ON_A_GPU = 16
"""How many times as much is computed at once on a GPU as a CPU's cache has room for. There a block
costs the start of its kernels, not a way to main memory; the suite's largest blocks for a CPU, of
2**23 numbers, are half a gigabyte then. Chosen for that size: its speed was not measured."""


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(rows, weight, bias)`.

    The first call with new sizes takes half a millisecond more: callers keep to few.

    Args:
        rows: (P, C); copied unless contiguous.
        weight: (R, C).
        bias: (R,).

    Returns:
        (P, R).
    """
    if not _convolves(rows):
        return F.linear(rows, weight, bias)
    product = F.conv2d(_image(rows), rearrange(weight, "r c -> r c 1 1"), bias)
    return rearrange(product, "b r p 1 -> (b p) r")


class Linear(nn.Linear):
    """A fully connected layer whose product, and those of its gradient, are by `linear`."""

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (P, C) to (P, R)."""
        return linear(rows, self.weight, self.bias)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left' right to sums (R, C), for left (P, R) and right (P, C)."""
    if not _convolves(right):
        sums.addmm_(left.T, right)
        return
    shape = (*sums.shape, 1, 1)
    product = conv2d_weight(_image(right), shape, _image(left))  # (R, C, 1, 1)
    sums += rearrange(product, "r c 1 1 -> r c")


def at_once(amount: int, device: torch.device) -> int:
    """Return how much to compute at once on a device, by what is right for a CPU's cache.

    Args:
        amount: for a CPU: entries of a product, or rows or channels that go into one.
        device: where it is computed.
    """
    return amount if device.type == "cpu" else ON_A_GPU * amount


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32, whatever TF32, bfloat16 or autocast allow outside."""
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before PyTorch 2.9
            allowed = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(allowed)
            return
        # Not the older calls: they raise where the user has set these.
        onednn = torch.backends.mkldnn
        settings = [torch.backends.cuda.matmul, onednn.matmul, onednn.conv]  # type: ignore[attr-defined]
        chosen = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            for setting, precision in zip(settings, chosen, strict=True):
                setting.fp32_precision = precision


def set_fp32(mode: str) -> None:
    """Let CUDA compute float32 products and convolutions in "ieee" or "tf32".

    PyTorch begins with "tf32" for convolutions: ten bits of each factor.
    """
    # The older names, which keep the newer ones in step; the other way round PyTorch has no answer
    # any more to who asks by the older ones, as its exporter does.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode == "tf32"


def fp32_settings() -> list[str]:
    """Return how CUDA computes float32 products and convolutions: "ieee" or "tf32" each."""
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(cuda, "fp32_precision"):
        found = cuda.fp32_precision, cudnn.conv.fp32_precision
        return ["tf32" if one == "tf32" else "ieee" for one in found]
    return ["tf32" if allowed else "ieee" for allowed in (cuda.allow_tf32, cudnn.allow_tf32)]


def _convolves(rows: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # an exported graph may not depend on sizes
        and rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and len(rows) >= FEW_ROWS
        and len(rows) % _images() == 0
        # Elsewhere products have a library of their own.
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


def _image(rows: Tensor) -> Tensor:
    """Return rows (P, C) as images of one column, channels last in memory, (B, C, P / B, 1)."""
    # `reshape` gives axes of size 1 strides by which PyTorch sees that channels are last; einops
    # does not, and what follows would copy.
    images = _images()
    return rows.reshape(images, len(rows) // images, 1, -1).permute(0, 3, 1, 2)


def _images() -> int:
    """Return the least number of images of which PyTorch gives such convolutions to oneDNN."""
    return 16 if torch.get_num_threads() == 1 else 1
