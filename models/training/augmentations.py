"""Augmented views of images, drawn for a whole batch on the device, from an explicit generator."""

import kornia.augmentation as K
import torch
from torch import Tensor, nn

BLUR_KERNEL = 13
"""Pixels: three standard deviations of the strongest blur to each side."""


def contrastive_augmentations(height: int, width: int) -> nn.Module:
    """Return those of mean-shifted's released code, for images (B, 3, height, width) in 0 to 1."""
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
