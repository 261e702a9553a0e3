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

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detector import FeatureSource
from models.backbone.extractor import FrozenExtractor
from models.training.fine_tuning import FineTunedDetector, Objective

BLUR_KERNEL = 13
"""Pixels: three standard deviations of the strongest blur to each side."""


class MeanShifted(FineTunedDetector):
    """The last stages of the backbone, trained by a contrastive loss around the mean of normals.

    Args:
        backbone: the pretrained network.
        temperature: of the contrastive loss.
        angular: whether the angular center loss is added.
        learning_rate: of SGD.
        weight_decay: of SGD.
        batch_size: images per step; each comes in two views.
        epochs: passes over the training images.
        num_neighbors: neighbours whose distances are added.
        trained_stages: stages that train, counted from the last (released: 2 of a ResNet152, all of
            a ResNet18).
        mixed_precision: train under bfloat16 autocast where a CUDA device computes in it.

    Raises:
        ModelError: see `FineTunedDetector`.
    """

    def __init__(
        self,
        backbone: FrozenExtractor,
        *,
        temperature: float = 0.25,
        angular: bool = False,
        learning_rate: float = 1e-5,
        weight_decay: float = 5e-5,
        batch_size: int = 64,
        epochs: int = 20,
        num_neighbors: int = 2,
        trained_stages: int = 2,
        mixed_precision: bool = True,
    ) -> None:
        super().__init__(
            backbone,
            learning_rate=learning_rate,
            momentum=0.0,
            weight_decay=weight_decay,
            clip_norm=None,
            batch_size=batch_size,
            epochs=epochs,
            num_neighbors=num_neighbors,
            trained_stages=trained_stages,
            mixed_precision=mixed_precision,
        )
        self.temperature = temperature
        self.angular = angular

    def embed(self, pixels: Tensor) -> Tensor:
        """Return embeddings (B, D) of unit length, float32, of normalised pixels (B, 3, S, S)."""
        return F.normalize(super().embed(pixels), dim=1)

    def objective(self, bank: FeatureSource, generator: torch.Generator) -> Objective:
        """Return the mean-shifted contrastive loss of two drawn views of each image."""
        center = self.embed_bank(bank).mean(dim=0)  # (D,)
        if self.angular:
            center = F.normalize(center, dim=0)
        (example,) = next(iter(bank.batches(1)))  # (3, S, S)
        augment = build_augmentations(example.shape[1], example.shape[2])
        mean, std = self.backbone.mean, self.backbone.std

        def loss(images: Tensor) -> Tensor:
            views = draw_views(images, augment, generator)  # (2B, 3, S, S)
            embeddings = self.embed_for_training((views - mean) / std)  # (2B, D)
            total = mean_shifted_loss(embeddings, center, self.temperature)
            return total + angular_loss(embeddings, center) if self.angular else total

        return loss


def build_augmentations(height: int, width: int) -> nn.Module:
    """Return the released augmentations for images (B, 3, height, width) in 0 to 1."""
    return nn.Sequential(
        K.RandomResizedCrop((height, width), scale=(0.2, 1.0), cropping_mode="resample"),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((BLUR_KERNEL, BLUR_KERNEL), (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(p=0.5),
    )


def draw_views(images: Tensor, augment: nn.Module, generator: torch.Generator) -> Tensor:
    """Return two augmented views of each image, the first of all, then the second of all.

    Args:
        images: (B, 3, S, S), uint8.
        augment: draws its parameters from torch's global CPU generator, as kornia does.
        generator: a CPU generator that decides what is drawn; the global one stays as it was.

    Returns:
        (2B, 3, S, S) float32 in 0 to 1.
    """
    pixels = images.float() / 255
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        views = augment(torch.cat([pixels, pixels]))  # (2B, 3, S, S)
    return views.contiguous(memory_format=torch.channels_last)


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
