"""The generator of anomalous features: Gaussian noise on normal ones.

Source: SimpleNet (CVPR 2023), section 3.3. Used in training only.
"""

import torch
from torch import Tensor

from models.training.generators import derived


class GaussianNoise:
    """Adds independent noise of one standard deviation to every entry.

    The noise has a generator of its own, on the device it is used on, seeded by one number of the
    generator given: a step costs no copy from the host, the same seed gives the same noise on the
    same kind of device, and the training images come in the same order whatever the noise is.

    Args:
        sigma: standard deviation of the noise, above 0.
        generator: a CPU generator; it advances by one draw.
        device: where the noise is made.
    """

    def __init__(
        self, sigma: float, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> None:
        self.sigma = sigma
        self.generator = derived(generator, device)

    def __call__(self, adapted: Tensor) -> Tensor:
        """Return noisy features (P, C) of adapted features (P, C), which stay as they are."""
        noisy = torch.empty_like(adapted).normal_(0, self.sigma, generator=self.generator)
        return noisy.add_(adapted)  # in place: no third array of this size
