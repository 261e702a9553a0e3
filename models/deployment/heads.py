"""The heads of finished detectors, written so that a graph for any number of images can hold them.

They compute what the detectors compute, in float32. Two differ in how. Where `ClosedFormNoco` sorts
features by their nearest centres, `DeployedPrototypes` picks each centre's features out of all.
Where `models.features.nearest` looks again at whatever rounding could hide, `Memory` always proposes `SPARE`
features more than are wanted by a product, and ranks them by subtraction.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.methods.noco_cf import ClosedFormNoco
from models.detector import Detector
from models.backbone.extractor import FrozenExtractor, channels_first
from models.training.fine_tuning import FineTunedDetector
from models.backbone.rewriting import accelerated
from models.methods.knn import Knn
from models.methods.mahalanobis import Mahalanobis
from models.methods.padim import Padim
from models.methods.patchcore import PatchCore
from models.methods.stpm import Stpm

SPARE = 2
"""Features proposed beside the nearest ones that are wanted."""
BLOCK = 2048
"""Features of a memory compared at once, at least: bounds the product's memory for each image."""
MAX_BLOCKS = 64
"""Blocks of a memory, at most: bounds the length of the graph."""

Scored = tuple[Tensor, Tensor | None]
"""Maps (B, h, w), and image scores (B,) where the method has its own."""


class DeployedAsWritten(nn.Module):
    """A detector that exports as it is, with the suite's image score."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, features: Tensor) -> Scored:
        """Return maps and image scores of features (B, C, H, W)."""
        return self.detector(features), None


class DeployedNormalised(nn.Module):
    """A head behind its feature norm."""

    def __init__(self, feature_norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.feature_norm = feature_norm
        self.head = head

    def forward(self, features: Tensor) -> Scored:
        """Return maps and image scores of features (B, C, H, W)."""
        return self.head(self.feature_norm(features))


class DeployedPrototypes(nn.Module):
    """`ClosedFormNoco` with several centres: each centre's filter sees its own features only."""

    centres: Tensor
    filters: Tensor
    lengths: Tensor

    def __init__(self, detector: ClosedFormNoco) -> None:
        super().__init__()
        self.nearest = detector.nearest
        self.takes_root = detector.loss_kind == "distance"
        self.register_buffer("centres", detector.centres)
        self.register_buffer("filters", detector.filters)
        self.register_buffer("lengths", detector.centres.square().sum(dim=1))

    def forward(self, features: Tensor) -> Scored:
        """Return maps and image scores of features (B, C, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, D)
        distance = torch.addmm(self.lengths, positions, self.centres.T, alpha=-2)  # (P, K)
        near = distance.topk(self.nearest, dim=1, largest=False).indices  # (P, n)
        smallest = torch.full_like(distance[:, 0], torch.inf)  # (P,)
        for k, (centre, matrix) in enumerate(zip(self.centres, self.filters, strict=True)):
            rows = (near == k).any(dim=1).nonzero().squeeze(1)  # (M,)
            offsets = positions.index_select(0, rows) - centre  # (M, D)
            filtered = torch.addmm(matrix[:, -1], offsets, matrix[:, :-1].T)  # (M, R)
            energies = filtered.square().sum(dim=1)  # (M,)
            energies = torch.minimum(energies, smallest.index_select(0, rows))
            smallest = smallest.scatter(0, rows, energies)
        scores = smallest.sqrt() if self.takes_root else smallest
        return rearrange(scores, "(b h w) -> b h w", b=B, h=H, w=W), None


class DeployedPadim(nn.Module):
    """`Padim`, with its factors on the left so that no copy of them is transposed."""

    kept: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, detector: Padim) -> None:
        super().__init__()
        self.register_buffer("kept", detector.kept)
        self.register_buffer("mean", detector.mean.unsqueeze(2))  # (H*W, D, 1)
        self.register_buffer("whitening", detector.whitening)

    def forward(self, features: Tensor) -> Scored:
        """Return maps and image scores of features (B, C, H, W)."""
        _, _, H, W = features.shape
        drawn = features.index_select(1, self.kept)  # (B, D, H, W)
        centred = rearrange(drawn, "b d h w -> (h w) d b") - self.mean  # (H*W, D, B)
        distances = torch.linalg.vector_norm(self.whitening @ centred, dim=1)  # (H*W, B)
        return rearrange(distances, "(h w) b -> b h w", h=H, w=W), None


class DeployedMahalanobis(nn.Module):
    """`Mahalanobis` without its guard against lower precisions."""

    mean: Tensor
    whitening: Tensor

    def __init__(self, detector: Mahalanobis) -> None:
        super().__init__()
        self.register_buffer("mean", detector.mean)
        self.register_buffer("whitening", detector.whitening)

    def forward(self, features: Tensor) -> Scored:
        """Return maps and image scores of features (B, C, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        whitened = F.linear(positions - self.mean, self.whitening)  # (P, C)
        distances = torch.linalg.vector_norm(whitened, dim=1)  # (P,)
        return rearrange(distances, "(b h w) -> b h w", b=B, h=H, w=W), None


class Memory(nn.Module):
    """Nearest stored features, all seen from the stored features' mean: smaller norms round less.

    Args:
        memory: (M, C).
    """

    shift: Tensor
    memory: Tensor
    squares: Tensor

    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        shift = memory.mean(dim=0)
        centred = memory - shift
        self.block = max(BLOCK, -(-len(memory) // MAX_BLOCKS))
        self.register_buffer("shift", shift)
        self.register_buffer("memory", centred)
        self.register_buffer("squares", centred.square().sum(dim=1))

    def forward(self, centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return distances, ascending, and rows, (P, count) each, of features (P, C) - shift."""
        proposed = min(count + SPARE, len(self.memory))
        values, rows = [], []
        for start in range(0, len(self.memory), self.block):
            block = self.memory[start : start + self.block]
            squares = self.squares[start : start + self.block]
            rough = torch.addmm(squares, centred, block.T, alpha=-2)  # (P, R)
            found = rough.topk(min(proposed, len(block)), dim=1, largest=False)
            values.append(found.values)
            rows.append(found.indices + start)
        best = torch.cat(values, dim=1).topk(proposed, dim=1, largest=False).indices
        candidates = torch.cat(rows, dim=1).gather(1, best)  # (P, proposed)
        distances = self.distances(centred, candidates)
        nearest = distances.topk(count, dim=1, largest=False)
        return nearest.values, candidates.gather(1, nearest.indices)

    def distances(self, centred: Tensor, rows: Tensor) -> Tensor:
        """Return Euclidean distances (P, k) of features (P, C) - shift to rows (P, k)."""
        return torch.linalg.vector_norm(centred.unsqueeze(1) - self.memory[rows], dim=2)


class DeployedKnn(nn.Module):
    """`Knn` on `Memory`."""

    def __init__(self, detector: Knn) -> None:
        super().__init__()
        self.memory = Memory(detector.memory)
        self.count = detector.num_neighbors
        self.squared = detector.distance == "squared"

    def forward(self, features: Tensor) -> Scored:
        """Return maps and image scores of features (B, C, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, C)
        distances, _ = self.memory(positions - self.memory.shift, self.count)  # (P, k)
        scores = (distances.square() if self.squared else distances).mean(dim=1)
        return rearrange(scores, "(b h w) -> b h w", b=B, h=H, w=W), None


class DeployedPatchCore(nn.Module):
    """`PatchCore` on `Memory`, with the image scores of its eq. 7."""

    def __init__(self, detector: PatchCore) -> None:
        super().__init__()
        self.memory = Memory(detector.memory)
        self.count = min(detector.num_neighbors, len(detector.memory))

    def forward(self, features: Tensor) -> Scored:
        """Return maps and image scores of features (B, C, H, W)."""
        B, C, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c") - self.memory.shift  # (P, C)
        distances, rows = self.memory(positions, 1)  # (P, 1) each
        maps = rearrange(distances, "(b h w) 1 -> b h w", b=B, h=H, w=W)
        peaks, where = maps.flatten(1).max(dim=1, keepdim=True)  # (B, 1) each
        if self.count == 1:
            return maps, peaks[:, 0]
        nearest = rearrange(rows, "(b p) 1 -> b p", p=H * W).gather(1, where)[:, 0]  # (B,)
        _, neighbours = self.memory(self.memory.memory[nearest], self.count)  # (B, b)
        by_image = rearrange(positions, "(b p) c -> b p c", p=H * W)
        farthest = by_image.gather(1, where.unsqueeze(2).expand(-1, 1, C))[:, 0]  # (B, C)
        distances = self.memory.distances(farthest, neighbours)  # (B, b)
        weights = 1 - torch.exp(peaks[:, 0] - torch.logsumexp(distances, dim=1))  # (B,)
        return maps, weights * peaks[:, 0]


class DeployedStpm(nn.Module):
    """`Stpm` with teacher and student side by side, on images."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Stpm, teacher: FrozenExtractor, example: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", teacher.mean)
        self.register_buffer("std", teacher.std)
        pixels = teacher.pixels(example)
        self.teacher = accelerated(teacher.net, pixels)
        self.student = accelerated(detector.student, pixels)

    def forward(self, images: Tensor) -> Scored:
        """Return maps and image scores of uint8 images (B, 3, S, S)."""
        pixels = normalised_pixels(images, self.mean, self.std)
        pyramids = [channels_first(net, net(pixels)) for net in (self.teacher, self.student)]
        maps = []
        for wanted, learned in zip(*pyramids, strict=True):
            difference = F.normalize(wanted, dim=1) - F.normalize(learned, dim=1)
            stage_map = difference.square().sum(dim=1, keepdim=True) / 2  # (B, 1, H_l, W_l)
            maps.append(F.interpolate(stage_map, images.shape[2:], mode="bilinear"))
        return torch.cat(maps, dim=1).prod(dim=1), None  # (B, S, S)


class DeployedFineTuned(nn.Module):
    """A fine-tuned backbone and its stored embeddings, on images."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: FineTunedDetector) -> None:
        super().__init__()
        self.register_buffer("mean", detector.backbone.mean)
        self.register_buffer("std", detector.backbone.std)
        self.detector = detector
        self.memory = Memory(detector.embeddings)
        self.count = detector.num_neighbors

    def forward(self, images: Tensor) -> Scored:
        """Return maps and image scores of uint8 images (B, 3, S, S)."""
        embeddings = self.detector.embed(normalised_pixels(images, self.mean, self.std))  # (B, D)
        distances, _ = self.memory(embeddings - self.memory.shift, self.count)  # (B, k)
        return rearrange(distances.square().sum(dim=1), "b -> b 1 1"), None


def normalised_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 images (B, 3, S, S) as a backbone takes them, channels last in memory."""
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
