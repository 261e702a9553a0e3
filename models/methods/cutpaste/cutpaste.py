"""CutPaste: a network learns to tell images from images with a piece pasted; then a Gaussian.

Source: "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization" (Li, Sohn, Yoon
and Pfister, CVPR 2021). A ResNet-18 learns from random weights; its head is dropped, and a Gaussian
is fitted to what it makes of the normal images. No code was released; what the paper leaves open is
as two reimplementations agree on it (Runinho/pytorch-cutpaste, LilitYolyan/CutPaste): the head (512
and 128 units), L2-normalised representations, the covariance shrunk by Ledoit and Wolf.

| paper | here | meaning |
| --- | --- | --- |
| CP(x) | views | of an image: as it is, with a patch, with a scar; one for each class |
| g | network.head | tells the views apart |
| f(x) | representation | pooled last maps of the ResNet at unit length, (D,) |
| s(x) | score | Mahalanobis distance of f(x): the logarithm of a density, but for a constant |

Two models, `representation`:

- "image", the paper's for detection: one representation of the image, one score. Its map is
  Grad-CAM (Selvaraju et al., 2017), as in the paper, but of the score instead of the classifier's
  output: with A the last maps, the positive part of the sum over channels of A times the
  gradient of half the squared score in the mean of A. The gradient is written out here. Before the
  positive part the map sums to zero, since the length of f(x) does not count. It is as coarse as
  the last maps: 8 x 8 of an image of 256; where they have one position, it is the score.
- "patch", the paper's for localisation: trained on random crops of 64 pixels. An image is scored in
  windows of 32 pixels every 4, and the scores go back to the pixels by a Gaussian; the image score
  is the largest. At full size that takes 3249 passes of small windows for each image. The paper has
  one density for all windows, or one for each position (`density`) on eight of MVTec's objects.

What differs:

- The paper pastes on 64 patches of a step, here on `batch_size` images of which each view is in the
  step: 32 images, 64 views or 96 with three classes, as in the paper.
- Images are moved and jittered in colour before anything is pasted (paper); how far they are moved
  is not stated: `shift` is ours. A scar on a crop keeps its size in pixels of the whole image.
- Weights of windows at a pixel sum to 1. The paper's transposed convolution makes borders lower.
- Not built: the paper's second network, an EfficientNet-B4 with pretrained weights, and ensembles.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.features.matmul import full_precision
from models.method import Method
from models.methods.cutpaste.density import Gaussians
from models.methods.cutpaste.network import Network
from models.methods.cutpaste.options import CutpasteOptions, check
from models.methods.cutpaste.views import Views
from models.methods.cutpaste.windows import spread, starts, windows
from models.training.drawn import drawn_batches
from models.training.loop import Loop, Losses

READ = 16
"""Images read at once when the density is fitted."""
ROWS_IN_GRAPH = 8
"""Rows of windows in each copy of the network in a graph for export."""


class CutPaste(Detector):
    """A ResNet-18 that was trained to see what is pasted, and the density of normal images in it.

    Attributes:
        remarks: what the map is.
    """

    def __init__(self, features: FeatureShape, options: CutpasteOptions) -> None:
        super().__init__()
        del features  # this method brings its own network
        check(options)
        self.options = options
        self.is_patchwise = options.representation == "patch"
        crop = options.crop if self.is_patchwise else None
        self.views = Views(options.classes, options.shift, options.jitter, crop)
        self.network = self._new_network()
        self.gaussians = Gaussians(self.network.dims)
        if not self.is_patchwise:
            self.remarks = ["The maps are Grad-CAM of the image score, on the last stage's grid."]
        self.eval()

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the network from random weights, then fit the density; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: images smaller than what is cut of them, or too few for a density.
        """
        options = self.options
        self._check_size(next(iter(bank.batches(1))).shape[-1])
        self._initialise(generator)
        optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=options.learning_rate,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        total = options.schedule_epochs or options.epochs
        loop = Loop(
            module=self,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            rate=lambda passed: (1 + math.cos(math.pi * passed / total)) / 2,
            steps=options.steps_per_epoch,
            mixed_precision=options.mixed_precision,
        )
        loop.run(
            lambda: self._drawn(bank, generator),
            self._losses,
            monitor=monitor,
            complete=functools.partial(self._measure, bank),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return maps of uint8 images (B, 3, S, S).

        They are (B, h, w) on the last stage's grid; of windows (B, S, S).
        """
        return self.score(images)[0]

    def score(self, images: Tensor) -> Scored:
        """Return the maps that `forward` returns, and scores (B,).

        They are the images' distances; where windows are scored, the largest values of the maps.
        """
        seen = self.seen(images)
        with full_precision(images.device):
            return self.judged(seen, images.shape[-1])

    def seen(self, images: Tensor, *, rows: int | None = None) -> Tensor:
        """Return what the network makes of uint8 images (B, 3, S, S).

        Args:
            images: the images.
            rows: of windows at once, where windows are scored; None for as many as fit in memory.

        Returns:
            The last stage's maps (B, D, h, w); or of windows, on their grid, unit vectors
            (B, D, G, G).

        Raises:
            ModelError: images smaller than a window.
        """
        pixels = self.network.pixels(images)
        if not self.is_patchwise:
            return self.network.maps(pixels)
        self._check_size(images.shape[-1])
        options = self.options
        G = len(starts(images.shape[-1], options.window, options.stride))
        found = []
        for drawn, R in windows(pixels, options.window, options.stride, rows=rows):
            vectors = unit(self.network.maps(drawn).mean(dim=(2, 3)))  # (B * R * G, D)
            found.append(rearrange(vectors, "(b r g) d -> b d r g", r=R, g=G))
        return torch.cat(found, dim=2)  # (B, D, G, G)

    def representations(self, seen: Tensor) -> Tensor:
        """Return the unit vectors (B, N, D) of what `seen` returns; N = 1 for whole images."""
        if self.is_patchwise:
            return rearrange(seen, "b d y x -> b (y x) d")
        return rearrange(unit(seen.mean(dim=(2, 3))), "b d -> b 1 d")

    def judged(self, seen: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return maps and image scores (B,) of what `seen` returns of images of size pixels."""
        vectors = self.representations(seen)  # (B, N, D)
        distances = self.gaussians.distances(vectors)  # (B, N)
        if not self.is_patchwise:
            if seen.shape[2:] == (1, 1):
                return distances.unsqueeze(2), distances[:, 0]
            slopes = self.gaussians.slopes(vectors)
            return grad_cam(seen, vectors[:, 0], slopes[:, 0]), distances[:, 0]
        options = self.options
        grid = rearrange(distances, "b (y x) -> b y x", y=seen.shape[2])
        maps = spread(grid, size, options.window, options.stride, options.spread)
        return maps, maps.amax(dim=(1, 2))

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch, the schedule that of the whole fit; see `Detector.stopped_at`."""
        options = self.options
        return {"epochs": step, "schedule_epochs": options.schedule_epochs or options.epochs}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def _new_network(self) -> Network:
        options = self.options
        return Network(
            width=options.width,
            head_layers=options.head_layers,
            head_width=options.head_width,
            classes=self.views.count,
        )

    def _initialise(self, generator: torch.Generator) -> None:
        """Give the network random weights, those that its layers draw, and forget the density."""
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # a GPU's stays as it is
            fresh = self._new_network()
        self.network.load_state_dict(fresh.state_dict())

    def _check_size(self, size: int) -> None:
        if not self.is_patchwise:
            return
        for name in ("crop", "window"):
            if getattr(self.options, name) > size:
                raise ModelError(
                    f"images of {size} pixels have no {name} of {getattr(self.options, name)}",
                    {name: "lower"},
                )

    def _drawn(self, bank: FeatureSource, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Yield the views of an epoch's batches: `count` tensors (B, 3, s, s), uint8, each time."""
        left = self.options.steps_per_epoch
        while left:
            for _, *views in drawn_batches(
                bank, self.options.batch_size, self.views.draw, generator
            ):
                yield views
                left -= 1
                if not left:
                    return

    def _losses(self, views: list[Tensor]) -> Losses:
        logits = self.network(torch.cat(views))
        labels = torch.arange(len(views), device=logits.device).repeat_interleave(len(views[0]))
        is_right = logits.argmax(dim=1) == labels
        return {
            "loss": F.cross_entropy(logits.float(), labels),
            "accuracy": is_right.float().mean(),
        }

    @torch.no_grad()
    def _measure(self, bank: FeatureSource) -> None:
        """Fit the density to the training images."""
        batches = (self.representations(self.seen(images)) for images in bank.batches(READ))
        is_each = self.is_patchwise and self.options.density == "per_position"
        with full_precision(self.network.mean.device):
            self.gaussians.fit(batches, per_position=is_each)


class _Exported(nn.Module):
    """`CutPaste` without its guard against lower precisions, with few copies of the network."""

    def __init__(self, detector: CutPaste) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return maps and image scores of uint8 images (B, 3, S, S)."""
        seen = self.detector.seen(images, rows=ROWS_IN_GRAPH)
        return self.detector.judged(seen, images.shape[-1])


def unit(vectors: Tensor) -> Tensor:
    """Return vectors (N, D) at unit length."""
    return F.normalize(vectors, dim=1)


def grad_cam(maps: Tensor, vectors: Tensor, slopes: Tensor) -> Tensor:
    """Return the positive part of A weighted by the score's gradient in the mean of A, (B, h, w).

    With h the mean of A, z = h / |h| and s the gradient of the score in z, the gradient in h is
    (s - (s z) z) / |h|.

    Args:
        maps: A, (B, D, h, w).
        vectors: z, (B, D).
        slopes: s, (B, D).
    """
    lengths = reduce(maps, "b d y x -> b d", "mean").norm(dim=1, keepdim=True)  # (B, 1)
    along = (slopes * vectors).sum(dim=1, keepdim=True)  # (B, 1)
    weights = (slopes - along * vectors) / lengths.clamp_min(torch.finfo(maps.dtype).tiny)
    return torch.einsum("bdyx,bd->byx", maps, weights).relu()


METHOD = Method(
    detector=lambda: CutPaste,
    options=CutpasteOptions(),
    takes=frozenset({"images"}),
    published_as="CutPaste",
    # Paper: whole images of 256, a network of its own, maps that are not blurred any further.
    experiment={
        "structured": {
            "backbone": "lenet",
            "layers": (0,),
            "image_size": 256,
            "crop_size": None,
            "blur_sigma": 0.0,
        },
        # Ours: the size of the images.
        "semantic": {"backbone": "lenet", "layers": (0,), "image_size": 32, "crop_size": None},
    },
    ignores=frozenset({"backbone", "weights", "layers", "feature_location"}),
)
