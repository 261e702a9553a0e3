"""MSPBA: embeds patches of three sizes; anomalous is a window far from all normal ones.

Source: "Multi-Scale Patch-Based Representation Learning for Image Anomaly Detection and
Segmentation" (Tsai, Wu and Lai, WACV 2022) and its released code, built on PatchSVDD's. A network
learns on the normal images themselves: in which of 12 directions a neighbouring patch lies, and
that patches which all but cover each other are alike, far ones are not. An image is scored in
sliding windows, each by its distance to the nearest window of all normal images.

| symbol | here | meaning |
| --- | --- | --- |
| K | size | side of a patch in pixels: 64, 32 or 16 |
| h1, h2, h3 | embeddings | of patches, (n, D), in -1 to 1 |
| h1 - h2 | ones - others | what the direction of a neighbour is told from, by cross-entropy |
| lambda | svdd_weight | of distance and likeness of near and far patches, eq. 5 |

A size's map has at each pixel the mean distance of the windows that cover it. The anomaly map is
their sum, at the size of the image; its maximum is the image's score.

`--backbone vgg16 --layers 1 2 4` is the published network, layer by layer: relu5_3, relu3_3 and
relu2_2 for the three sizes. With another one each size takes, of the `--layers`, the stage whose
stride is nearest to the published 16, 4 or 2; normalisation layers keep their statistics.

Values below are the released code's. Two of its faults are behind `released`. Not repeated: its
Adam holds the backbone three times, and it chooses the epoch by the test set (`--select best_test`
does). Ours: neighbours are drawn where they fit, centres that no epoch uses are not found.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from configs.options import MethodOptions, NotNegative, OnlyWith, OptionalInt, Positive, PositiveInt
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.method import Method
from models.methods.mspba.clusters import Centres, find_centres
from models.methods.mspba.exported import Exported
from models.methods.mspba.losses import patch_losses
from models.methods.mspba.networks import PatchNetwork, PositionClassifier
from models.methods.mspba.sampling import (
    READ,
    PatchSampler,
    find_mean_image,
    find_side,
    repeated,
)
from models.methods.mspba.windows import draw_kept, embed_kept, window_corners, window_map
from models.training.loop import Loop, summed

CLUSTERED = OnlyWith("cluster_weight", "above 0", lambda weight: weight > 0)


@dataclass(frozen=True, kw_only=True)
class MspbaOptions(MethodOptions):
    """MSPBA: patches of three sizes, embedded by what lies where; the released values."""

    patch_sizes: tuple[int, ...] = (64, 32, 16)
    """Pixels of the square patches; each has a head, of those published the one for the size that
    is nearest by ratio (released)."""
    strides: tuple[int, ...] = (16, 4, 4)
    """Pixels from window to window where images are scored and remembered, for each patch size
    (released); the search takes a sixteenth of the time where strides are twice as long."""
    max_positions: OptionalInt = None
    """Normal windows of each size that are kept, drawn at random where there are more; none for all
    (released: all)."""
    embedding_dim: PositiveInt = 64
    """Numbers of an embedding (released)."""
    pixels: Literal["mean_image", "backbone"] = "mean_image"
    """Subtract the training images' mean image from images in 0 to 1 (released), or normalise them
    as the backbone was trained."""
    svdd_weight: NotNegative = 1e-3
    """Of the SVDD loss, lambda (paper, eq. 5; released: 1e-3)."""
    cluster_weight: NotNegative = 1.0
    """Of the squared distance to the nearest k-means centre (released, where it has no gradient); 0
    for no centres."""
    clusters: Annotated[PositiveInt, CLUSTERED] = 50
    """K-means centres of each patch size (released)."""
    cluster_patches: Annotated[PositiveInt, CLUSTERED] = 10_000
    """Random patches of each size that k-means sees (ours), rounded up to as many of each image."""
    cluster_start: Annotated[PositiveInt, CLUSTERED] = 11
    """First epoch with the distance to centres (released)."""
    cluster_every: Annotated[PositiveInt, CLUSTERED] = 5
    """Epochs from which to which the same centres count (released)."""
    released: bool = False
    """Repeat two faults of the released code: the distance to centres has no gradient, and the last
    layer of the position classifiers, normalised without one, keeps its first weights."""
    learning_rate: Positive = 1e-5
    """Of Adam (released)."""
    batch_size: PositiveInt = 64
    """Images per step; of each come five patches of each size (released)."""
    samples_per_image: PositiveInt = 100
    """Times that an epoch sees each training image (released)."""
    epochs: PositiveInt = 101
    """Of training (released)."""
    mixed_precision: bool = False
    """Train in bfloat16 where a CUDA device computes in it; scores are float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes, strides = self.patch_sizes, self.strides
        if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 4:
            raise ValueError(f"--method.patch-sizes {sizes} must be different and 4 or above")
        if len(strides) != len(sizes) or min(strides) < 1:
            raise ValueError(
                f"--method.strides {strides} must be above 0, one for each of "
                f"--method.patch-sizes {sizes}"
            )
        if any(stride > size for size, stride in zip(sizes, strides, strict=True)):
            raise ValueError(
                f"--method.strides {strides} leave pixels unseen between windows of "
                f"--method.patch-sizes {sizes}: none may be larger than its size"
            )
        if self.cluster_weight > 0 and self.cluster_patches < self.clusters:
            raise ValueError(
                f"--method.cluster-patches {self.cluster_patches} must be at least "
                f"--method.clusters {self.clusters}"
            )


class Mspba(Detector):
    """Distances of windows to the nearest of all normal windows, over several sizes of window.

    Attributes:
        network: embeds patches.
        classifiers: of the position task, one for each size; only training uses them.
        mean_image: (3 * S * S,), in 0 to 1; empty unless `pixels` is "mean_image".
        remarks: that not all normal windows were kept.
    """

    final_maps = True

    mean_image: Tensor
    mean: Tensor

    def __init__(self, features: FeatureShape, options: MspbaOptions) -> None:
        super().__init__()
        assert features.backbone is not None
        self.options = options
        # In a tuple, so that its weights are not part of this head.
        self._backbone = (features.backbone,)
        sizes, D = options.patch_sizes, options.embedding_dim
        mean, std = (getattr(features.backbone, name).cpu().clone() for name in ("mean", "std"))
        if options.pixels == "mean_image":
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        self.network = PatchNetwork(features.backbone, sizes, D, std)
        self.classifiers = nn.ModuleDict(
            {str(size): PositionClassifier(D, frozen=options.released) for size in sizes}
        )
        for size in sizes:
            self.register_buffer(_memory(size), torch.zeros(0, D))
        self.register_buffer("mean_image", torch.zeros(0))
        self.sized_by_fit = ("mean_image", *map(_memory, sizes))
        self.register_buffer("mean", mean, persistent=False)  # (1, 3, 1, 1)
        self.eval()  # no layer learns statistics

    def train(self, mode: bool = True) -> "Mspba":
        """Stay in eval mode: the backbone's norms keep their statistics, as published."""
        del mode
        return super().train(False)

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the network, then embed the windows of all images; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the images are too small for a patch and its neighbour.
        """
        options = self.options
        side = find_side(bank, max(options.patch_sizes))
        self._start(bank, generator)
        kept = self._draw_kept(len(bank), side, generator)
        sampler = PatchSampler(generator, self.mean.device)
        optimizer = torch.optim.Adam(
            [p for p in self.parameters() if p.requires_grad], lr=options.learning_rate
        )
        centres = Centres()

        def cluster(epoch: int) -> None:
            past = epoch - options.cluster_start
            if options.cluster_weight > 0 and past >= 0 and past % options.cluster_every == 0:
                each = math.ceil(options.cluster_patches / len(bank))
                centres.of_size = find_centres(
                    self.network, self._batches(bank), each, options.clusters, generator
                )

        loop = Loop(
            module=self,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            drawn={"noise": sampler.noise},
            others={"centres": centres},
            mixed_precision=options.mixed_precision,
        )
        loop.run(
            lambda: repeated(bank, options.batch_size, options.samples_per_image, generator),
            lambda images: summed(self.losses(self._pixels(images), sampler, centres.of_size)),
            monitor=monitor,
            before_epoch=cluster,
            complete=functools.partial(self._remember, bank, side, kept),
        )

    def losses(
        self, pixels: Tensor, sampler: PatchSampler, centres: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, each a scalar; see `patch_losses`."""
        options = self.options
        terms = patch_losses(self.network, self.classifiers, pixels, sampler, centres)
        terms["svdd"] = options.svdd_weight * terms["svdd"]
        if "cluster" in terms:
            cluster = options.cluster_weight * terms["cluster"]
            terms["cluster"] = cluster.detach() if options.released else cluster
        return terms

    def forward(self, images: Tensor) -> Tensor:
        """Return the sum of the sizes' maps at the size of the images, (B, S, S).

        Raises:
            ModelError: the images are not of the size that the detector was fitted on, or smaller
                than a patch.
        """
        side = images.shape[-1]
        if side < (largest := max(self.options.patch_sizes)):
            raise ModelError(
                f"images of {side} pixels hold no patch of {largest}: score at the size fitted on"
            )
        pixels, network = self._pixels(images), self.network.for_scoring()
        maps = [
            window_map(network, self.get_buffer(_memory(size)), pixels, size, stride)
            for size, stride in self._windows()
        ]
        return torch.stack(maps).sum(dim=0)

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        memories = {size: self.get_buffer(_memory(size)) for size in self.options.patch_sizes}
        return Exported(self.network, dict(self._windows()), memories, self._mean())

    def _windows(self) -> list[tuple[int, int]]:
        """Return the sizes of the windows and their strides."""
        return list(zip(self.options.patch_sizes, self.options.strides, strict=True))

    @torch.no_grad()
    def _start(self, bank: FeatureSource, generator: torch.Generator) -> None:
        """Forget what was fitted, draw all weights, and find the mean image."""
        (backbone,) = self._backbone
        self.remarks = []
        if unused := self.network.unused(backbone.layers):
            self.remarks.append(f"no patch size takes stages {unused} of --layers")
        for size in self.options.patch_sizes:
            memory = self.get_buffer(_memory(size))
            setattr(self, _memory(size), memory.new_empty(0, memory.shape[1]))
        self.network.initialise(backbone, generator)
        for classifier in self.classifiers.values():
            assert isinstance(classifier, PositionClassifier)
            classifier.initialise(generator)
        if self.options.pixels == "mean_image":
            self.mean_image = find_mean_image(bank).to(self.mean_image)

    def _draw_kept(self, images: int, side: int, generator: torch.Generator) -> dict[int, Tensor]:
        """Draw which windows are remembered, counted through the images: ascending, of each size.

        They are drawn once, so that a fit is the same whether epochs are scored or not.
        """
        kept = {}
        for size, stride in self._windows():
            total = images * len(window_corners(side, size, stride))
            kept[size] = draw_kept(total, self.options.max_positions, generator)
            if (count := len(kept[size])) < total:
                self.remarks.append(
                    f"the memory holds {count:,} of {total:,} normal windows of {size} pixels, "
                    "drawn at random (--method.max-positions none keeps all)"
                )
        return kept

    def _remember(self, bank: FeatureSource, side: int, kept: dict[int, Tensor]) -> None:
        """Embed the windows of all images that are kept."""
        corners = {size: window_corners(side, size, stride) for size, stride in self._windows()}
        network = self.network.for_scoring()
        for size, found in embed_kept(network, self._batches(bank), corners, kept).items():
            setattr(self, _memory(size), found)

    def _batches(self, bank: FeatureSource) -> Iterator[Tensor]:
        """Yield the pixels of all images, (B, 3, S, S) each."""
        yield from map(self._pixels, bank.batches(READ))

    def _pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images in units of 0 to 1, less the mean, channels last in memory."""
        mean = self._mean()
        if mean.shape[-1] not in {1, images.shape[-1]}:
            raise ModelError(
                f"this MSPBA has a mean image of {mean.shape[-1]} pixels, the images have "
                f"{images.shape[-1]}: fit and score at the same image size"
            )
        pixels = images.to(mean.device).float() / 255 - mean
        return pixels.contiguous(memory_format=torch.channels_last)

    def _mean(self) -> Tensor:
        """Return what is subtracted from images in 0 to 1, (1, 3, S, S) or (1, 3, 1, 1)."""
        if self.options.pixels == "backbone":
            return self.mean
        side = round((len(self.mean_image) / 3) ** 0.5)
        return rearrange(self.mean_image, "(c h w) -> 1 c h w", c=3, h=side)


def _memory(size: int) -> str:
    """Return the name of the buffer with the embeddings of normal windows of a size, (M, D)."""
    return f"memory_{size}"


METHOD = Method(
    detector=lambda: Mspba,
    options=MspbaOptions(),
    tasks=frozenset({"structured"}),
    takes=frozenset({"images"}),
    # Released: a VGG16, whole images of 256, the sum of the maps unblurred.
    experiment={
        "structured": {
            "backbone": "vgg16.tv_in1k",
            "layers": (1, 2, 4),
            "image_size": 256,
            "crop_size": None,
            "patch_size": 1,
            "blur_sigma": 0.0,
        },
        # Ours: the same strides; its weights come with a package.
        "demo": {"backbone": "tf_efficientnet_lite0", "layers": (0, 1, 3)},
    },
    ignores=frozenset({"blur_sigma"}),
)
