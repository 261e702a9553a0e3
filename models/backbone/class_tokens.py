"""The class token of a transformer's blocks, in place of maps of its patches."""

import inspect
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from models.errors import ModelError


class ClassTokens(nn.Module):
    """A timm feature network that gives each block's class token as a 1 x 1 map.

    Tokens are as the block leaves them, as its maps are: the network's last norm comes after.

    Args:
        net: what `timm.create_model(..., features_only=True)` makes of a transformer.
        backbone: its name, for messages.

    Raises:
        ModelError: it has no class token.
    """

    def __init__(self, net: nn.Module, backbone: str) -> None:
        super().__init__()
        model = getattr(net, "model", None)
        method = getattr(model, "forward_intermediates", None)
        gives_tokens = method is not None and (
            "return_prefix_tokens" in inspect.signature(method).parameters
        )
        if not gives_tokens or getattr(model, "cls_token", None) is None:
            raise ModelError(f"{backbone} has no class token: use --pool mean")
        self.net = net
        self.feature_info = net.feature_info

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return one (B, C_l, 1, 1) map per block, of images (B, 3, S, S)."""
        net: Any = self.net
        found = net.model.forward_intermediates(
            pixels,
            indices=net.out_indices,
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return [rearrange(tokens[:, 0], "b c -> b c 1 1") for _, tokens in found]
