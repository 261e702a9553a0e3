"""What AnomalyNCD is trained by: contrasts, labels, and one view that teaches the other.

Source: AnomalyNCD (CVPR 2025), its released code, which follows "Parametric Classification for
Generalized Category Discovery" (Wen et al., ICCV 2023).

| paper | here | meaning |
| --- | --- | --- |
| z | cosines | of the class token and the kinds' directions, (heads, 2, B, K) |
| q | target | what one view of a piece without a label teaches the other, (heads, 2, n, K) |
| tau | temperature | of a softmax |
| w | normality | how far a piece is drawn to the normal kind, 0 to the threshold |
| D_h, R_h | distillation, evenness | of one head: agreement of views, and of kinds' shares |
| G_h | unlabelled | D_h + entropy_weight R_h, by which a head is chosen without labels |

The kinds are the labelled ones, then the new ones; the first new one is the normal one. Of B pieces
the labelled ones come first. The axis of length 2 holds the two views.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

STUDENT_TEMPERATURE = 0.1
"""Of all predictions that are not a target."""
PAIR_TEMPERATURE = 1.0
KIND_TEMPERATURE = 0.07


@dataclass(frozen=True)
class Losses:
    """Of one step.

    Attributes:
        loss: (), what is minimised.
        unlabelled: (heads,), each head's loss on pieces without labels.
        supervised: (), the classifiers' mean cross-entropy on labelled pieces.
        pairs: (), contrast of the two views of each piece.
        kinds: (), contrast of labelled pieces of one kind.
    """

    loss: Tensor
    unlabelled: Tensor
    supervised: Tensor
    pairs: Tensor
    kinds: Tensor

    def detached(self) -> "Losses":
        """Return the same without a graph."""
        return Losses(*(getattr(self, entry.name).detach() for entry in fields(self)))


def batch_losses(
    projections: Tensor,
    cosines: Tensor,
    kinds: Tensor,
    normality: Tensor,
    *,
    labelled_kinds: int,
    teacher_temperature: float,
    sup_weight: float,
    entropy_weight: float,
) -> Losses:
    """Return all losses of a batch of B pieces, n_l of them labelled, n_u not, at least one each.

    Args:
        projections: (2, B, P), of any length.
        cosines: (heads, 2, B, K).
        kinds: (n_l,) int64, below `labelled_kinds`.
        normality: (n_u,); see `normality_of`.
        labelled_kinds: of the K.
        teacher_temperature: of the targets.
        sup_weight: share of the labelled losses in the total.
        entropy_weight: of the evenness.
    """
    n_l = len(kinds)
    labelled, others = cosines[:, :, :n_l], cosines[:, :, n_l:]
    target = soft_targets(others.detach(), normality, labelled_kinds, teacher_temperature)
    unlabelled = distillation(target, others) + entropy_weight * evenness(others)  # (heads,)
    supervised = cross_entropy(labelled, kinds)
    pairs = contrast_of_pairs(projections)
    by_kind = contrast_of_kinds(projections[:, :n_l], kinds)
    total = (1 - sup_weight) * (unlabelled.mean() + pairs) + sup_weight * (supervised + by_kind)
    return Losses(total, unlabelled, supervised, pairs, by_kind)


def normality_of(scores: Tensor, threshold: float | None) -> Tensor:
    """Return how far pieces are drawn to the normal kind: what their scores lack of the threshold.

    Args:
        scores: (n,), 0 to 1.
        threshold: None draws no piece.

    Returns:
        (n,), 0 to the threshold.
    """
    if threshold is None:
        return torch.zeros_like(scores)
    return (threshold - scores).clamp_min(0)


def soft_targets(
    cosines: Tensor, normality: Tensor, labelled_kinds: int, temperature: float
) -> Tensor:
    """Return what each view teaches: new kinds alone, sharpened, and corrected to the normal one.

    Args:
        cosines: (heads, 2, n, K).
        normality: (n,), 0 to 1.
        labelled_kinds: whose share is 0.
        temperature: of the softmax.

    Returns:
        (heads, 2, n, K), which sums to 1.
    """
    new = cosines[..., labelled_kinds:]
    # A softmax over all, cut and rescaled to a sum of 1, is one over the rest.
    shares = F.softmax(new / temperature, dim=-1)  # (heads, 2, n, U)
    normal = torch.zeros_like(shares)
    normal[..., 0] = 1
    weight = rearrange(normality, "n -> n 1").to(shares.dtype)
    return F.pad(weight * normal + (1 - weight) * shares, (labelled_kinds, 0))


def distillation(target: Tensor, cosines: Tensor) -> Tensor:
    """Return the cross-entropy of each view's target with the other view's prediction.

    Args:
        target: (heads, 2, n, K), without a graph.
        cosines: (heads, 2, n, K).

    Returns:
        (heads,), the mean over pieces and both directions.
    """
    predicted = F.log_softmax(cosines / STUDENT_TEMPERATURE, dim=-1)
    return -(target * predicted.flip(1)).sum(dim=-1).mean(dim=(1, 2))


def evenness(cosines: Tensor) -> Tensor:
    """Return how far the mean prediction is from all kinds alike, labelled ones among them.

    It is log K less the entropy of the mean: 0 where all K have the same share, at most log K.

    Args:
        cosines: (heads, 2, n, K).

    Returns:
        (heads,).
    """
    shares = F.softmax(cosines / STUDENT_TEMPERATURE, dim=-1).mean(dim=(1, 2))  # (heads, K)
    return torch.special.xlogy(shares, shares).sum(dim=-1) + math.log(shares.shape[-1])


def cross_entropy(cosines: Tensor, kinds: Tensor) -> Tensor:
    """Return the mean over heads (heads, 2, n, K), views and pieces of that with kinds (n,)."""
    heads = len(cosines)
    rows = rearrange(cosines / STUDENT_TEMPERATURE, "h v n k -> (h v n) k")
    return F.cross_entropy(rows, repeat(kinds, "n -> (h v n)", h=heads, v=2))


def contrast_of_pairs(projections: Tensor) -> Tensor:
    """Return InfoNCE: each view of a piece tells its other view from all else in the batch.

    Args:
        projections: (2, B, P), of any length.

    Returns:
        (), the mean over the 2B views.
    """
    B = projections.shape[1]
    likeness = _likeness(projections, PAIR_TEMPERATURE)  # (2B, 2B)
    other_view = torch.arange(2 * B, device=likeness.device).roll(B)
    return F.cross_entropy(likeness, other_view)


def contrast_of_kinds(projections: Tensor, kinds: Tensor) -> Tensor:
    """Return SupCon: each view of a labelled piece tells those of its kind from all else.

    Args:
        projections: (2, n, P), of any length.
        kinds: (n,).

    Returns:
        (), the mean over the 2n views; 0 for a single piece.
    """
    n = len(kinds)
    logs = F.log_softmax(_likeness(projections, KIND_TEMPERATURE), dim=-1)  # (2n, 2n)
    both = repeat(kinds, "n -> (v n)", v=2)
    itself = torch.eye(2 * n, dtype=torch.bool, device=logs.device)
    alike = (both[:, None] == both[None]) & ~itself  # (2n, 2n), never an empty row
    return -(logs.masked_fill(~alike, 0).sum(dim=1) / alike.sum(dim=1)).mean()


def _likeness(projections: Tensor, temperature: float) -> Tensor:
    """Return the cosines of all views over a temperature, (2n, 2n), -inf with themselves."""
    units = F.normalize(rearrange(projections, "v n p -> (v n) p"), dim=-1)
    cosines = units @ units.T / temperature
    itself = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    return cosines.masked_fill(itself, -torch.inf)
