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
| lambda, F_theta | ewc_weight, fisher | weight and diagonal of the elastic penalty |

Two things differ. The released Fisher diagonal is a file computed on labelled ImageNet images, by
batches of 32 whose mean gradient is squared; here it is computed without labels, image by image, on
the normal training images (see `models.methods.panda.fisher`), so that its scale, and what an `ewc_weight` means,
is another. `fisher_file` takes the released file. And the paper's sample-wise early stopping, which
the released code lacks, is left out: early stopping means a fixed number of epochs.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.detector import FeatureSource
from models.errors import ModelError
from models.backbone.extractor import FrozenExtractor
from models.training.fine_tuning import FineTunedDetector, Objective
from models.methods.panda.fisher import label_free_fisher, read_fisher

VARIANTS = ("early_stopping", "ewc")


class Panda(FineTunedDetector):
    """The last stages of the backbone, trained to bring normal images to their mean.

    Args:
        backbone: the pretrained network.
        variant: "early_stopping", a fixed number of epochs; or "ewc", a penalty on leaving the
            pretrained weights, by their Fisher information.
        ewc_weight: of that penalty; no effect without it.
        fisher_file: where the Fisher diagonal is read from, .safetensors or .pth; None computes it.
        fisher_images: normal images it is computed on, drawn at random where there are more.
        learning_rate: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        clip_norm: largest norm of the gradient of all parameters together; None for no limit.
        batch_size: images per step.
        epochs: passes over the training images.
        num_neighbors: neighbours whose squared distances are added.
        trained_stages: stages that train, counted from the last.
        mixed_precision: train under bfloat16 autocast where a CUDA device computes in it.

    Attributes:
        remarks: with "ewc", where the Fisher diagonal comes from if it was computed here.

    Raises:
        ModelError: an unknown variant, or see `FineTunedDetector`.
    """

    def __init__(
        self,
        backbone: FrozenExtractor,
        *,
        variant: str = "early_stopping",
        ewc_weight: float = 1e4,
        fisher_file: str | Path | None = None,
        fisher_images: int = 1000,
        learning_rate: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 5e-5,
        clip_norm: float | None = 1e-3,
        batch_size: int = 32,
        epochs: int = 15,
        num_neighbors: int = 2,
        trained_stages: int = 2,
        mixed_precision: bool = True,
    ) -> None:
        super().__init__(
            backbone,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            batch_size=batch_size,
            epochs=epochs,
            num_neighbors=num_neighbors,
            trained_stages=trained_stages,
            mixed_precision=mixed_precision,
        )
        if variant not in VARIANTS:
            raise ModelError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
        self.variant = variant
        self.ewc_weight = ewc_weight
        self.fisher_file = fisher_file
        self.fisher_images = fisher_images
        self.remarks: list[str] = []

    def objective(self, bank: FeatureSource, generator: torch.Generator) -> Objective:
        """Return the compactness loss, with the elastic penalty where the variant has one.

        Raises:
            ModelError: the Fisher diagonal can neither be read nor computed.
        """
        self.remarks = []
        center = self.embed_bank(bank).mean(dim=0)  # (D,)

        def compactness(images: Tensor) -> Tensor:
            embeddings = self.embed_for_training(self.backbone.pixels(images))  # (B, D)
            return compactness_loss(embeddings, center)

        if self.variant == "early_stopping":
            return compactness
        parameters = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in parameters.items()}
        fisher = self._fisher(parameters, bank, generator)

        def with_penalty(images: Tensor) -> Tensor:
            penalty = elastic_penalty(parameters, start, fisher)
            return compactness(images) + self.ewc_weight * penalty

        return with_penalty

    def _fisher(
        self,
        parameters: dict[str, nn.Parameter],
        bank: FeatureSource,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        if self.fisher_file is not None:
            return read_fisher(Path(self.fisher_file), parameters)
        num_images = min(self.fisher_images, len(bank))
        self.remarks.append(
            f"the Fisher diagonal of the EWC penalty comes from {num_images} normal training "
            "images, with labels drawn from the classifier's predictions; the paper's comes from "
            "labelled ImageNet images"
        )
        return label_free_fisher(
            self.backbone, parameters, bank, num_images=num_images, generator=generator
        )


def compactness_loss(embeddings: Tensor, center: Tensor) -> Tensor:
    """Return the mean over images and entries of (embedding - center)^2, as released.

    Args:
        embeddings: (B, D).
        center: (D,).
    """
    return (embeddings - center).square().mean()


def elastic_penalty(
    parameters: dict[str, nn.Parameter], start: dict[str, Tensor], fisher: dict[str, Tensor]
) -> Tensor:
    """Return half the sum over all parameters of fisher * (parameter - start)^2, a scalar."""
    terms = [(fisher[n] * (p - start[n]).square()).sum() for n, p in parameters.items()]
    return torch.stack(terms).sum() / 2
