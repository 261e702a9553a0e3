"""MemSeg as one graph for export."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from models.detector import Scored

if TYPE_CHECKING:
    from models.methods.memseg.memseg import Memseg


class Exported(nn.Module):
    """`Memseg` with its memories as they are compared.

    Args:
        detector: fitted.
        memories: of the stages, (M, H_l * W_l * C_l).
    """

    def __init__(self, detector: "Memseg", memories: Sequence[Tensor]) -> None:
        super().__init__()
        self.detector = detector
        self.memories = nn.ParameterList(nn.Parameter(one, requires_grad=False) for one in memories)

    def forward(self, images: Tensor) -> Scored:
        """Return maps (B, S, S) and scores (B,) of uint8 images (B, 3, S, S)."""
        return self.detector.scored(images, list(self.memories))
