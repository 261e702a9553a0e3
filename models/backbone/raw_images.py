"""What stands in the extractor's place for methods that train a backbone themselves."""

from typing import Any

import torch
from torch import Tensor, nn

from models.backbone.extractor import FrozenExtractor
from models.features.multiscale import join_stages


class RawImages(nn.Module):
    """Passes images on as they are, so that a feature bank holds decoded images.

    The bank decodes every image once, whatever the number of epochs, and all that follows it is
    the same for methods on features and methods on images.

    Args:
        network: the frozen backbone such a method starts from; None where it brings its own.
    """

    _place: Tensor

    def __init__(self, network: FrozenExtractor | None) -> None:
        super().__init__()
        self.network = network
        self.stage_channels: tuple[int, ...] = (3,)
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the images go, and where the heads are."""
        return self._place.device

    @property
    def random_weights(self) -> bool:
        """Whether the backbone's weights are random because that was asked for."""
        return self.network is not None and self.network.random_weights

    @property
    def weights_digest(self) -> str:
        """Short hash of the backbone's weights; empty where there is none."""
        return "" if self.network is None else self.network.weights_digest

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Return the uint8 images (B, 3, S, S), alone in a list."""
        return [images.to(self.device)]

    def fingerprint(self) -> dict[str, Any]:
        """Return what the stored images depend on beside themselves: nothing."""
        return {}

    @staticmethod
    def assemble(maps: list[Tensor]) -> Tensor:
        """Return the images (B, 3, S, S) that `stage_maps` returned, still uint8."""
        return join_stages(maps)
