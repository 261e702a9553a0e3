"""What SAA asks of its two networks, and where they come from: contracts, and messages."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from models.errors import ModelError

INSTALL = "pip install -r requirements-saa.txt"
WAYS = (
    "--method.grounding-dino takes a folder with config.json, model.safetensors and the "
    "tokenizer's files of IDEA-Research/grounding-dino-tiny, --method.sam one with config.json and "
    "model.safetensors of facebook/sam-vit-huge; hf download NAME --local-dir FOLDER makes either"
)


@dataclass(frozen=True)
class Proposals:
    """What a grounding network sees in an image of what a prompt names.

    Attributes:
        boxes: (Q, 4) float32: centre (x, y), width and height, as shares of the image's side.
        token_scores: (Q, L) float32, in [0, 1]: how well each box fits each token of the prompt.
        pieces: the L tokens as WordPiece writes them, ## before those that continue a word.
    """

    boxes: Tensor
    token_scores: Tensor
    pieces: Sequence[str]


class Grounder(Protocol):
    """A network that finds in an image what a text names."""

    def check(self, prompt: str) -> None:
        """Raise a ModelError where it cannot read a prompt."""
        ...

    def propose(self, image: Tensor, prompt: str) -> Proposals:
        """Return boxes in an image (3, S, S), uint8."""
        ...


class Segmenter(Protocol):
    """A network that cuts out what is in a box."""

    def embed(self, image: Tensor) -> Tensor:
        """Return what it makes of an image (3, S, S), uint8, whatever the boxes."""
        ...

    def masks(self, embedding: Tensor, boxes: Tensor, side: int) -> Tensor:
        """Return one mask for each box, (R, side, side), bool.

        Args:
            embedding: of `embed`.
            boxes: (R, 4), as those of `Proposals`.
            side: of the masks, in pixels.
        """
        ...


@dataclass(frozen=True)
class Networks:
    """Both networks, frozen.

    Attributes:
        grounder: Grounding DINO.
        segmenter: SAM.
        digest: 32 hex digits that change when any of their weights does.
    """

    grounder: Grounder
    segmenter: Segmenter
    digest: str


def load_networks(grounding_dino: str | None, sam: str | None, side: int) -> Networks:
    """Read both networks from the user's folders.

    Args:
        grounding_dino: folder of Grounding DINO.
        sam: folder of SAM.
        side: pixels that images are resized to for Grounding DINO.

    Raises:
        ModelError: the package transformers is not installed, a folder is not given, or one or a
            file in it is missing or is not what it should be.
    """
    try:
        pretrained = importlib.import_module("models.methods.saa.pretrained")
    except ImportError as error:
        raise ModelError(
            f"saa needs the package transformers ({error}): {INSTALL}. {WAYS}"
        ) from error
    if grounding_dino is None or sam is None:
        given = {"--method.grounding-dino": grounding_dino, "--method.sam": sam}
        lacking = [option for option, folder in given.items() if folder is None]
        raise ModelError(f"saa needs {' and '.join(lacking)}: {WAYS}")
    try:
        networks: Networks = pretrained.read_networks(Path(grounding_dino), Path(sam), side)
    except ModelError as error:
        raise ModelError(f"saa: {error}. {WAYS}") from error
    return networks
