"""AnomalyNCD: finds kinds of defects that have no names, beside other defects that have some.

Source: "AnomalyNCD: Towards Novel Anomaly Class Discovery in Industrial Scenarios" (Huang et al.,
CVPR 2025) and its released code. The pieces to tell apart are trained on: those with labels show
other defects, of another product; those without are the ones that kinds are looked for in. How many
kinds there are has to be known, the normal one among them. Their numbers mean nothing by
themselves.

A mask-guided vision transformer gives a class token; several classifiers of unit directions take
its cosines with K = labelled + new kinds. What they are trained by is in `losses`.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.anomalyncd import AnomalyNcdOptions
from models.detector import Monitor
from models.discovery.anomalyncd.heads import Heads
from models.discovery.anomalyncd.losses import (
    STUDENT_TEMPERATURE,
    Losses,
    batch_losses,
    normality_of,
)
from models.discovery.anomalyncd.mgvit import MaskGuidedViT
from models.discovery.anomalyncd.sampling import draw_epoch
from models.discovery.anomalyncd.schedules import learning_rates, teacher_temperatures
from models.discovery.anomalyncd.token_sources import (
    FreshTokens,
    Sight,
    StoredTokens,
    Tokens,
    TokenSource,
    temporary_folder,
)
from models.discovery.pieces import Piece
from models.errors import ModelError
from models.training.epochs import epochs, mean_of_finite
from models.training.mixed_precision import bfloat16_autocast


class AnomalyNcd(nn.Module):
    """Sorts pieces of images into new kinds of defects.

    `state_dict` holds what was trained and which head was chosen, nothing of the frozen backbone.

    Args:
        options: of the method.
        labelled_kinds: of defects with labels, at least 1.
        new_kinds: that the others are sorted into, the normal one among them, at least 1.

    Attributes:
        diagnostics: of the last fit: "head_losses", by which the head was chosen.

    Raises:
        ModelError: the backbone or its weights cannot be used, or there are no kinds.
    """

    chosen_head: Tensor

    def __init__(self, options: AnomalyNcdOptions, *, labelled_kinds: int, new_kinds: int) -> None:
        super().__init__()
        if labelled_kinds < 1 or new_kinds < 1:
            raise ModelError(
                f"AnomalyNCD needs kinds with labels and new ones, not {labelled_kinds} and "
                f"{new_kinds}"
            )
        self.options = options
        self.labelled_kinds = labelled_kinds
        self.vit = MaskGuidedViT(
            options.backbone,
            options.weights,
            options.image_size,
            mask_layers=options.mask_layers,
            trained_blocks=options.trained_blocks,
        )
        self.heads = Heads(self.vit.width, labelled_kinds + new_kinds, options.heads)
        self.register_buffer("chosen_head", torch.tensor(-1))
        self.diagnostics: dict[str, list[float]] = {}
        self._sight = Sight(options.resize, options.image_size)
        self.eval()  # a loaded one predicts; only `fit` trains

    def fit(
        self,
        labelled: Sequence[tuple[Piece, int]],
        unlabelled: Sequence[Piece],
        *,
        generator: torch.Generator,
        monitor: Monitor | None = None,
    ) -> None:
        """Train from the backbone's weights, and choose a head by the last epoch without labels.

        Args:
            labelled: pieces and their kinds, from 0; scores of these do not count.
            unlabelled: the pieces to tell apart.
            generator: a CPU generator; every random number comes from it.
            monitor: is called after each epoch.

        Raises:
            FloatingPointError: the loss left the finite numbers; epoch and step are named.
            ModelError: there is no piece of one sort, a kind is out of range, or a file cannot be
                read.
        """
        options = self.options
        self._check(labelled, unlabelled)
        kinds = torch.tensor([kind for _, kind in labelled])
        scores = torch.tensor([piece.score for piece in unlabelled])
        normality = normality_of(scores, options.anomaly_threshold)
        self.chosen_head.fill_(-1)  # a fit that ends early knows no kinds
        self.vit.restore()
        self.heads.initialise(generator)
        optimizer = self._optimizer()
        rates = learning_rates(options.learning_rate, options.epochs)
        temperatures = teacher_temperatures(
            options.warmup_teacher_temperature,
            options.teacher_temperature,
            warmup=options.warmup_epochs,
            repeats=options.repeat_times,
            epochs=options.epochs,
        )
        pieces = [*(piece for piece, _ in labelled), *unlabelled]
        with ExitStack() as stack:
            source = self._source(pieces, generator, stack)
            bar = epochs(options.epochs, "AnomalyNCD, epochs")
            for epoch in bar:
                for group in optimizer.param_groups:
                    group["lr"] = rates[epoch - 1]
                draws = draw_epoch(len(labelled), len(unlabelled), options.batch_size, generator)
                rows = [torch.cat([one.labelled, len(kinds) + one.unlabelled]) for one in draws]
                steps = []
                for draw, tokens in zip(draws, source.epoch(rows, generator), strict=True):
                    own, others = kinds[draw.labelled], normality[draw.unlabelled]
                    steps.append(
                        self._step(optimizer, tokens, own, others, temperatures[epoch - 1])
                    )
                values = {
                    name: mean_of_finite([getattr(step, name) for step in steps], epoch)
                    for name in ("loss", "supervised", "pairs", "kinds")
                }
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                if monitor is not None:
                    monitor(epoch, values)
        by_head = torch.stack([step.unlabelled for step in steps]).double().mean(dim=0)  # (heads,)
        self.chosen_head.copy_(by_head.argmin())
        self.diagnostics = {"head_losses": by_head.tolist()}

    def probabilities(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the probability of each new kind for pieces, (N, new kinds), on the CPU.

        It is that of the chosen head; kinds with labels have none.

        Raises:
            ModelError: nothing was fitted or loaded, or a file cannot be read.
        """
        return self.probabilities_of(self.embed(pieces))

    @torch.no_grad()
    def probabilities_of(self, embeddings: Tensor) -> Tensor:
        """Return `probabilities` of pieces by what `embed` returned for them, (N, D)."""
        if self.chosen_head < 0:
            raise ModelError("AnomalyNCD was not fitted yet: it knows no kinds")
        cosines = self.heads.cosines(embeddings.to(self.chosen_head.device))
        new = cosines[int(self.chosen_head), :, self.labelled_kinds :]  # (N, new kinds)
        return F.softmax(new / STUDENT_TEMPERATURE, dim=-1).cpu()

    @torch.no_grad()
    def embed(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the class tokens of pieces at unit length, (N, D), on the CPU.

        Raises:
            ModelError: a file cannot be read.
        """
        found = [torch.empty(0, self.vit.width)]
        device = self.chosen_head.device
        for images, masks in self._sight.batches(_central(pieces, 2 * self.options.batch_size)):
            tokens = self.vit(images.to(device), masks.to(device))  # (B, D)
            found.append(F.normalize(tokens, dim=-1).cpu())
        return torch.cat(found)

    def _check(self, labelled: Sequence[tuple[Piece, int]], unlabelled: Sequence[Piece]) -> None:
        if not labelled or not unlabelled:
            raise ModelError(
                f"AnomalyNCD is trained on pieces with labels and on pieces without; there are "
                f"{len(labelled)} and {len(unlabelled)}"
            )
        for piece, kind in labelled:
            if not 0 <= kind < self.labelled_kinds:
                raise ModelError(
                    f"{piece.image} is of kind {kind}; with {self.labelled_kinds} labelled kinds "
                    f"these are 0 to {self.labelled_kinds - 1}"
                )

    def _optimizer(self) -> torch.optim.SGD:
        """Return SGD that lets matrices decay, and neither biases nor norms."""
        decaying = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        return torch.optim.SGD(
            [
                {"params": decaying, "weight_decay": self.options.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.options.learning_rate,
            momentum=self.options.momentum,
        )

    def _source(
        self, pieces: Sequence[Piece], generator: torch.Generator, stack: ExitStack
    ) -> TokenSource:
        """Return where tokens come from; a temporary folder is removed when the stack ends."""
        options = self.options
        if not options.stored_views:
            return FreshTokens(pieces, self._sight, self._frozen_tokens)
        source = StoredTokens(
            pieces,
            options.stored_views,
            Path(stack.enter_context(temporary_folder())),
            generator,
            sight=self._sight,
            make=self._frozen_tokens,
            batch_size=2 * options.batch_size,
            shape=(self.vit.num_tokens, self.vit.width),
        )
        stack.callback(source.close)
        return source

    def _frozen_tokens(self, images: Tensor, masks: Tensor) -> Tokens:
        """Run the frozen blocks; see `MakeTokens`."""
        device = self.chosen_head.device
        with bfloat16_autocast(device, wanted=self.options.mixed_precision):
            visible = self.vit.visible(masks.to(device))
            return Tokens(self.vit.frozen_tokens(images.to(device), visible), visible)

    def _step(
        self,
        optimizer: torch.optim.SGD,
        tokens: Tokens,
        kinds: Tensor,
        normality: Tensor,
        temperature: float,
    ) -> Losses:
        """Train by one batch, and return its losses without a graph."""
        device = self.chosen_head.device
        self.train()
        step = self.losses(tokens, kinds.to(device), normality.to(device), temperature)
        self.eval()
        optimizer.zero_grad(set_to_none=True)
        step.loss.backward()
        optimizer.step()
        return step.detached()

    def losses(
        self, tokens: Tokens, kinds: Tensor, normality: Tensor, temperature: float
    ) -> Losses:
        """Return the losses of a batch of B pieces, n_l with a label and then n_u without.

        Args:
            tokens: of their first views, then of their second ones.
            kinds: (n_l,) int64.
            normality: (n_u,); see `normality_of`.
            temperature: of the teacher.
        """
        options = self.options
        with bfloat16_autocast(kinds.device, wanted=options.mixed_precision):
            found = self.vit.class_token(tokens.values, tokens.visible)  # (2B, D)
            projections = self.heads.projection(found)
        # In float32: cosines differ by less than bfloat16 can tell.
        cosines = self.heads.cosines(found.float())  # (heads, 2B, K)
        return batch_losses(
            rearrange(projections.float(), "(v b) p -> v b p", v=2),
            rearrange(cosines, "h (v b) k -> h v b k", v=2),
            kinds,
            normality,
            labelled_kinds=self.labelled_kinds,
            teacher_temperature=temperature,
            sup_weight=options.sup_weight,
            entropy_weight=options.entropy_weight,
        )


def _central(pieces: Sequence[Piece], batch_size: int) -> list[list[tuple[Piece, tuple[int, ...]]]]:
    """Return batches of pieces of which only the central view is wanted."""
    starts = range(0, len(pieces), batch_size)
    return [[(piece, ()) for piece in pieces[i : i + batch_size]] for i in starts]
