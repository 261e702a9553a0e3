"""The focal loss: cross-entropy that leaves alone what is told right already."""

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits: Tensor, masks: Tensor, *, gamma: float) -> Tensor:
    """Return the mean of -(1 - p)^gamma log p, p being the probability of a pixel's true class.

    Source: "Focal Loss for Dense Object Detection" (Lin et al., ICCV 2017), equation 4.

    Args:
        logits: (B, 2, H, W): normal, anomalous.
        masks: (B, H, W) bool: where it is anomalous.
        gamma: 0 is the cross-entropy; at least 1 otherwise, for a finite slope at p = 1.
    """
    log_both = F.log_softmax(logits.float(), dim=1)  # (B, 2, H, W)
    log_true = torch.where(masks, log_both[:, 1], log_both[:, 0])  # (B, H, W)
    # 1 - p by expm1: near p = 1 the difference would lose its digits.
    return -((-torch.expm1(log_true)) ** gamma * log_true).mean()
