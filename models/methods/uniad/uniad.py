"""UniAD: rebuild each token of an image from tokens that are not its neighbours.

Source: "A Unified Model for Multi-class Anomaly Detection" (You et al., NeurIPS 2022) and its
released code, whose configuration for MVTec AD gives the defaults. The paper fits one head for all
categories, `--protocol multi-class` here; a head for each category is its "separate" case.

A network that rebuilds normal features learns to copy, and copies anomalies. Three things are
against it: attention that sees no neighbour of a token, the token itself included; a decoder whose
every layer starts from a learned query; and noise on the training features, which are to be rebuilt
without it. The encoder still adds each token to what it attends to: a copy within an image gets
past an encoder layer, but past no decoder layer.

| paper | here | meaning |
| --- | --- | --- |
| f_org | tokens | all stages at one grid, concatenated, (B, H*W, C) |
| f_tok + D, D ~ N(mu, (alpha ||f_tok||_2 / C)^2) | jittered | noise on training features; mu = 0 |
| alpha, p | jitter, jitter_probability | scale and probability of the noise |
| f_rec | rebuilt | what the transformer makes of them |
| L | loss | mean squared difference of f_rec and f_org |
| s | map | Euclidean norm of the difference at each token, then upsampled |

The published numbers take more than the head: the epoch is the best by pixel AUROC on the test set
(`--select best_test`), and a category's AUROC below 0.5 is flipped, which nothing here does. In the
released code the layers start as copies of each other in their queries and in the projections of
attention's inputs; here each is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs.options import (
    Bound,
    FeatureOptions,
    Fraction,
    NotNegative,
    NotNegativeInt,
    OnlyWith,
    OptionalInt,
    Positive,
    PositiveInt,
    Share,
)
from models.detector import Detector, FeatureShape, FeatureSource, Monitor, Scored
from models.errors import ModelError
from models.method import Method
from models.methods.uniad.network import Dropout, Transformer, blocks_everything
from models.training.generators import derived
from models.training.loop import Loop, Losses

UPSAMPLED = 16
"""Pixels of a map for each token along an axis, and the side of the window that image scores
average over (released)."""
RATE_DROP = 0.1
"""Factor of the learning rate after each `lr_step` epochs (released)."""
MOST_TOKENS = 2304
"""Of a grid: attention takes memory with their square."""
TRIVIAL_SHARE = 0.95
"""Of the loss of one answer for all images, the best: a network above it has learned little."""
ODD = Bound("odd", lambda value: value % 2 == 1)
JITTERED = OnlyWith("jitter", "above 0", lambda jitter: jitter > 0)


@dataclass(frozen=True, kw_only=True)
class UniadOptions(FeatureOptions):
    """UniAD: a transformer rebuilds features from others than their neighbours."""

    grid: OptionalInt = None
    """Side of the grid of tokens; none for the grid of the coarsest stage (released: 14, which is
    that of stride 16)."""
    neighbourhood: Annotated[OptionalInt, ODD] = 7
    """Side of the window around a token that no attention sees (released: 7); none for no mask."""
    hidden: PositiveInt = 256
    """Width of the transformer: even, and a multiple of the heads (released)."""
    encoder_layers: NotNegativeInt = 4
    """Layers of the encoder (released)."""
    decoder_layers: NotNegativeInt = 4
    """Layers of the decoder, each with its own query (released)."""
    heads: PositiveInt = 8
    """Heads of each attention (released)."""
    feed_forward: PositiveInt = 1024
    """Inner width of each layer's feed-forward network (released)."""
    dropout: Fraction = 0.1
    """Of attention's weights and of what each part of a layer adds (released)."""
    jitter: NotNegative = 20.0
    """alpha: the noise on training features has this deviation, times a token's norm, divided by
    the number of channels (released: 20); 0 for none."""
    jitter_probability: Annotated[Share, JITTERED] = 1.0
    """Probability that a batch is jittered (released)."""
    image_score: Literal["pooled_max", "mean"] = "pooled_max"
    """Maximum of the map after averaging over windows of 16 x 16 pixels, or mean of the map
    (released: the first for MVTec AD, the second for CIFAR-10)."""
    learning_rate: Positive = 1e-4
    """Of AdamW (released)."""
    weight_decay: NotNegative = 1e-4
    """Of AdamW (released)."""
    lr_step: PositiveInt = 800
    """Epochs after which the learning rate is a tenth, each time (released: after 800 of 1000)."""
    clip_norm: Positive = 0.1
    """Norm that the gradient of all parameters has at most (released)."""
    batch_size: PositiveInt = 8
    """Images per step (released: 8 on each GPU for MVTec AD, 16 for CIFAR-10)."""
    epochs: PositiveInt = 1000
    """Passes over the training features (released)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % 2 or self.hidden % self.heads:
            raise ValueError(
                f"--method.hidden {self.hidden} must be even and a multiple of --method.heads "
                f"{self.heads}"
            )
        if self.encoder_layers + self.decoder_layers == 0:
            raise ValueError(
                "--method.encoder-layers and --method.decoder-layers are both 0; one must be above"
            )


class Uniad(Detector):
    """Distance of tokens to what a transformer makes of the others.

    Stages are kept apart until each is resized to the grid of tokens, corners on corners
    (released). The grid is that of the fit: features of other sizes are resized to it. Maps have
    `UPSAMPLED` times the sides of the grid, by an upsampling that puts corners on corners as well,
    which is the size of the image where the coarsest stage has stride 16; blur is none of the
    method's.

    Attributes:
        remarks: that there is a single token, or that the network hardly looks at the image.
    """

    def __init__(self, features: FeatureShape, options: UniadOptions) -> None:
        super().__init__()
        self.options = options
        self.num_stages = len(features.stage_channels)
        self.network = Transformer(
            features.channels,
            width=options.hidden,
            heads=options.heads,
            inner=options.feed_forward,
            num_encoder=options.encoder_layers,
            num_decoder=options.decoder_layers,
            neighbourhood=options.neighbourhood,
        )
        self.eval()

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Train the transformer; see `Detector.fit`.

        Raises:
            FloatingPointError: the loss left the finite numbers.
            ModelError: the grid has too few tokens for the mask, or too many for attention.
        """
        options = self.options
        H, W = self._choose_grid(next(iter(bank.stage_batches(1))))
        self.network.start(H, W, generator)
        parameters = list(self.parameters())
        # A generator of their own: the images come in the same order whatever is drawn of them.
        noise = derived(generator, parameters[0].device)
        drop = Dropout(options.dropout, noise)
        optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        loop = Loop(
            module=self,
            optimizer=optimizer,
            epochs=options.epochs,
            generator=generator,
            drawn={"noise": noise},
            rate=lambda passed: RATE_DROP ** (passed // options.lr_step),
            clip_norm=options.clip_norm,
        )

        def losses(stages: list[Tensor]) -> Losses:
            tokens = self.tokens(stages)
            return {"loss": F.mse_loss(self.network(self.jittered(tokens, noise), drop), tokens)}

        trained = loop.run(
            lambda: bank.stage_batches(options.batch_size, generator=generator),
            losses,
            monitor=monitor,
        )
        last = trained.values[-1]["loss"]
        constant = self._loss_of_means(bank)
        if last > TRIVIAL_SHARE * constant:
            self.remarks.append(
                f"Training ended hardly better than with one answer for all images: the loss is "
                f"{last:.4g}, that of each position's mean token {constant:.4g}. Try more "
                "--method.epochs or a larger --method.learning-rate; of a texture without order "
                "nothing more may be known."
            )

    def tokens(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the stages' maps (B, C_l, H_l, W_l) as tokens of the fitted grid, (B, H*W, C)."""
        size = self.network.grid
        resized = [
            stage.float()
            if stage.shape[2:] == size
            else F.interpolate(stage.float(), size, mode="bilinear", align_corners=True)
            for stage in stages
        ]
        return torch.cat([rearrange(part, "b c h w -> b (h w) c") for part in resized], dim=2)

    def jittered(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Return tokens (B, N, C) with Gaussian noise in proportion to the norm of each."""
        options = self.options
        if options.jitter == 0:
            return tokens
        noise = torch.empty_like(tokens).normal_(generator=generator)
        deviation = tokens.norm(dim=2, keepdim=True) * (options.jitter / tokens.shape[2])
        if options.jitter_probability < 1:
            # A product, as a branch would wait for the device.
            draw = torch.rand((), generator=generator, device=tokens.device)
            deviation = deviation * (draw < options.jitter_probability)
        return tokens.addcmul(noise, deviation)

    def forward(self, features: Tensor) -> Tensor:
        """Return maps (B, 16 H, 16 W) of joined features, which are one stage."""
        return self.score_stages([features])[0]

    def score(self, features: Tensor) -> Scored:
        """Return maps and image scores of joined features, which are one stage."""
        return self.score_stages([features])

    def score_stages(self, stages: Sequence[Tensor]) -> Scored:
        """See `Detector.score_stages`; maps are (B, 16 H, 16 W) for a grid of H x W tokens."""
        H, W = self.network.grid
        tokens = self.tokens(stages)
        distances = torch.linalg.vector_norm(self.network(tokens) - tokens, dim=2)  # (B, H*W)
        maps = F.interpolate(
            rearrange(distances, "b (h w) -> b 1 h w", h=H, w=W),
            (UPSAMPLED * H, UPSAMPLED * W),
            mode="bilinear",
            align_corners=True,
        )  # (B, 1, 16 H, 16 W)
        if self.options.image_score == "mean":
            return maps[:, 0], maps.mean(dim=(1, 2, 3))
        # Window by window would be 16 times the additions.
        pooled = F.avg_pool2d(F.avg_pool2d(maps, (UPSAMPLED, 1), 1), (1, UPSAMPLED), 1)
        return maps[:, 0], pooled.amax(dim=(1, 2, 3))

    def stopped_at(self, step: int) -> dict[str, Any]:
        """A step is an epoch; see `Detector.stopped_at`."""
        return {"epochs": step}

    def exported(self) -> nn.Module:
        """See `Detector.exported`."""
        return _Exported(self).eval()

    @torch.no_grad()
    def _loss_of_means(self, bank: FeatureSource) -> float:
        """Return the loss of answering each position's mean token: their variance."""
        total: Tensor | None = None
        for stages in bank.stage_batches(self.options.batch_size):
            tokens = self.tokens(stages).double()
            sums = torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)])  # (2, N, C)
            total = sums if total is None else total + sums
        assert total is not None
        mean, square = total / len(bank)  # (N, C) each
        return (square - mean.square()).mean().item()

    def _choose_grid(self, stages: Sequence[Tensor]) -> tuple[int, int]:
        """Return the grid of tokens, of a batch.

        Raises:
            ModelError: it cannot be used.
        """
        options = self.options
        H, W = min((tuple(stage.shape[2:]) for stage in stages), key=lambda size: size[0] * size[1])
        if options.grid is not None:
            H = W = options.grid
        elif len(stages) < self.num_stages and options.feature_norm != "none" and H * W > 1:
            raise ModelError(
                f"features under --method.feature-norm {options.feature_norm} come at the finest "
                f"stage's grid, {H} x {W}, and the coarsest one's is not known: name the side of "
                "the grid of tokens, --method.grid 14"
            )
        if H * W > MOST_TOKENS:
            raise ModelError(
                f"a grid of {H} x {W} has {H * W:,} tokens, more than the {MOST_TOKENS:,} that "
                "attention is made for: --method.grid 14, or --layers with a coarser stage"
            )
        window = options.neighbourhood
        if window is not None and blocks_everything(H, W, window):
            least = 2 * (max(H, W) // 2) - 1
            smaller = f"--method.neighbourhood {least}, or " if least > 0 else ""
            raise ModelError(
                f"on a grid of {H} x {W} tokens a window of --method.neighbourhood {window} leaves "
                f"the one in the middle nothing to attend to: {smaller}--method.neighbourhood none"
            )
        self.remarks = []
        if H * W == 1:
            self.remarks = ["The grid has one token, which attends to itself alone."]
        return H, W


class _Exported(nn.Module):
    """`Uniad` for a graph: it takes the stages, not joined features."""

    takes_stages = True

    def __init__(self, detector: Uniad) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, stages: Sequence[Tensor]) -> Scored:
        """Return maps and image scores of the stages' maps."""
        return self.detector.score_stages(stages)


METHOD = Method(
    detector=lambda: Uniad,
    options=UniadOptions(),
    published_as="UniAD",
    # Released: whole images, stages of strides 2 to 16, weights trained with AutoAugment.
    experiment={
        "structured": {
            "backbone": "tf_efficientnet_b4.aa_in1k",
            "layers": (0, 1, 2, 3),
            "image_size": 224,
            "crop_size": None,
            "resize": "bilinear_shorter",
            "patch_size": 1,
            "blur_sigma": 0.0,
        },
        "demo": {"backbone": "tf_efficientnet_lite0"},  # ours: its weights come with a package
    },
    # A pooled image is one token; score and batch are those released for CIFAR-10.
    on={"semantic": {"neighbourhood": None, "image_score": "mean", "batch_size": 16}},
)
