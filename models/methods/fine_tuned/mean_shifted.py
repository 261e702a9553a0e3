"""Mean-shifted contrastive loss: views of an image attract, seen from the mean of normal images.

Source: "Mean-Shifted Contrastive Loss for Anomaly Detection" (Reiss and Hoshen, AAAI 2023) and its
released code (talreiss/Mean-Shifted-Anomaly-Detection), which every default here is taken from: SGD
with learning rate 1e-5, no momentum, weight decay 5e-5, batches of 64, 20 epochs, temperature 0.25,
no angular center loss; conv1, bn1, layer1 and layer2 of a ResNet152 frozen; batch normalisation in
eval mode; the score is the sum of squared distances of unit vectors, 2 - 2 cos, to the 2 nearest.

| paper | here | meaning |
| --- | --- | --- |
| phi(x) | embedding | globally pooled features, scaled to unit length |
| c | center | mean of phi over the training images before training; unit length if angular |
| theta(x) | shifted | phi(x) - c, scaled to unit length |
| tau | temperature | of the contrastive loss |
| L_msc | mean_shifted_loss | contrastive loss of theta: two views of an image against the batch |
| L_angular | angular_loss | -phi(x) c, as released ||phi(x) - c||^2, the same up to a constant |

Views are those of the released code: a crop of 20 to 100 % of the area at the size of the image,
colour jitter, grayscale, blur, flip. They are drawn for a whole batch on the device, so that jitter
steps come in one order per batch; and crops are of the image the experiment cuts out, not of the
original one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.options import Fraction, NotNegative, OptionalFloat, Positive, PositiveInt
from models.detector import FeatureShape, FeatureSource
from models.method import Method
from models.methods.fine_tuned.fine_tuning import FineTunedDetector, FineTuningOptions, Objective
from models.training.augmentations import contrastive_augmentations, draw_views


@dataclass(frozen=True, kw_only=True)
class MeanShiftedOptions(FineTuningOptions):
    """Mean-shifted contrastive loss: two views of an image attract, seen from the normals' mean."""

    temperature: Positive = 0.25
    """Of the contrastive loss (paper)."""
    angular: bool = False
    """Add the angular center loss (released code: off)."""
    learning_rate: Positive = 1e-5
    """Of SGD (released code)."""
    momentum: Fraction = 0.0
    """Of SGD (released code: none)."""
    weight_decay: NotNegative = 5e-5
    """Of SGD (released code)."""
    clip_norm: OptionalFloat = None
    """Largest norm of the gradient of all parameters together; none for no limit (released)."""
    batch_size: PositiveInt = 64
    """Images per step, each in two views (released code)."""
    epochs: PositiveInt = 20
    """Passes over the training images (released code)."""
    num_neighbors: PositiveInt = 2
    """Neighbours whose distances are the score (released code)."""
    trained_stages: PositiveInt = 2
    """Stages that train, counted from the last (released code: 2 of a ResNet152, all of a
    ResNet18)."""


class MeanShifted(FineTunedDetector):
    """The last stages of the backbone, trained by a contrastive loss around the mean of normals."""

    def __init__(self, features: FeatureShape, options: MeanShiftedOptions) -> None:
        super().__init__(features, options)
        self.options = options

    def embed(self, pixels: Tensor) -> Tensor:
        """Return embeddings (B, D) of unit length, float32, of normalised pixels (B, 3, S, S)."""
        return F.normalize(super().embed(pixels), dim=1)

    def objective(self, bank: FeatureSource, generator: torch.Generator) -> Objective:
        """Return the mean-shifted contrastive loss of two drawn views of each image."""
        center = self.embed_bank(bank).mean(dim=0)  # (D,)
        if self.options.angular:
            center = F.normalize(center, dim=0)
        (example,) = next(iter(bank.batches(1)))  # (3, S, S)
        augment = contrastive_augmentations(example.shape[1], example.shape[2])
        mean, std = self.backbone.mean, self.backbone.std

        def loss(images: Tensor) -> Tensor:
            views = draw_views(images, augment, generator)  # (2B, 3, S, S)
            embeddings = self.embed_for_training((views - mean) / std)  # (2B, D)
            total = mean_shifted_loss(embeddings, center, self.options.temperature)
            return total + angular_loss(embeddings, center) if self.options.angular else total

        return loss


def mean_shifted_loss(embeddings: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of embeddings as seen from the center, a scalar.

    Args:
        embeddings: (2B, D) of unit length; row i and row B + i are views of one image.
        center: (D,).
        temperature: divides the cosines.
    """
    shifted = F.normalize(embeddings - center, dim=1)  # (2B, D)
    logits = shifted @ shifted.T / temperature  # (2B, 2B)
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    partner = torch.arange(len(logits), device=logits.device).roll(len(logits) // 2)  # (2B,)
    return F.cross_entropy(logits.masked_fill(itself, -torch.inf), partner)


def angular_loss(embeddings: Tensor, center: Tensor) -> Tensor:
    """Return the mean squared distance to the center, summed over the two views, as released.

    Args:
        embeddings: (2B, D) of unit length.
        center: (D,) of unit length.
    """
    return 2 * (embeddings - center).square().sum(dim=1).mean()


METHOD = Method(
    detector=lambda: MeanShifted,
    options=MeanShiftedOptions(),
    tasks=frozenset({"semantic"}),
    takes=frozenset({"images"}),
    published_as="MS",
)
