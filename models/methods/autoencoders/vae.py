"""A variational autoencoder on the network of `autoencoder`.

Source: "Auto-Encoding Variational Bayes" (Kingma and Welling, ICLR 2014), which detects nothing;
as a detector of anomalies a VAE is one of the baselines of "Improving Unsupervised Defect
Segmentation by Applying Structural Similarity to Autoencoders" (Bergmann et al., VISAPP 2019), on
the network of that paper, with six samples of the code of a test image. Numbers are of this
configuration: the first paper's network is fully connected and its data are digits and faces.

| paper | here | meaning |
| --- | --- | --- |
| q(z given x) | mean, log_var | of a Gaussian with independent numbers, from the encoder |
| p(x given z) | decoder, deviation | a Gaussian around what is rebuilt, of a fixed deviation |
| -L(x) | loss | reconstruction + beta * KL, summed over pixels and the code, mean over the batch |

The map is the squared error, averaged over channels and over the samples of the code. Their noise
is drawn once, in the fit, and is the same for every image and window, so that scores depend on
nothing else. The deviation is ours, and so is that the logarithm of the variance is kept within 10
of 0; what is constant in the likelihood is left out of the loss.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from configs.options import NotNegative, NotNegativeInt, Positive
from models.detector import FeatureShape
from models.method import Method
from models.methods.autoencoders.networks import build_decoder, build_encoder
from models.methods.autoencoders.reconstruction import Reconstruction, ReconstructionOptions
from models.training.loop import Losses

MOST_LOG_VAR = 10.0


@dataclass(frozen=True, kw_only=True)
class VaeOptions(ReconstructionOptions):
    """VAE: an autoencoder with a normal prior on its code."""

    beta: NotNegative = 1.0
    """Weight of the divergence from the prior (Kingma and Welling: 1)."""
    deviation: Positive = 0.1
    """Standard deviation of a pixel around what is rebuilt, in 0 to 1 (ours)."""
    samples: NotNegativeInt = 6
    """Codes drawn for a scored image (Bergmann et al.); 0 takes the mean code alone."""


class Vae(Reconstruction):
    """A variational autoencoder; its map is the squared error.

    Attributes:
        code_noise: standard normal, of the samples of every scored image, (samples, code_dim).
    """

    options: VaeOptions
    code_noise: Tensor

    def __init__(self, features: FeatureShape, options: VaeOptions) -> None:
        super().__init__(options)
        del features  # this method brings its own network
        size, width, code_dim = options.network_size, options.width, options.code_dim
        self.encoder = build_encoder(size, width, 2 * code_dim)
        self.decoder = build_decoder(size, width, code_dim)
        self.register_buffer("code_noise", torch.zeros(options.samples, code_dim))
        self.eval()  # a loaded head scores; only `fit` trains

    def prepare(self, generator: torch.Generator) -> None:
        """Draw the noise of the samples."""
        self.code_noise.copy_(torch.randn(self.code_noise.shape, generator=generator))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the codes, (B, D) each, of (B, 3, size, size)."""
        found = rearrange(self.encoder(pixels), "b d 1 1 -> b d").float()
        mean, log_var = found.chunk(2, dim=1)
        return mean, log_var.clamp(-MOST_LOG_VAR, MOST_LOG_VAR)

    def decode(self, codes: Tensor) -> Tensor:
        """Return what is rebuilt, (B, 3, size, size), of codes (B, D)."""
        return self.decoder(rearrange(codes, "b d -> b d 1 1")).float()

    def losses(self, pixels: Tensor, noise: torch.Generator) -> Losses:
        """See `Reconstruction.losses`."""
        mean, log_var = self.encode(pixels)
        drawn = torch.randn(mean.shape, generator=noise, device=mean.device)
        rebuilt = self.decode(mean + (log_var / 2).exp() * drawn)
        errors = (pixels - rebuilt).square().sum(dim=(1, 2, 3))  # (B,)
        reconstruction = errors.mean() / (2 * self.options.deviation**2)
        kl = kl_to_prior(mean, log_var).mean()
        loss = reconstruction + self.options.beta * kl
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl}

    def compare(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Reconstruction.compare`; the reconstruction is the mean of the samples'."""
        mean, log_var = self.encode(pixels)
        L = self.options.samples
        if L == 0:
            rebuilt = self.decode(mean)
            return rebuilt, (pixels - rebuilt).square().mean(dim=1)
        scale = (log_var / 2).exp()
        codes = mean.unsqueeze(1) + scale.unsqueeze(1) * self.code_noise  # (B, L, D)
        rebuilt = self.decode(rearrange(codes, "b l d -> (b l) d"))  # (B * L, 3, size, size)
        errors = (repeat(pixels, "b c h w -> (b l) c h w", l=L) - rebuilt).square().mean(dim=1)
        maps = rearrange(errors, "(b l) h w -> b l h w", l=L).mean(dim=1)  # (B, size, size)
        return rearrange(rebuilt, "(b l) c h w -> b l c h w", l=L).mean(dim=1), maps


def kl_to_prior(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return the divergence (B,) of Gaussians of mean and log-variance (B, D) from N(0, I)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(dim=1)


METHOD = Method(
    detector=lambda: Vae,
    options=VaeOptions(),
    takes=frozenset({"images"}),
    # As the autoencoder; maps of squared errors are blurred as everywhere in the suite.
    experiment={
        "structured": {
            **{"backbone": "lenet", "layers": (0,), "image_size": 256, "crop_size": None},
        },
        "semantic": {"backbone": "lenet", "layers": (0,), "image_size": 32, "crop_size": None},
    },
    # Ours: another class differs as a whole.
    on={"semantic": {"network_size": 32, "crops": False, "image_score": "mean"}},
    ignores=frozenset({"backbone", "weights", "layers", "feature_location"}),
)
