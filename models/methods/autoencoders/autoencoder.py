"""The autoencoder that compares by structural similarity, or pixel by pixel.

Source: "Improving Unsupervised Defect Segmentation by Applying Structural Similarity to
Autoencoders" (Bergmann et al., VISAPP 2019). A squared error takes pixels one by one: it is large
along edges that are rebuilt a little aside, and small where a defect has the grey level of what it
covers. SSIM compares luminance, contrast and structure of the windows around each pixel, both as a
loss and as a map. `reconstruction` says what is done with images and what is different here.

| paper | here | meaning |
| --- | --- | --- |
| d | code_dim | numbers of the code |
| R | map | 1 - SSIM at each pixel, of 11 x 11 windows, in [0, 2]; or the squared error |
| L_SSIM, L_2 | loss | the map's sum over pixels, averaged over the batch; channels are averaged |

The sum matters because Adam adds the weight decay to the gradient: beside the gradient of a mean
over pixels a decay of 1e-5 is so large that it was seen to make all codes the same.

An independent implementation (TensorFlow) weakens the map on a border of 5 pixels, adds a map of
absolute errors, hides the background of some categories, and takes the decay of 1e-5 for one of the
learning rate: none of that is the paper's, nor done here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.detector import FeatureShape
from models.method import Method
from models.methods.autoencoders.networks import build_decoder, build_encoder
from models.methods.autoencoders.reconstruction import Reconstruction, ReconstructionOptions
from models.training.loop import Losses
from models.training.similarity import ssim_map


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(ReconstructionOptions):
    """Autoencoder: images through a code of one position, compared by SSIM or by pixels."""

    loss: Literal["ssim", "l2"] = "ssim"
    """What is minimised and makes the map: structural similarity, or the squared error (paper)."""


class Autoencoder(Reconstruction):
    """An autoencoder whose map is what it is trained to keep small."""

    def __init__(self, features: FeatureShape, options: AutoencoderOptions) -> None:
        super().__init__(options)
        del features  # this method brings its own network
        self.by_structure = options.loss == "ssim"
        size, width, code_dim = options.network_size, options.width, options.code_dim
        self.encoder = build_encoder(size, width, code_dim)
        self.decoder = build_decoder(size, width, code_dim)
        self.eval()  # a loaded head scores; only `fit` trains

    def losses(self, pixels: Tensor, noise: torch.Generator) -> Losses:
        """See `Reconstruction.losses`."""
        del noise  # nothing is drawn
        rebuilt = self.decoder(self.encoder(pixels)).float()
        return {"loss": self._maps(pixels, rebuilt).sum(dim=(1, 2)).mean()}

    def compare(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Reconstruction.compare`."""
        rebuilt = self.decoder(self.encoder(pixels))
        return rebuilt, self._maps(pixels, rebuilt)

    def _maps(self, pixels: Tensor, rebuilt: Tensor) -> Tensor:
        if self.by_structure:
            return 1 - ssim_map(pixels, rebuilt)
        return (pixels - rebuilt).square().mean(dim=1)  # (B, size, size)


METHOD = Method(
    detector=lambda: Autoencoder,
    options=AutoencoderOptions(),
    published_as="Autoencoder (SSIM)",
    takes=frozenset({"images"}),
    # Paper: textures of 256 pixels, maps unblurred.
    experiment={
        "structured": {
            **{"backbone": "lenet", "layers": (0,), "image_size": 256, "crop_size": None},
            "blur_sigma": 0.0,
        },
        "semantic": {"backbone": "lenet", "layers": (0,), "image_size": 32, "crop_size": None},
    },
    # Ours: another class differs as a whole.
    on={"semantic": {"network_size": 32, "crops": False, "image_score": "mean"}},
    ignores=frozenset({"backbone", "weights", "layers", "feature_location"}),
)
