"""SSPCAB: a block for other networks that predicts each position from some way around it.

Source: "Self-Supervised Predictive Convolutional Attentive Block for Anomaly Detection" (Ristea et
al., CVPR 2022) and its released code. A kernel whose middle is masked: only its four corners,
each `kernel` x `kernel`, are convolved, `dilation` + 1 away from the position that is predicted.
What differs from its prediction is hard to predict, which a network with the block in it is
trained on too, by the mean squared difference of the block's input and output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sspcab(nn.Module):
    """The block: masked convolution, ReLU, then squeeze and excitation; shapes stay.

    Args:
        channels: of its input and output.
        kernel: side of each corner, k' (paper: 1).
        dilation: of the masked kernel, d (paper: 1).
        reduction: of the channels between squeeze and excitation, r (paper: 8).
    """

    def __init__(
        self, channels: int, *, kernel: int = 1, dilation: int = 1, reduction: int = 8
    ) -> None:
        super().__init__()
        self.padding = kernel + dilation
        self.border = kernel + 2 * dilation + 1
        self.corners = nn.ModuleList(nn.Conv2d(channels, channels, kernel) for _ in range(4))
        hidden = max(1, channels // reduction)
        self.excitation = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def predict(self, features: Tensor) -> Tensor:
        """Return what each position of features (B, C, H, W) is predicted to be, the same shape.

        It does not depend on the position itself.
        """
        padded = F.pad(features, [self.padding] * 4)
        near, far = slice(None, -self.border), slice(self.border, None)
        places = ((near, near), (far, near), (near, far), (far, far))
        parts = [
            corner(padded[:, :, rows, columns])
            for corner, (rows, columns) in zip(self.corners, places, strict=True)
        ]
        return F.relu(torch.stack(parts).sum(dim=0))  # (B, C, H, W)

    def forward(self, features: Tensor) -> Tensor:
        """Return the predictions, each channel weighted by what all of them are on average."""
        predicted = self.predict(features)
        weights = self.excitation(predicted.mean(dim=(2, 3)))  # (B, C)
        return predicted * weights[:, :, None, None]
