"""DifferNet: the density of a whole image's pooled features, under a normalising flow.

Source: "Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing Flows" (Rudolph,
Wandt, Rosenhahn, WACV 2021) and its released code (marco-rudolph/differnet): images of 448 pixels
at three scales, eight coupling blocks, 192 epochs of batches of 24 images in 4 rotations each,
Adam; 64 rotations of a test image. With the paper's 768 features the flow has 172 million
parameters.

| paper | here | meaning |
| --- | --- | --- |
| y | vectors | pooled features of a view at all scales, (D,) |
| z | latents | what the flow makes of them |
| L(z) | loss | (|z|^2 / 2 - log-determinant) / D, mean over views |
| T(x) | angles | rotations of an image, black where nothing is known |
| tau(x) | score | mean of z^2 over dimensions and rotations, without the determinant (paper) |

What differs:

- Rotations. The paper turns each image anew in every epoch: 4 x 192 = 768 views, each through the
  backbone. Here `train_views` rotations of each image are drawn once, their vectors are kept, and
  every epoch trains on `views_per_step` of them, drawn anew: the backbone sees 64 views, a twelfth,
  and epochs cost no more than the flow. Each view is met 12 times instead of once. The test's
  rotations are evenly spaced instead of drawn, so that a score is a property of the image.
- Backbone. The published one is torchvision's AlexNet, which timm lacks. Here it is that of the
  experiment; of its stages the last one chosen is pooled, the others do nothing.
- The released code clamps the output of each block to 1e6, which has no inverse; here it does not.
  It tells the best result over its evaluations on the test set beside the last one.
- Maps. The paper looks at the gradient of the loss in the image; that is not built. The map is the
  image's score everywhere: it localises nothing.

A single view is the image as it is: on semantic data a turned digit may be another one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

from configs.options import MethodOptions, NotNegative, Positive, PositiveInt
from models.backbone.extractor import FrozenExtractor
from models.backbone.rewriting import accelerated
from models.deployment.memory import normalised_pixels
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.method import Method
from models.methods.flows.couplings import ClampedCoupling
from models.methods.flows.layers import Chain, Invertible, Permutation
from models.methods.flows.views import check_sizes, pooled, rotated
from models.training.loop import Loop, Losses

BETAS = (0.8, 0.8)
"""Of Adam (released code)."""
EPS = 1e-4
"""Of Adam (released code)."""
READ = 16
"""Images read at once."""
VIEWS_AT_ONCE = 32
"""Turned images that go through the backbone together."""
VIEWS_IN_GRAPH = 16
"""The same of each image in a graph for export, which has one copy of the backbone for each."""
EXAMPLE_SIDE = 224
"""Pixels of the image by which the backbone is rewritten."""


@dataclass(frozen=True, kw_only=True)
class DiffernetOptions(MethodOptions):
    """DifferNet: a flow on pooled features of turned images."""

    scales: PositiveInt = 3
    """Sizes at which an image is seen, each half of the one before (paper: 448, 224, 112)."""
    blocks: PositiveInt = 8
    """Coupling blocks (paper)."""
    width: PositiveInt = 2048
    """Hidden units of the couplings' networks (paper)."""
    clamp: Positive = 3.0
    """Bound of the log-scales (paper)."""
    train_views: PositiveInt = 64
    """Rotations of each training image, drawn once (ours; paper: 768, new ones in each epoch); 1
    for the image as it is."""
    views_per_step: PositiveInt = 4
    """Of them, those that an epoch trains on, drawn in each (paper: 4)."""
    test_views: PositiveInt = 64
    """Rotations of a scored image (paper: 64 drawn ones; here evenly spaced from 0 on)."""
    learning_rate: Positive = 2e-4
    """Of Adam (paper)."""
    weight_decay: NotNegative = 1e-5
    """Of Adam (released code)."""
    batch_size: PositiveInt = 24
    """Images per step (released code: 96 vectors of 4 views each)."""
    epochs: PositiveInt = 192
    """Passes over the training images (released code)."""


class Differnet(Detector):
    """A flow on the pooled features of an image's rotations; far from the origin = anomalous.

    The backbone is frozen. While it trains, the flow sees vectors of `train_views` rotations of
    each image, which are made in one pass over the images and held in memory.

    Attributes:
        angles: rotations of a scored image, (V,), in degrees.
    """

    angles: Tensor

    def __init__(self, features: FeatureShape, options: DiffernetOptions) -> None:
        super().__init__()
        assert features.backbone is not None
        if options.views_per_step > options.train_views:
            raise ModelError(
                f"an epoch cannot train on {options.views_per_step} of {options.train_views} views",
                {"views_per_step": "lower", "train_views": "raise"},
            )
        self.options = options
        # In a tuple, so that its weights are not part of this head.
        self._frozen = (features.backbone,)
        self._fast: tuple[nn.Module, ...] = ()
        D = options.scales * features.backbone.stage_channels[-1]
        layers: list[Invertible] = []
        for _ in range(options.blocks):
            layers.append(Permutation(D))
            layers += [
                ClampedCoupling(D, width=options.width, clamp=options.clamp, first=first)
                for first in (True, False)
            ]
        self.flow = Chain(layers)
        V = options.test_views
        self.register_buffer("angles", torch.arange(V) * (360 / V))
        self.remarks = list(remarks(features.backbone, options))
        self.eval()

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Make the vectors of all views, then train the flow; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the backbone does not take images of the smaller sizes.
        """
        options = self.options
        self.flow.initialise(generator)
        vectors = self._embed_views(bank, generator)  # (N, V, D)
        N, V, D = vectors.shape
        optimizer = torch.optim.Adam(
            self.flow.parameters(),
            lr=options.learning_rate,
            betas=BETAS,
            eps=EPS,
            weight_decay=options.weight_decay,
        )

        def batches() -> Iterator[Tensor]:
            for rows in torch.randperm(N, generator=generator).split(options.batch_size):
                views = torch.rand(len(rows), V, generator=generator).argsort(dim=1)
                chosen = views[:, : options.views_per_step]  # (B, views_per_step)
                flat = (V * rows.unsqueeze(1) + chosen).flatten()  # (B * views_per_step,)
                places = flat.to(vectors.device, non_blocking=True)
                yield rearrange(vectors, "n v d -> (n v) d").index_select(0, places)

        def losses(batch: Tensor) -> Losses:
            latents, log_det = self.flow(batch)
            return {"loss": (0.5 * latents.square().sum(dim=1) - log_det).mean() / D}

        loop = Loop(module=self, optimizer=optimizer, epochs=options.epochs, generator=generator)
        loop.run(batches, losses, monitor=monitor)

    @torch.no_grad()
    def embed(self, images: Tensor, angles: Tensor) -> Tensor:
        """Return the pooled features of turned images.

        Args:
            images: (B, 3, S, S), uint8.
            angles: (B, V), in degrees, counter-clockwise.

        Returns:
            (B, V, D).
        """
        (backbone,) = self._frozen
        B, V = angles.shape
        rows = torch.arange(B, device=images.device).repeat_interleave(V)
        found = []
        for some, turned in zip(
            rows.split(VIEWS_AT_ONCE), angles.flatten().split(VIEWS_AT_ONCE), strict=True
        ):
            views = rotated(images[some].float(), turned.unsqueeze(1))  # (P, 3, S, S)
            pixels = backbone.pixels(views)
            found.append(pooled(self._network(), pixels, self.options.scales))  # (P, D)
        return rearrange(torch.cat(found), "(b v) d -> b v d", v=V)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores as maps (B, 1, 1) of uint8 images (B, 3, S, S)."""
        angles = repeat(self.angles, "v -> b v", b=len(images))
        vectors = self.embed(images, angles)
        return mean_square(self.flow, vectors)

    def score(self, images: Tensor) -> Scored:
        """Return the scores as maps (B, 1, 1) and as they are, (B,)."""
        maps = self(images)
        return maps, maps[:, 0, 0]

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def _network(self) -> nn.Module:
        """Return the backbone, rewritten to run faster; made when it is first asked for."""
        (backbone,) = self._frozen
        if not self._fast or next(self._fast[0].parameters()).device != backbone.device:
            example = torch.zeros(1, 3, EXAMPLE_SIDE, EXAMPLE_SIDE, device=backbone.device)
            self._fast = (accelerated(backbone.net, example),)
        return self._fast[0]

    def _embed_views(self, bank: FeatureSource, generator: torch.Generator) -> Tensor:
        """Return the vectors (N, V, D) of the training views, reading the images once."""
        V = self.options.train_views
        angles = 360 * torch.rand(len(bank), V, generator=generator) - 180  # (N, V)
        if V == 1:
            angles.zero_()
        found: list[Tensor] = []
        done = 0
        count = -(-len(bank) // READ)
        for images in tqdm(bank.batches(READ), "views", count, leave=False, disable=None):
            if not found:
                check_sizes(self._frozen[0], images.shape[-1], self.options.scales)
            turned = angles[done : done + len(images)].to(images.device)
            found.append(self.embed(images, turned))
            done += len(images)
        return torch.cat(found)


class _Exported(nn.Module):
    """`Differnet` for a graph, with the backbone in it."""

    mean: Tensor
    std: Tensor
    angles: Tensor

    def __init__(self, detector: Differnet) -> None:
        super().__init__()
        (backbone,) = detector._frozen
        self.register_buffer("mean", backbone.mean)
        self.register_buffer("std", backbone.std)
        self.register_buffer("angles", detector.angles)
        self.net = detector._network()
        self.flow = detector.flow
        self.scales = detector.options.scales

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores as maps (B, 1, 1) and as they are, of uint8 images (B, 3, S, S)."""
        found = []
        for angles in self.angles.split(VIEWS_IN_GRAPH):
            views = rotated(images.float(), angles.expand(images.shape[0], -1))  # (B * V, 3, S, S)
            vectors = pooled(self.net, normalised_pixels(views, self.mean, self.std), self.scales)
            found.append(rearrange(vectors, "(b v) d -> b v d", v=len(angles)))
        maps = mean_square(self.flow, torch.cat(found, dim=1))
        return maps, maps[:, 0, 0]


def mean_square(flow: nn.Module, vectors: Tensor) -> Tensor:
    """Return the mean of z^2 over views and dimensions, (B, 1, 1), of vectors (B, V, D)."""
    V = vectors.shape[1]
    latents, _ = flow(rearrange(vectors, "b v d -> (b v) d"))
    each = latents.square().mean(dim=1)  # (B * V,)
    return rearrange(each, "(b v) -> b v", v=V).mean(dim=1)[:, None, None]  # (B, 1, 1)


def remarks(backbone: FrozenExtractor, options: DiffernetOptions) -> Iterator[str]:
    """Yield what a reader of the numbers must know."""
    if options.train_views > 1:
        yield (
            f"Trained on {options.train_views} rotations of each image that were drawn once; "
            "DifferNet's paper draws new ones in each epoch."
        )
    if len(backbone.layers) > 1:
        yield f"DifferNet pools the last stage alone: {backbone.layers[-1]} of --layers."
    if not backbone.pooled:
        yield "DifferNet's maps are flat, each the score of its image: pixel metrics mean nothing."


METHOD = Method(
    detector=lambda: Differnet,
    options=DiffernetOptions(),
    takes=frozenset({"images"}),
    published_as="DifferNet",
    experiment={
        "structured": {"layers": (4,), "image_size": 448, "crop_size": None, "blur_sigma": 0.0}
    },
    # Turned, a digit or a car may be another class.
    on={"semantic": {"train_views": 1, "views_per_step": 1, "test_views": 1}},
)
