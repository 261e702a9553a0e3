"""A finished detector as one network: uint8 images in, scores and maps out, for export."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.backbone.extractor import FrozenExtractor, channels_first
from models.backbone.raw_images import RawImages
from models.backbone.rewriting import accelerated
from models.deployment.memory import normalised_pixels
from models.detector import Detector, Extractor, Scored


class Deployed(nn.Module):
    """Normalisation, backbone, patch averaging, head, upsampling and blur in one network.

    Stages' maps are rounded to float16 and back, as stored features are, so that scores are those
    of the run. Everything else is float32, the two products of upsampling and blur included
    (float64 in training): not every runtime has float64.

    Args:
        extractor: of the run; its `precision` is not applied.
        detector: fitted, for this extractor.
        image_size: side S of the images.
        smoothing: returns the (S, h) matrix that upsamples and blurs an axis of h positions; None
            where there are no maps to return. Of images that are cut, the axis is that of n windows
            side by side, (S, n * h).
        windows: rows and columns of each of the T = n * n windows that images are cut into, a row
            of them after the other; none of images that stay whole.

    Raises:
        ModelError: the method cannot be exported.
    """

    smoothing: Tensor | None

    def __init__(
        self,
        extractor: Extractor,
        detector: Detector,
        *,
        image_size: int,
        smoothing: Callable[[int], Tensor] | None,
        windows: Sequence[tuple[slice, slice]] = (),
    ) -> None:
        super().__init__()
        self.windows = list(windows)
        self.per_side = math.isqrt(len(windows))
        self.has_maps = smoothing is not None
        example = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
        seen = self._cut(example)
        self.head = detector.exported()
        self.takes_images = isinstance(extractor, RawImages)
        self.features: nn.Module | None = None
        backbone = extractor.features if isinstance(extractor, RawImages) else extractor
        if isinstance(backbone, FrozenExtractor):
            apart = getattr(self.head, "takes_stages", False)
            self.features = _Features(backbone, seen, apart=apart)
        self.eval()
        matrix = None
        if smoothing is not None and (self.windows or not detector.final_maps):
            with torch.no_grad():
                maps, _ = self._scored(example)
            matrix = smoothing(maps.shape[-1]).float()  # (S, h)
            if not self.windows and torch.equal(matrix, torch.eye(image_size)):
                matrix = None
        self.register_buffer("smoothing", matrix)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns, in order."""
        return ("scores", "maps") if self.has_maps else ("scores",)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Score RGB images.

        Args:
            images: (B, 3, S, S) uint8, as the run's transform makes them.

        Returns:
            Scores (B,) float32, higher = more anomalous, and for structured runs the anomaly maps
            (B, S, S) float32.
        """
        maps, scores = self._scored(images)
        if self.smoothing is not None:
            maps = self.smoothing @ (maps @ self.smoothing.T)  # (B, S, S)
        if scores is None:
            scores = maps.amax(dim=(1, 2))  # (B,)
        return (scores, maps) if self.has_maps else (scores,)

    def _scored(self, images: Tensor) -> Scored:
        """Return maps (B, n * h, n * w) and the method's own image scores (B,) of uint8 images."""
        images = self._cut(images)
        given = [] if self.features is None else [self.features(images)]
        found = self.head(*given, images) if self.takes_images else self.head(*given)
        maps, scores = found if isinstance(found, tuple) else (found, None)
        if self.windows:
            n = self.per_side
            maps = rearrange(maps, "(b r c) h w -> b (r h) (c w)", r=n, c=n)
            if scores is not None:
                scores = rearrange(scores, "(b t) -> b t", t=n * n).amax(dim=1)  # (B,)
        return maps, scores

    def _cut(self, images: Tensor) -> Tensor:
        """Return the windows (B * T, 3, s, s) of images (B, 3, S, S); images that stay whole."""
        if not self.windows:
            return images
        windows = torch.stack([images[..., rows, columns] for rows, columns in self.windows], dim=1)
        return windows.flatten(0, 1)  # (B * T, 3, s, s)


class _Features(nn.Module):
    """What `FrozenExtractor` and the feature bank make of images, in one graph."""

    mean: Tensor
    std: Tensor

    def __init__(self, extractor: FrozenExtractor, example: Tensor, *, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.register_buffer("mean", extractor.mean)
        self.register_buffer("std", extractor.std)
        self.net = accelerated(extractor.net, extractor.pixels(example))
        self.pooled = extractor.pooled
        self.patch_size = extractor.patch_size
        self.assemble = extractor.assemble

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return features (B, C, H, W), float32, of uint8 images; the stages' where kept apart."""
        maps = channels_first(self.net, self.net(normalised_pixels(images, self.mean, self.std)))
        if self.pooled:
            maps = [m.mean(dim=(2, 3), keepdim=True) for m in maps]  # (B, C_l, 1, 1)
        else:
            maps = [F.avg_pool2d(m, self.patch_size, 1, self.patch_size // 2) for m in maps]
        halves = [m.half() for m in maps]
        if self.apart:
            return [m.float() for m in halves]
        return self.assemble(halves)  # (B, C, H, W)
