"""MGViT: a vision transformer whose class token looks only at what is inside a mask.

Source: "AnomalyNCD: Towards Novel Anomaly Class Discovery in Industrial Scenarios" (Huang et al.,
CVPR 2025), the mask-guided attention of its section 3, as its released code has it.

| paper | here | meaning |
| --- | --- | --- |
| M bar | visible | patches that the class token sees: half of one or more is inside the mask |
| L | mask_layers | last blocks that are guided by it |

Patches see all others in every block. With an empty mask the class token sees itself alone in the
guided blocks: what it knows of the image is from the blocks before.
"""

import difflib
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from models.backbone.weights import complete_state, options_for_any_size, state_digest
from models.errors import ModelError

LEAST_INSIDE = 0.5
"""Share of a patch inside the mask from which it is visible."""
RANDOM = "RANDOM BACKBONE WEIGHTS (weights random): what is found with them measures no method."


class MaskGuidedViT(nn.Module):
    """A timm vision transformer of which the last blocks are trained, the rest frozen.

    Parameters and `state_dict` are those of the trained blocks; all else moves with `to`.

    Args:
        backbone: a timm model name.
        weights: "auto", a .safetensors or .pth file, or "random": always the same random numbers.
        image_size: side of the images in pixels; position embeddings are resampled to it.
        mask_layers: last blocks that are guided by the mask.
        trained_blocks: last blocks that are trained.

    Raises:
        ModelError: no such backbone or no plain vision transformer, sizes that do not fit it, or
            weights that cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: str, weights: str, image_size: int, *, mask_layers: int, trained_blocks: int
    ) -> None:
        super().__init__()
        net, self.weights_source = _load(backbone, weights)
        self.random_weights = weights == "random"
        self.weights_digest = state_digest(net)
        depth = len(net.blocks)
        for name, count in (("mask_layers", mask_layers), ("trained_blocks", trained_blocks)):
            if count > depth:
                raise ModelError(
                    f"{backbone} has {depth} blocks, fewer than {name.replace('_', ' ')}, {count}",
                    {name: f"at most {depth}"},
                )
        self.patch_size = int(net.patch_embed.patch_size[0])
        if image_size % self.patch_size:
            raise ModelError(
                f"{backbone} takes images whose side is a multiple of {self.patch_size} pixels, "
                f"not {image_size}",
                {"image_size": str(max(1, image_size // self.patch_size) * self.patch_size)},
            )
        self.width = int(net.embed_dim)
        self.num_tokens = 1 + (image_size // self.patch_size) ** 2
        self.first_guided = depth - mask_layers
        self.first_trained = depth - trained_blocks
        blocks = list(net.blocks)
        self.trained = nn.ModuleList(blocks[self.first_trained :])
        net.blocks = nn.Sequential(*blocks[: self.first_trained])
        # In a tuple, so that its weights are no part of what is trained and saved.
        self._frozen = (net.requires_grad_(False).eval(),)
        # Of the trained blocks, before training.
        self._pretrained = {k: v.clone() for k, v in self.trained.state_dict().items()}
        config: Any = timm.get_pretrained_cfg(backbone)
        for name in ("mean", "std"):
            shaped = rearrange(torch.tensor(getattr(config, name)), "c -> 1 c 1 1")
            self.register_buffer(name, shaped, persistent=False)
        if self.random_weights:
            warnings.warn(RANDOM, stacklevel=2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskGuidedViT":
        """Move the frozen part as well, as `to` does with the rest."""
        self._frozen[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def restore(self) -> None:
        """Give the trained blocks the weights that they had before any training."""
        self.trained.load_state_dict(self._pretrained)

    def visible(self, masks: Tensor) -> Tensor:
        """Return which tokens the class token sees.

        Args:
            masks: (B, 1, S, S), uint8, 255 inside; values between are shares.

        Returns:
            (B, N) bool, N = 1 + patches; the class token always sees itself.
        """
        shares = F.avg_pool2d(masks.float() / 255, self.patch_size)  # (B, 1, rows, columns)
        patches = rearrange(shares, "b 1 h w -> b (h w)") >= LEAST_INSIDE
        return F.pad(patches, (1, 0), value=True)  # (B, N)

    @torch.no_grad()
    def frozen_tokens(self, images: Tensor, visible: Tensor) -> Tensor:
        """Run all blocks that are not trained.

        Args:
            images: (B, 3, S, S) uint8.
            visible: (B, N) bool.

        Returns:
            Tokens (B, N, D), the class token first, without a graph.
        """
        (net,) = self._frozen
        pixels = (images.float() / 255 - self.mean) / self.std
        tokens = net.norm_pre(net._pos_embed(net.patch_embed(pixels)))  # (B, N, D)
        for i, block in enumerate(net.blocks):
            tokens = block(tokens) if i < self.first_guided else guided(block, tokens, visible)
        return tokens

    def class_token(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Run the trained blocks and the final norm.

        Args:
            tokens: (B, N, D) of `frozen_tokens`.
            visible: (B, N) bool.

        Returns:
            (B, D).
        """
        (net,) = self._frozen
        for i, block in enumerate(self.trained, start=self.first_trained):
            if i + 1 == self.first_trained + len(self.trained):
                # Nothing reads what the last block makes of the patches.
                seen = visible if i >= self.first_guided else None
                tokens = guided(block, tokens, seen, only_class=True)  # (B, 1, D)
            else:
                tokens = block(tokens) if i < self.first_guided else guided(block, tokens, visible)
        return net.fc_norm(net.norm(tokens[:, 0]))

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return class tokens (B, D) of images (B, 3, S, S) and masks (B, 1, S, S), uint8."""
        visible = self.visible(masks)
        return self.class_token(self.frozen_tokens(images, visible), visible)


def guided(
    block: nn.Module, tokens: Tensor, visible: Tensor | None, *, only_class: bool = False
) -> Tensor:
    """Run a timm block whose class token sees only some tokens.

    Args:
        block: a `Block` of timm; its own layers are used, dropout and layer scale among them.
        tokens: (B, N, D), the class token first.
        visible: (B, N) bool, which tokens it sees; None for all.
        only_class: return the class token alone, which costs a fraction.

    Returns:
        (B, N, D), or (B, 1, D).
    """
    parts: Any = block
    attended = _attend(parts.attn, parts.norm1(tokens), visible, only_class=only_class)
    kept = tokens[:, :1] if only_class else tokens
    kept = kept + parts.drop_path1(parts.ls1(attended))
    return kept + parts.drop_path2(parts.ls2(parts.mlp(parts.norm2(kept))))


def _attend(attn: Any, tokens: Tensor, visible: Tensor | None, *, only_class: bool) -> Tensor:
    """Return what a timm `Attention` makes of normalised tokens; see `guided`."""
    asking = tokens[:, :1] if only_class else tokens
    inner = attn.qkv.out_features // 3
    weight, bias = attn.qkv.weight, attn.qkv.bias
    split = "b n (parts h d) -> parts b h n d"
    (query,) = rearrange(
        F.linear(asking, weight[:inner], None if bias is None else bias[:inner]),
        split,
        parts=1,
        h=attn.num_heads,
    )  # (B, heads, asking, d)
    key, value = rearrange(
        F.linear(tokens, weight[inner:], None if bias is None else bias[inner:]),
        split,
        parts=2,
        h=attn.num_heads,
    )  # (B, heads, N, d)
    query, key = attn.q_norm(query), attn.k_norm(key)
    dropout = attn.attn_drop.p if attn.training else 0.0
    # The one row that is masked is attended to by itself: no N x N mask, and the fast kernels for
    # all other rows.
    seen = None if visible is None else rearrange(visible, "b n -> b 1 1 n")
    found = F.scaled_dot_product_attention(
        query[:, :, :1], key, value, attn_mask=seen, dropout_p=dropout
    )
    if not only_class:
        others = F.scaled_dot_product_attention(query[:, :, 1:], key, value, dropout_p=dropout)
        found = torch.cat([found, others], dim=2)  # (B, heads, N, d)
    joined = rearrange(found, "b h n d -> b n (h d)")
    # The two parts that timm's older versions do not have.
    if hasattr(attn, "norm"):
        joined = attn.norm(joined)
    if getattr(attn, "gate", None) is not None:
        joined = joined * attn.gate(asking).sigmoid()
    return attn.proj_drop(attn.proj(joined))


def _load(backbone: str, weights: str) -> tuple[Any, str]:
    """Return the whole network without classifier, and where its weights come from."""
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone.split(".")[0], timm.list_models("*vit*"), n=5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ModelError(f"timm has no backbone {backbone!r}{hint}")
    options = {"num_classes": 0, **options_for_any_size(backbone)}
    with torch.device("meta"):
        net = timm.create_model(backbone, pretrained=False, **options)
    if reason := _no_plain_vit(net):
        raise ModelError(
            f"AnomalyNCD needs a plain vision transformer with a class token; {backbone} {reason}"
        )
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # a GPU's stays as it is
            return timm.create_model(backbone, pretrained=False, **options), "random (asked for)"
    state, source = complete_state(backbone, weights)
    names = net.state_dict().keys()
    if missing := [name for name in names if name not in state]:
        raise ModelError(f"the weights hold no numbers for {', '.join(missing)} of {backbone}")
    net.load_state_dict({name: state[name] for name in names}, assign=True)
    return net, source


def _no_plain_vit(net: nn.Module) -> str:
    """Return why a network is not of the kind that can be guided; empty where it is."""
    if not isinstance(net, VisionTransformer):
        return f"is a {type(net).__name__}"
    if net.cls_token is None:
        return "has no class token"
    if net.num_prefix_tokens != 1:
        # They would tell the class token what lies outside the mask.
        return "has register or distillation tokens beside it"
    if type(net.patch_embed) is not PatchEmbed or len(set(net.patch_embed.patch_size)) > 1:
        return "does not cut images into square patches"
    for block in net.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            return f"has blocks of another kind ({type(block).__name__})"
    return ""
