"""PANDA: pretrained features drawn together, and kept from collapsing.

Source: "PANDA: Adapting Pretrained Features for Anomaly Detection and Segmentation" (Reiss et al.,
CVPR 2021), section 4, and its released code (talreiss/PANDA), which every default here is taken
from: SGD with learning rate 1e-2, momentum 0.9, weight decay 5e-5, batches of 32, gradients clipped
to norm 1e-3, 15 epochs, or 50 with EWC of weight 1e4; conv1, bn1, layer1 and layer2 of a ResNet152
frozen; batch normalisation in eval mode; the score is the sum of squared distances to the 2 nearest
training features.

| paper | here | meaning |
| --- | --- | --- |
| psi_0, psi | backbone, net | the pretrained and the adapted network |
| c | center | mean of psi_0 over the training images |
| L_compact | compactness_loss | squared distance to c; as released, over the number of entries |

`panda_ewc` has the elastic penalty. The paper's sample-wise early stopping, which the released
code lacks, is left out: early stopping means a fixed number of epochs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.options import Fraction, NotNegative, OptionalFloat, Positive, PositiveInt
from models.detector import FeatureShape, FeatureSource
from models.method import Method
from models.methods.fine_tuned.fine_tuning import FineTunedDetector, FineTuningOptions, Objective


@dataclass(frozen=True, kw_only=True)
class PandaOptions(FineTuningOptions):
    """PANDA: the backbone's last stages, trained to bring normal images to their mean."""

    learning_rate: Positive = 1e-2
    """Of SGD (released code)."""
    momentum: Fraction = 0.9
    """Of SGD (released code)."""
    weight_decay: NotNegative = 5e-5
    """Of SGD (released code)."""
    clip_norm: OptionalFloat = 1e-3
    """Largest norm of the gradient of all parameters together; none for no limit (released)."""
    batch_size: PositiveInt = 32
    """Images per step (released code)."""
    epochs: PositiveInt = 15
    """Passes over the training images (released code: 15; panda_ewc 50)."""
    num_neighbors: PositiveInt = 2
    """Neighbours whose squared distances are the score (released code)."""
    trained_stages: PositiveInt = 2
    """Stages that train, counted from the last (released code: layer3 and layer4)."""


class Panda(FineTunedDetector):
    """The last stages of the backbone, trained to bring normal images to their mean."""

    def __init__(self, features: FeatureShape, options: PandaOptions) -> None:
        super().__init__(features, options)

    def objective(self, bank: FeatureSource, generator: torch.Generator) -> Objective:
        """Return the compactness loss."""
        del generator  # nothing is random
        center = self.embed_bank(bank).mean(dim=0)  # (D,)

        def compactness(images: Tensor) -> Tensor:
            embeddings = self.embed_for_training(self.backbone.pixels(images))  # (B, D)
            return compactness_loss(embeddings, center)

        return compactness


def compactness_loss(embeddings: Tensor, center: Tensor) -> Tensor:
    """Return the mean over images and entries of (embedding - center)^2, as released.

    Args:
        embeddings: (B, D).
        center: (D,).
    """
    return (embeddings - center).square().mean()


METHOD = Method(
    detector=lambda: Panda,
    options=PandaOptions(),
    tasks=frozenset({"semantic"}),
    takes=frozenset({"images"}),
    published_as="PANDA",
)
