"""Grounding DINO and SAM as the package transformers has them; importing this imports that.

Both are read from folders that the user gives. Nothing in these is executed and nothing is fetched:
the tensors are read by the suite, and the package is given them with the configuration.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SamConfig,
    SamModel,
)
from transformers.utils import logging

from models.backbone.checkpoints import read_checkpoint
from models.errors import ModelError
from models.methods.saa.networks import Networks, Proposals
from models.methods.saa.regions import corners

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of values in [0, 1]: both networks were trained with them."""
BOXES = 16
"""Boxes that SAM is asked about at once."""
VOCABULARIES = ("tokenizer.json", "vocab.txt")
DELIMITERS = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
"""Tokens of BERT's uncased vocabulary at which Grounding DINO takes a text apart."""


class GroundingDino:
    """Grounding DINO, an image and a prompt at a time.

    Args:
        network: in eval mode.
        tokenizer: of its text encoder.
        side: pixels that images are resized to.
    """

    def __init__(self, network: Any, tokenizer: Any, side: int) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._side = side

    def check(self, prompt: str) -> None:
        """See `Grounder`.

        Raises:
            ModelError: it is longer than the text encoder takes.
        """
        count, most = len(self._ids(prompt)), self._network.config.max_text_len
        if count > most:
            raise ModelError(
                f"Grounding DINO reads up to {most} tokens, and the prompt {prompt[:40]!r}... has "
                f"{count}",
                {"prompts": "divide it into several"},
            )

    def propose(self, image: Tensor, prompt: str) -> Proposals:
        """See `Grounder`."""
        ids = self._ids(prompt)
        network = self._network.to(image.device)
        tokens = torch.tensor([ids], device=image.device)  # (1, L)
        found = network(pixel_values=prepared(image, self._side), input_ids=tokens)
        return Proposals(
            boxes=found.pred_boxes[0],
            token_scores=found.logits[0, :, : len(ids)].sigmoid(),
            pieces=tuple(self._tokenizer.convert_ids_to_tokens(ids)),
        )

    def _ids(self, prompt: str) -> list[int]:
        caption = prompt.strip().lower()
        return list(self._tokenizer(caption if caption.endswith(".") else f"{caption}.").input_ids)


class Sam:
    """SAM, asked for one mask for each box.

    Args:
        network: in eval mode.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._side = int(network.config.vision_config.image_size)

    def embed(self, image: Tensor) -> Tensor:
        """See `Segmenter`."""
        network = self._network.to(image.device)
        return network.get_image_embeddings(prepared(image, self._side))

    def masks(self, embedding: Tensor, boxes: Tensor, side: int) -> Tensor:
        """See `Segmenter`."""
        parts = [self._masks(embedding, some, side) for some in boxes.split(BOXES)]
        return torch.cat(parts)  # (R, side, side)

    def _masks(self, embedding: Tensor, boxes: Tensor, side: int) -> Tensor:
        given = rearrange(corners(boxes) * self._side, "r e -> 1 r e")
        found = self._network(
            image_embeddings=embedding, input_boxes=given, multimask_output=False
        ).pred_masks[0]  # (R, 1, h, w)
        for size in (self._side, side):
            found = F.interpolate(found, (size, size), mode="bilinear")
        return found.squeeze(1) > 0  # (R, side, side)


def prepared(image: Tensor, side: int) -> Tensor:
    """Return an image (3, S, S), uint8, as the networks take it: (1, 3, side, side), normalised."""
    pixels = rearrange(image, "c h w -> 1 c h w").float() / 255
    pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    mean, std = (rearrange(pixels.new_tensor(v), "c -> 1 c 1 1") for v in (MEAN, STD))
    return (pixels - mean) / std


def read_networks(grounding_dino: Path, sam: Path, side: int) -> Networks:
    """Read both networks; those of the last folders are kept, which every head of a run shares.

    Args:
        grounding_dino: folder of the first.
        sam: folder of the second.
        side: pixels that images are resized to for the first.

    Raises:
        ModelError: a folder or a file in it is missing or is not what it should be.
    """
    folders = (grounding_dino.resolve(), sam.resolve())
    dino, tokenizer, segmenter, digest = _loaded(*folders, _files_of(*folders))
    return Networks(GroundingDino(dino, tokenizer, side), Sam(segmenter), digest)


@functools.lru_cache(maxsize=1)
def _loaded(grounding_dino: Path, sam: Path, files: object) -> tuple[Any, Any, Any, str]:
    del files  # others than before are read anew
    tokenizer = _read_tokenizer(grounding_dino)
    digest = hashlib.blake2b(digest_size=16)
    dino = _read(grounding_dino, GroundingDinoConfig, GroundingDinoForObjectDetection, digest)
    segmenter = _read(sam, SamConfig, SamModel, digest)
    return dino, tokenizer, segmenter, digest.hexdigest()


def _files_of(*folders: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, size and time of each file of the folders."""
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file())


def _read(folder: Path, config_class: Any, network_class: Any, digest: Any) -> Any:
    """Read a network, float32, frozen and in eval mode; its tensors are added to a digest."""
    _check_kind(folder, config_class.model_type)
    tensors = read_checkpoint(folder).tensors
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    # What the networks' first weights are drawn with is not the caller's affair.
    with _explained(folder), _quiet(), torch.random.fork_rng(devices=[]):
        config = config_class.from_pretrained(folder, local_files_only=True)
        # Its kernels are code, which the package would fetch or compile for a GPU.
        config.disable_custom_kernels = True
        network, report = network_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # Integers are places in a table, which some versions of the package keep among the weights.
    learned = {name for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    if missing := sorted(learned.intersection(report["missing_keys"])):
        raise ModelError(
            f"{folder}: its weights lack {len(missing)} tensors of the network, {missing[0]} first"
        )
    return network.float().requires_grad_(False).eval()


def _check_kind(folder: Path, wanted: str) -> None:
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except FileNotFoundError as error:
        raise ModelError(f"{folder} has no config.json") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} is no configuration of a network ({error})") from error
    if kind != wanted:
        raise ModelError(f"{folder} holds a network of kind {kind!r}, not {wanted!r}")


def _read_tokenizer(folder: Path) -> Any:
    # Without such a file the package makes a tokenizer that knows no word.
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelError(f"{folder} has no tokenizer: neither {' nor '.join(VOCABULARIES)}")
    _check_kind(folder, GroundingDinoConfig.model_type)
    with _explained(folder), _quiet():
        tokenizer = BertTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if tokenizer.convert_tokens_to_ids(list(DELIMITERS)) != list(DELIMITERS.values()):
        raise ModelError(f"{folder}: its tokenizer is not that of BERT, uncased")
    return tokenizer


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn whatever the package raises into one message.

    Raises:
        ModelError: in its place.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder} cannot be read: {type(error).__name__}: {said}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package from writing to the terminal."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
