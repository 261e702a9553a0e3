"""PANDA with elastic weights: leaving the pretrained ones costs, by their Fisher information.

Source: as `panda`; the defaults are those of the released command, 50 epochs and weight 1e4.

| paper | here | meaning |
| --- | --- | --- |
| lambda, F_theta | ewc_weight, fisher | weight and diagonal of the elastic penalty |

The released Fisher diagonal is a file computed on labelled ImageNet images, by batches of 32 whose
mean gradient is squared; here it is computed without labels, image by image, on the normal training
images (see `models.methods.fine_tuned.fisher`), so that its scale, and what an `ewc_weight` means,
is another. `fisher_file` takes the released file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from configs.options import NotNegative, OnlyWith, OptionalPath, PositiveInt
from models.detector import FeatureShape, FeatureSource
from models.method import Method
from models.methods.fine_tuned.fine_tuning import Objective
from models.methods.fine_tuned.fisher import label_free_fisher, read_fisher
from models.methods.fine_tuned.panda import METHOD as PANDA
from models.methods.fine_tuned.panda import Panda, PandaOptions


@dataclass(frozen=True, kw_only=True)
class PandaEwcOptions(PandaOptions):
    """PANDA with an elastic penalty on leaving the pretrained weights."""

    ewc_weight: NotNegative = 1e4
    """Of the penalty (released code, for its own Fisher file)."""
    fisher_file: OptionalPath = None
    """Fisher diagonal, .safetensors or .pth; none computes it on the normal images."""
    fisher_images: Annotated[
        PositiveInt, OnlyWith("fisher_file", "none", lambda file: file is None)
    ] = 1000
    """Normal images it is computed on, drawn at random where there are more (ours)."""


class PandaEwc(Panda):
    """PANDA's compactness loss with the elastic penalty.

    Attributes:
        remarks: where the Fisher diagonal comes from if it was computed here.
    """

    def __init__(self, features: FeatureShape, options: PandaEwcOptions) -> None:
        super().__init__(features, options)
        self.options = options

    def objective(self, bank: FeatureSource, generator: torch.Generator) -> Objective:
        """Return the compactness loss plus the elastic penalty.

        Raises:
            ModelError: the Fisher diagonal can neither be read nor computed.
        """
        self.remarks = []
        compactness = super().objective(bank, generator)
        parameters = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in parameters.items()}
        fisher = self._fisher(parameters, bank, generator)

        def with_penalty(images: Tensor) -> Tensor:
            penalty = elastic_penalty(parameters, start, fisher)
            return compactness(images) + self.options.ewc_weight * penalty

        return with_penalty

    def _fisher(
        self, parameters: dict[str, nn.Parameter], bank: FeatureSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if self.options.fisher_file is not None:
            return read_fisher(Path(self.options.fisher_file), parameters)
        num_images = min(self.options.fisher_images, len(bank))
        self.remarks.append(
            f"the Fisher diagonal of the EWC penalty comes from {num_images} normal training "
            "images, with labels drawn from the classifier's predictions; the paper's comes from "
            "labelled ImageNet images"
        )
        return label_free_fisher(
            self.backbone, parameters, bank, num_images=num_images, generator=generator
        )


def elastic_penalty(
    parameters: dict[str, nn.Parameter], start: dict[str, Tensor], fisher: dict[str, Tensor]
) -> Tensor:
    """Return half the sum over all parameters of fisher * (parameter - start)^2, a scalar."""
    terms = [(fisher[n] * (p - start[n]).square()).sum() for n, p in parameters.items()]
    return torch.stack(terms).sum() / 2


METHOD = Method(
    detector=lambda: PandaEwc,
    options=PandaEwcOptions(epochs=50),
    tasks=PANDA.tasks,
    takes=PANDA.takes,
    published_as=PANDA.published_as,
)
