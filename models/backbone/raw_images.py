"""What stands in the backbone's place for methods that take the images themselves."""

from typing import Any

import torch
from torch import Tensor

from models.backbone.extractor import FrozenExtractor
from models.detector import Extractor


class RawImages(Extractor):
    """Passes images on as they are, so that a feature bank holds decoded images.

    The bank decodes every image once, whatever the number of epochs, and all that follows it is
    the same for methods on features and methods on images.

    Args:
        network: the frozen backbone such a method starts from or compares with; None where it
            brings its own.
        features: the frozen backbone whose features are taken too, before the images, for methods
            that take both; None where only images are.
    """

    _place: Tensor

    def __init__(
        self, network: FrozenExtractor | None, features: FrozenExtractor | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.features = features
        of_features = () if features is None else features.stage_channels
        self.stage_channels: tuple[int, ...] = (*of_features, 3)
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def channels(self) -> int:
        """Channels of the features where they are taken, else 3."""
        return 3 if self.features is None else self.features.channels

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
        """Return the features where they are taken, and the uint8 images (B, 3, S, S) last."""
        maps = [] if self.features is None else self.features.stage_maps(images)
        return [*maps, images.to(self.device)]

    def fingerprint(self) -> dict[str, Any]:
        """Return what the features depend on, where they are taken; images depend on nothing."""
        if self.features is None:
            return {}
        return self.features.fingerprint() | {"images": True}
