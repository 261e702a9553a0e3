"""Which boxes count, what their masks score, and the map that the best of them make."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from models.methods.saa.networks import Proposals


@dataclass(frozen=True)
class BoxRules:
    """Which proposals are kept; all rules of one prompt.

    Attributes:
        box_threshold: of a box's best token score, which must be higher.
        text_threshold: of the token scores of the words that a box is taken for.
        max_area: a box's area, as a share of the image, must be lower; infinite for any.
        filter_word: what a box is taken for must not contain it; "" for no such rule.
    """

    box_threshold: float
    text_threshold: float
    max_area: float
    filter_word: str = ""

    def kept(self, proposals: Proposals) -> tuple[Tensor, Tensor]:
        """Return boxes (R, 4) and their scores (R,), the best token score of each."""
        areas = box_areas(proposals.boxes)
        scores = proposals.token_scores.amax(dim=1)  # (Q,)
        keep = (scores > self.box_threshold) & (areas < self.max_area) & (areas > 0)
        if self.filter_word:
            fitting = (proposals.token_scores > self.text_threshold).tolist()
            taken_for = [phrase(proposals.pieces, chosen) for chosen in fitting]
            allowed = [self.filter_word not in words for words in taken_for]
            keep = keep & torch.tensor(allowed, dtype=torch.bool, device=keep.device)
        return proposals.boxes[keep], scores[keep]


def phrase(pieces: Sequence[str], chosen: Sequence[bool]) -> str:
    """Return the words that the chosen tokens make; the first token begins every text, unread."""
    read = [piece for piece, is_chosen in zip(pieces, chosen, strict=True) if is_chosen]
    if chosen and chosen[0]:
        read = read[1:]
    return " ".join(read).replace(" ##", "")


def box_areas(boxes: Tensor) -> Tensor:
    """Return the areas (R,) of boxes (R, 4), as shares of the image."""
    return boxes[:, 2] * boxes[:, 3]


def rescored(scores: Tensor, masks: Tensor, saliency: Tensor, weight: float) -> Tensor:
    """Return score * exp(weight * mean saliency inside the mask), (R,).

    Args:
        scores: (R,), of the boxes.
        masks: (R, S, S), bool; the score of an empty one stays what it is.
        saliency: (S, S).
        weight: 3 in the released code.
    """
    inside = masks.to(saliency.dtype)
    sums = einsum(inside, saliency, "r h w, h w -> r")
    sizes = reduce(inside, "r h w -> r", "sum")
    return scores * (weight * sums / sizes.clamp(min=1)).exp()


def best(scores: Tensor, masks: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Return scores and masks of the regions that score highest; of equals, the earlier.

    Args:
        scores: (R,).
        masks: (R, S, S).
        count: how many; None for all, as they come.
    """
    if count is None:
        return scores, masks
    order = scores.sort(descending=True, stable=True).indices[:count]
    return scores[order], masks[order]


def region_map(scores: Tensor, masks: Tensor) -> Tensor:
    """Return at each pixel the scores of the masks that cover it, summed, over one more than those.

    Args:
        scores: (R,).
        masks: (R, S, S), bool.

    Returns:
        (S, S) float32, 0 where there is no mask.
    """
    covering = masks.to(scores.dtype)
    total = einsum(covering, scores, "r h w, r -> h w")
    return total / (1 + reduce(covering, "r h w -> h w", "sum"))


def corners(boxes: Tensor) -> Tensor:
    """Return left, top, right and bottom (R, 4) of boxes (R, 4) of centre, width and height."""
    centres, sizes = boxes.split(2, dim=1)
    return rearrange([centres - sizes / 2, centres + sizes / 2], "e r c -> r (e c)")  # (R, 4)
