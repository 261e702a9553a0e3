"""PNI: a coreset whose members count only where position and neighbours make them likely.

Source: "PNI: Industrial Anomaly Detection using Position and Neighborhood Information" (Bae et al.,
ICCV 2023) and its released code, which differs in much: option `released`. PatchCore finds a
feature normal where any member of its coreset is near; here the member must be likely at that
position, and beside those neighbours.

| paper | here | meaning |
| --- | --- | --- |
| C_emb | members, the first M | coreset that features are compared with, as PatchCore's |
| C_dist | members, the first D | coreset whose members are the classes that are predicted |
| N_p(x) | neighbours | features of the p x p cells around x, zeros beyond the edge, without x |
| p(c given N_p(x)) | likely | softmax of the network's logits over the temperature |
| p(c given x) | votes | how often the class was seen within p x p cells around x, over all images |
| p(c given Omega) | | mean of the two |
| tau | threshold | 1 / (2 D), half of the uniform probability |
| lambda | sharpness | of the normality exp(-lambda distance) |
| S(x) | map | -log of the largest normality among members with p(c given Omega) > tau |

That is lambda times the distance to the nearest member that passes. A member of C_emb passes with
the class it belongs to, the nearest of C_dist. Both sets are beginnings of one greedy choice.

The paper and the code divide by C_emb in tau, though the probabilities are those of C_dist; for
"half of the uniform one" it must be C_dist, the default here, since the largest of D probabilities
then always passes. Ours too: channels of all stages are averaged together (paper: of each stage,
then of both), and the coreset is chosen in PatchCore's 128 Gaussian dimensions (code: sparse).

Left out is the refinement network, which is trained on synthetic defects, some of them drawn by
hand and not released; it adds 0.10 to the paper's image AUROC on MVTec AD and 0.18 to the pixel's.
Of the code also: coreset and training without the 2 cells of the border.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.features.coreset import (
    count_positions,
    draw_projection,
    greedy_k_centre,
    read_positions,
    read_projected,
)
from models.features.matmul import at_once, full_precision, linear
from models.features.nearest import nearest
from models.method import Method
from models.methods.pni.gates import Members, without_border
from models.methods.pni.network import (
    ChannelMeans,
    ExportedNetwork,
    Neighbourhood,
    NeighbourNetwork,
)
from models.methods.pni.options import PniOptions
from models.methods.pni.training import Task, train

READ = 16
"""Images read at once for the classes of their positions."""
POSITIONS = 2**13
"""Positions that the network sees at once when it scores."""
PRODUCT = 2**22
"""Pairs of positions and members compared at once."""
BORDER = 2
"""Cells left out by the released code: half of its 5 x 5 patches."""
RELEASED_SHARPNESS = 0.99


class Pni(Detector):
    """Distance to the nearest member of the coreset that passes the gate of its position.

    A position's neighbours are what is learned from, so it needs a grid, and scores only grids of
    the size it was fitted on. A last batch of a single position is skipped: it has no batch
    statistics. `diagnostics` says which epoch is kept, "kept_epoch".

    Attributes:
        members: (max(M, D), C) float32, in the order of choice.
        owner: nearest of C_dist of each of C_emb, (M,) int64.
        votes: (H * W * D,), p(c given x) of each position; with `released`, (H * W * M,).
        remarks: that a set has fewer members than asked for.
    """

    sized_by_fit = ("members", "owner", "votes")

    members: Tensor
    owner: Tensor
    votes: Tensor

    def __init__(self, features: FeatureShape, options: PniOptions) -> None:
        super().__init__()
        self.options = options
        self.reduced = ChannelMeans(features.channels, options.channels)
        C = self.reduced.channels
        self.seen = ChannelMeans(C, options.neighbour_channels)
        self.register_buffer("members", torch.zeros(0, C))
        self.register_buffer("owner", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("votes", torch.zeros(0))
        self.neighbourhood = Neighbourhood(options.neighbourhood, released=options.released)
        self.network = NeighbourNetwork(
            self.seen.channels,
            self.neighbourhood,
            layers=options.mlp_layers,
            width=options.mlp_width,
            dropout=options.dropout,
        )
        self.eval()  # a loaded head scores; only `fit` trains

    @property
    def classes(self) -> int:
        """Members of C_dist, D."""
        return self.network.last.out_features

    @property
    def tau(self) -> float:
        """Probability that a member must exceed."""
        return 0.5 / (self.classes if self.options.threshold == "dist" else len(self.owner))

    @property
    def num_voted(self) -> int:
        """Members that each position has a probability of."""
        return len(self.owner) if self.options.released else self.classes

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Choose the coresets, count the votes, train the network; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the features have no grid, or the validation share leaves too little.
        """
        _, _, H, W = next(iter(bank.batches(1))).shape
        least = 2 * BORDER + 1 if self.options.released else 2
        if min(H, W) < least:
            raise ModelError(
                f"PNI learns what is beside what: it needs a grid of {least} x {least} positions, "
                f"and the features have {H} x {W}: larger images, or finer --layers"
            )
        self.remarks = []
        self._choose(bank, generator)
        targets = self._assign(bank, (H, W))
        self.network.initialise(self._dist_count(), generator)
        task = Task(bank, targets, self._network_sees, self.members.device)
        kept_epoch = train(self.network, task, self.options, generator, monitor)
        self.diagnostics = {"kept_epoch": [float(kept_epoch)]}

    def _dist_count(self) -> int:
        return min(self.options.dist_size, len(self.members))

    def _choose(self, bank: FeatureSource, generator: torch.Generator) -> None:
        """Choose the members of both coresets, reading the bank twice."""
        options = self.options
        total = count_positions(bank)
        count = max(1, int(total * options.coreset_ratio))
        wanted = min(total, max(count, options.dist_size))
        projection = draw_projection(self.members.shape[1], options.projection_dim, generator)
        if (means := self.reduced.matrix) is not None:
            projection = means.T.cpu() if projection is None else means.T.cpu() @ projection
        points = read_projected(bank, projection)  # (N * H * W, dim)
        chosen = greedy_k_centre(points, wanted, generator=generator)
        self.members = self.reduced.of_rows(read_positions(bank, chosen)).to(self.members)
        dist = self.members[: self._dist_count()]
        self.owner = nearest(self.members[:count], dist, 1)[1][:, 0]
        if len(self.owner) < count or len(dist) < options.dist_size:
            self.remarks.append(
                f"C_emb has {len(self.owner):,} members and C_dist {len(dist):,}, of {count:,} and "
                f"{options.dist_size:,} asked for: no more normal features differ"
            )

    def _assign(self, bank: FeatureSource, size: tuple[int, int]) -> Tensor:
        """Set the votes; return the class of each position, (N, H * W) int32, on the CPU."""
        P = math.prod(size)
        dist, emb = self.members[: self._dist_count()], self.members[: len(self.owner)]
        voted = emb if self.options.released else dist
        counts = torch.zeros(P * len(voted), device=self.members.device)
        places = torch.arange(P, device=self.members.device)
        targets = []
        for features in bank.batches(READ):
            positions = self.reduced.of_rows(rearrange(features, "b c h w -> (b h w) c"))
            found = nearest(positions, dist, 1)[1][:, 0]  # (b * P,)
            targets.append(rearrange(found, "(b p) -> b p", p=P).int().cpu())
            if self.options.released:
                found = nearest(positions, emb, 1)[1][:, 0]
            index = places.repeat(len(features)) * len(voted) + found
            counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))
        maps = rearrange(counts, "(h w d) -> d 1 h w", h=size[0], w=size[1])
        p = self.options.neighbourhood
        spread = F.avg_pool2d(maps, p, 1, p // 2, divisor_override=1)  # (D, 1, H, W)
        votes = spread / spread.sum(dim=0, keepdim=True)
        self.votes = rearrange(votes, "d 1 h w -> (h w d)").contiguous()
        return torch.cat(targets)

    def forward(self, features: Tensor) -> Tensor:
        """Return anomaly maps (B, H, W) of features (B, C, H, W)."""
        return self.score(features)[0]

    def score(self, features: Tensor) -> Scored:
        """Return anomaly maps (B, H, W), and with `released` its image scores (B,).

        Raises:
            ModelError: the grid is not the one the detector was fitted on.
        """
        _, _, H, W = features.shape
        self._check_grid(H, W)
        members = Members(self.members, self.owner, self.classes, linear)
        with full_precision(features.device):
            parts = [
                self._scores(part, members) for part in features.split(max(1, POSITIONS // (H * W)))
            ]
        return self.finished(torch.cat(parts), H, W)

    def finished(self, scores: Tensor, H: int, W: int) -> Scored:
        """Return what `score` does, of the scores (B * H * W,) of all positions."""
        maps = rearrange(scores, "(b h w) -> b h w", h=H, w=W)
        return without_border(maps, BORDER) if self.options.released else (maps, None)

    def gated(self, queries: Tensor, logits: Tensor, votes: Tensor, members: Members) -> Tensor:
        """Return scores (P,) of features (P, C), by logits (P, D) and votes (P, D or M)."""
        options = self.options
        likely = torch.softmax(logits / options.temperature, dim=1)  # (P, D)
        if options.released:
            return members.released(queries, likely, votes, self.tau, RELEASED_SHARPNESS)
        return options.sharpness * members.gated(queries, (likely + votes) / 2, self.tau)

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch, and the last one counts; see `Detector.stopped_at`."""
        return {"epochs": step, "validation_share": 0.0}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self)

    def _scores(self, features: Tensor, members: Members) -> Tensor:
        """Return the scores of all positions, (B * H * W,), of some images."""
        reduced = self.reduced(features)
        logits = self.network.on_maps(self.seen(reduced))  # (P, D)
        queries = rearrange(reduced, "b c h w -> (b h w) c")
        table = rearrange(self.votes, "(p d) -> p d", d=self.num_voted)
        places = torch.arange(len(queries), device=queries.device) % len(table)
        room = at_once(PRODUCT, queries.device) // max(1, len(self.owner))
        size = max(16, room // 16 * 16)  # sixteens are the fastest
        blocks = zip(queries.split(size), logits.split(size), places.split(size), strict=True)
        return torch.cat([self.gated(q, found, table[p], members) for q, found, p in blocks])

    def _check_grid(self, H: int, W: int) -> None:
        fitted = len(self.votes) // self.num_voted if len(self.owner) else 0
        if fitted != H * W:
            raise ModelError(
                f"this PNI has votes of {fitted} positions, the features have {H} x {W}: fit and "
                "score at the same image size"
            )

    def _network_sees(self, features: Tensor) -> Tensor:
        return self.seen(self.reduced(features))


class _Exported(nn.Module):
    """`Pni` for a graph, which knows no number of images."""

    members: Tensor
    owner: Tensor
    votes: Tensor

    def __init__(self, detector: Pni) -> None:
        super().__init__()
        # In a tuple: its first layer is here as a convolution already.
        self._detector = (detector,)
        self.reduced, self.seen = detector.reduced, detector.seen
        self.network = ExportedNetwork(detector.network)
        self.register_buffer("members", detector.members)
        self.register_buffer("owner", detector.owner)
        table = rearrange(detector.votes, "(p d) -> 1 p d", d=detector.num_voted)
        self.register_buffer("votes", table)

    def forward(self, features: Tensor) -> Scored | Tensor:
        """Return maps, and with `released` image scores, of features (B, C, H, W)."""
        (detector,) = self._detector
        _, _, H, W = features.shape
        reduced = self.reduced.in_graph(features)
        logits = self.network(self.seen.in_graph(reduced))  # (B * H * W, D)
        queries = rearrange(reduced, "b c h w -> (b h w) c")
        votes = rearrange(self.votes.expand(features.shape[0], -1, -1), "b p d -> (b p) d")
        members = Members(self.members, self.owner, detector.classes, F.linear)
        scores = detector.gated(queries, logits, votes, members)
        maps, images = detector.finished(scores, int(H), int(W))
        return maps if images is None else (maps, images)


METHOD = Method(
    detector=lambda: Pni,
    options=PniOptions(),
    tasks=frozenset({"structured"}),  # a pooled feature has no position and no neighbours
    published_as="PNI",
    # Paper: images of 512, cropped to 480, with 5 x 5 patches, maps blurred by 8 pixels.
    experiment={
        "structured": {
            "backbone": "wide_resnet101_2.tv_in1k",
            "layers": (2, 3),
            "image_size": 512,
            "crop_size": 480,
            "patch_size": 5,
            "blur_sigma": 8.0,
        },
        # Ours: its weights come with a package, and the images are small.
        "demo": {"backbone": "tf_efficientnet_lite0", "image_size": 224, "crop_size": None},
    },
)
