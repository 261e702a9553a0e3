"""NoCo without epochs: the exact solution of its training, from one pass over the features.

For the squared loss E||W f~ - G||^2 with f~ = [f; 1] (the projector with its bias as last column),
C = E[f~ f~'] and m = E[f~], full-batch gradient flow reads dW/ds = -(W C - G m'). The last entry
of f~ is 1, so m is the last column of C, m = C e with e the last unit vector, and the solution is

    W(s) = G e' + (W0 - G e') exp(-C s).

(It equals W0 exp(-C s) + G b', b = C^+ (I - exp(-C s)) m, since C^+ C e and e differ only where
I - exp(-C s) vanishes; no pseudo-inverse is needed, and a singular C is no special case.) So for a
feature f the residual is

    W(s) f~ - G = (W0 - G e') exp(-C s) f~,

and, over the entries of W0 (independent, mean 0, variance v, o rows),

    E ||W(s) f~ - G||^2 = o v ||exp(-C s) f~||^2 + ||G||^2 (e' exp(-C s) f~)^2.

That is a spectral filter of the normal second moment: directions that normal features fill are
suppressed, the rest stays. PyTorch draws W0 with v = 1 / (3 D), so o v = 1/3 for o = D. Plain
gradient descent with step eta on the mean loss reaches s = 2 eta steps.

| symbol | here |
| --- | --- |
| C | second moment, `_sums` divided by `_counts` |
| s | `time` / trace(C), so that times compare across backbones |
| G, ||G|| | objective, norm |
| exp(-C s) with both terms | `filters`: the score is ||filter f~||^2 |

With prototypes there is one centre and one second moment about it for each group of normal
features, and a feature's score is the smallest over its `nearest` centres.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import FeatureOptions, OnlyWith, Positive, PositiveInt
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.features.kmeans import kmeans_centres
from models.features.matmul import add_product, at_once, full_precision
from models.features.multiscale import (
    add_second_moment,
    grid_size,
    join_stages,
    mirrored,
    parts_in_cache,
    project,
)
from models.method import Method
from models.methods.noco_cf.sorted_by_centre import Exported, nearest, offsets_from, smallest

SEVERAL = OnlyWith("prototypes", "above 1", lambda prototypes: prototypes > 1)
FEW_CHANNELS = 4096
"""Channels of the images whose second moment is added at once, in all: as few as fit the cache."""
MANY_CHANNELS = 16384
"""The same where the positions are shared out among centres: each should get many."""
_BLOCK = 2048
"""Positions whose products are summed in float32, all others in float64: few enough that, whatever
the processor's order, what is lost stays below 1e-7 of the trace."""


@dataclass(frozen=True, kw_only=True)
class NocoExactOptions(FeatureOptions):
    """The closed form of NoCo: one pass, no epochs, no learning rate, no seed but for k-means."""

    norm: Positive = 1.0
    """Euclidean norm of the objective G; weighs the second term of the score."""
    loss: Literal["distance", "squared"] = "distance"
    """Score by the root of the expected squared distance of Z to G, or by itself."""
    time: tuple[float, ...] = (1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4, 1e5)
    """Training times t, s = t / trace(C), ascending; each is visited, the last is `last`."""
    prototypes: PositiveInt = 1
    """Centres of normal features with a second moment each; 1 is the plain method, no centre."""
    nearest: Annotated[PositiveInt, SEVERAL] = 3
    """Centres each feature is compared with."""
    kmeans_positions: Annotated[PositiveInt, SEVERAL] = 20_000
    """Normal features the centres are found on."""
    sample_w0: bool = False
    """Draw one W0 and one objective, as training does, instead of the expectation over them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ascends = list(self.time) == sorted(set(self.time)) and all(map(math.isfinite, self.time))
        if not (self.time and ascends and self.time[0] > 0):
            raise ValueError(f"--method.time {self.time} must be ascending and above 0")

    @property
    def learns_online(self) -> bool:
        """Sums over images are what the plain method is made of; centres and deviations are not."""
        return self.prototypes == 1 and self.feature_norm != "std"


class NocoExact(Detector):
    """The norm-constrained detector solved in closed form.

    With `learns_online` options it learns online.

    Attributes:
        centres: (K, D) float32, zero for K = 1.
        filters: (K, R, D + 1) float32; R = D + 2, or D with `sample_w0`.
    """

    centres: Tensor
    filters: Tensor

    def __init__(self, features: FeatureShape, options: NocoExactOptions) -> None:
        super().__init__()
        self.options = options
        self.nearest = min(options.nearest, options.prototypes)
        K, D = options.prototypes, features.channels
        rows = D if options.sample_w0 else D + 2
        self.register_buffer("centres", torch.zeros(K, D))
        self.register_buffer("filters", torch.zeros(K, rows, D + 1))
        # The sums are working memory of the fit, not part of the head.
        self._sums = torch.zeros(0)
        self._counts = torch.zeros(0)
        self._initial = torch.zeros(0)
        self._spectrum = (torch.zeros(0), torch.zeros(0))

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Accumulate the second moments in one pass and solve; see `Detector.fit`.

        With prototypes the features are read twice, the first time for k-means. The generator is
        used for k-means and `sample_w0` only: the plain expectation needs no seed.
        """
        self._forget(generator)
        K, positions = len(self.centres), self.options.kmeans_positions
        if K > 1:
            self.centres.copy_(kmeans_centres(bank, K, positions=positions, generator=generator))
        channels = at_once(FEW_CHANNELS, self.centres.device) if K == 1 else MANY_CHANNELS
        for stages in bank.stage_batches(max(1, channels // bank.channels)):
            self.partial_fit(stages)
        self._spectrum = values, vectors = self.decompose()
        times = self.options.time
        for step, time in enumerate(times, start=1):
            if monitor is not None or step == len(times):
                self.set_time(time, values, vectors)
            if monitor is not None:
                monitor(step, {"time": time})

    def steps(self) -> list[dict[str, float]]:
        """The times, which share a projection on the eigenvectors; see `KnowsSteps.steps`."""
        return [] if self.options.sample_w0 else [{"time": time} for time in self.options.time]

    def score_steps(self, stages: Sequence[Tensor]) -> Tensor:
        """See `KnowsSteps.score_steps`: one product with the eigenvectors serves every time."""
        values, vectors = self._spectrum  # (K, D+1), (K, D+1, D+1)
        times = torch.tensor(self.options.time, dtype=values.dtype, device=values.device)
        decay = torch.exp(-rearrange(values, "k d -> k d 1") * times)  # (K, D+1, T)
        first = (decay.square() / 3).float()
        last = (self.options.norm * decay * rearrange(vectors[:, -1], "k d -> k d 1")).float()
        rotation = vectors.mT.float()

        def energies(rotated: Tensor, k: int) -> Tensor:
            along = (rotated @ last[k]).square_()  # (P, T)
            return along.addmm_(rotated.square_(), first[k])

        return rearrange(self._scores(stages, rotation, energies), "b h w t -> t b h w")

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is one of the times; see `Detector.stopped_at`."""
        return {"time": (self.options.time[step - 1],)}

    def start(self, generator: torch.Generator) -> None:
        """Forget what was fitted; see `LearnsOnline.start`.

        Raises:
            ModelError: with prototypes, whose centres come from k-means on all normal features.
        """
        if len(self.centres) > 1:
            raise ModelError("prototypes are centres of all features at once", {"prototypes": "1"})
        self._forget(generator)

    def _forget(self, generator: torch.Generator) -> None:
        K, rows, columns = self.filters.shape
        device = self.filters.device
        self._sums = torch.zeros(K, columns, columns, dtype=torch.float64, device=device)
        self._counts = torch.zeros(K, dtype=torch.float64, device=device)
        if self.options.sample_w0:
            bound = 1 / math.sqrt(columns - 1)
            weight = torch.empty(rows, columns, dtype=torch.float64)
            weight.uniform_(-bound, bound, generator=generator)
            objective = torch.randn(rows, dtype=torch.float64, generator=generator)
            weight[:, -1] -= self.options.norm * objective / objective.norm()
            self._initial = weight.to(device)  # W0 - G e'

    def partial_fit(self, stages: Sequence[Tensor]) -> None:
        """Add normal features, stages (B, C_l, H_l, W_l), to the sums; the next `solve` knows them.

        Adding images one at a time or all at once gives the same sums up to rounding: float64, but
        for the products of a block about one of several centres. Those are float32 as the features
        are, off by about 3e-8 of the trace; that the features were stored as halves, by 1e-6.
        """
        if len(self.centres) == 1:  # it is zero
            H, W = grid_size(stages)
            add_second_moment(self._sums[0], stages)
            self._counts += len(stages[0]) * H * W
            return
        positions = rearrange(join_stages(stages), "b c h w -> (b h w) c")  # (P, D)
        owner = nearest(positions, self.centres, 1)[:, 0]  # (P,)
        sizes = torch.bincount(owner, minlength=len(self.centres))
        product = torch.empty_like(self._sums[0, :-1, :-1], dtype=positions.dtype)
        with full_precision(positions.device):
            for k, rows in enumerate(owner.argsort().split(sizes.tolist())):
                offsets = offsets_from(self.centres[k], positions, rows)  # (M, D)
                for block in offsets.split(_BLOCK):
                    add_product(product.zero_(), block, block)
                    self._sums[k, :-1, :-1] += product
                self._sums[k, :-1, -1] += offsets.sum(dim=0, dtype=torch.float64)
                self._sums[k, -1, -1] += len(rows)
        self._counts += sizes

    def solve(self) -> None:
        """Set the filters from the sums at the last of the times."""
        self.set_time(self.options.time[-1], *self.decompose())

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (K, D+1), divided by the mean trace, and eigenvectors of C."""
        if self._counts.sum() == 0:
            raise ModelError("no normal feature was seen; fit first")
        counts = self._counts.clamp_min(1)
        moments = mirrored(self._sums) / rearrange(counts, "k -> k 1 1")  # (K, D+1, D+1)
        traces = moments.diagonal(dim1=1, dim2=2).sum(dim=1)  # (K,)
        # One time scale for all centres, so that their scores compare.
        trace = (traces * counts).sum() / counts.sum()
        values, vectors = torch.linalg.eigh(moments / trace)
        return values.clamp_min(0), vectors

    def set_time(self, time: float, values: Tensor, vectors: Tensor) -> None:
        """Set the filters to exp(-C s) at s = time / trace(C), both terms of the score."""
        decay = rearrange(torch.exp(-values * time), "k d -> k d 1")
        if self.options.sample_w0:
            flow = vectors @ (decay * vectors.mT)  # (K, D+1, D+1)
            self.filters.copy_(self._initial @ flow)
            return
        # The rotation out of the eigenbasis changes no length, so the first term does without it.
        spectrum = decay * vectors.mT  # (K, D+1, D+1)
        last = vectors[:, -1:, :] @ spectrum  # (K, 1, D+1), e' exp(-C s)
        first_weight = math.sqrt(1 / 3)  # o v for PyTorch's initialisation
        self.filters.copy_(torch.cat([first_weight * spectrum, self.options.norm * last], dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Return the (root of the) expected squared distance at each position, (B, H, W)."""
        B, _, H, W = features.shape
        positions = rearrange(features, "b c h w -> (b h w) c")  # (P, D)
        if len(self.centres) == 1:  # it is zero
            weight, bias = self.filters[0, :, :-1], self.filters[0, :, -1]
            scores = _energy(F.linear(positions, weight, bias))  # (P, 1)
        else:
            scores = smallest(
                positions, self.centres, self.filters, self.nearest, _energy
            )  # (P, 1)
        if self.options.loss == "distance":
            scores = scores.sqrt()
        return rearrange(scores, "(b h w) 1 -> b h w", b=B, h=H, w=W)

    def score_stages(self, stages: Sequence[Tensor]) -> Scored:
        """See `Detector.score_stages`."""
        return self._scores(stages, self.filters, _energy).squeeze(3), None  # (B, H, W)

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        if len(self.centres) == 1:
            return self
        return Exported(
            self.centres, self.filters, self.nearest, takes_root=self.options.loss == "distance"
        )

    def _scores(
        self, stages: Sequence[Tensor], matrices: Tensor, energies: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """Return the smallest energies (or their roots) over each position's nearest centres.

        Args:
            stages: (B, C_l, H_l, W_l) each.
            matrices: (K, R, D + 1), one for the offsets [f; 1] from each centre.
            energies: T energies (M, T) of products (M, R) with the k-th matrix.

        Returns:
            (B, H, W, T).
        """
        H, W = grid_size(stages)
        if len(self.centres) == 1:  # it is zero, so that the stages need not be joined
            found = []
            for part in parts_in_cache(stages, matrices.shape[1]):
                product = project(part, matrices[0, :, :-1], matrices[0, :, -1])  # (b, H, W, R)
                found.append(energies(rearrange(product, "b h w r -> (b h w) r"), 0))
            scores = torch.cat(found)  # (P, T)
        else:
            positions = rearrange(join_stages(stages), "b c h w -> (b h w) c")  # (P, D)
            scores = smallest(positions, self.centres, matrices, self.nearest, energies)  # (P, T)
        if self.options.loss == "distance":
            scores = scores.sqrt()
        return rearrange(scores, "(b h w) t -> b h w t", h=H, w=W)


def _energy(filtered: Tensor, k: int = 0) -> Tensor:
    """Return the squared lengths (P, 1) of features behind the filters, (P, R)."""
    del k  # every centre's filter has its weights in it
    return torch.linalg.vector_norm(filtered, dim=1, keepdim=True).square_()


METHOD = Method(
    detector=lambda: NocoExact,
    options=NocoExactOptions(),
    experiment={
        # Prototypes are measured on the strides 8 and 16; the stem's neighbour adds cost, not
        # accuracy.
        "structured": {"layers": (2, 3), "select": "synthetic"},
        "semantic": {"select": "synthetic"},
    },
    on={
        # Pooled features: the norm is nuisance and one centre is enough.
        "semantic": {
            "feature_norm": "l2",
            "prototypes": 1,
            "time": (1e1, 1e2, 1e3, 1e4),
            "loss": "squared",
        }
    },
)
